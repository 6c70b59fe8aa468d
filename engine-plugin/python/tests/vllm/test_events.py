"""Unmodified vLLM that publishes its KV events, and `kvasir-index` that follows it."""

import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy
import pytest
import zmq
from conftest import Daemon
from test_layout import HEADS, TOKENS, config, spec
from test_vllm import BLOCK, MODELS, Engine
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

from kvasir import BlockCache, Namespace
from kvasir.vllm import layout
from kvasir.vllm.events import Announcements

# Built beside the daemon.
INDEX = str(Path(os.environ["KVASIRD"]).with_name("kvasir-index"))
PUBLISH = str(Path(INDEX).parent / "examples" / "publish")
# Few, so that vLLM evicts all the time.
BLOCKS = 120


class Index:
    """One that follows an engine, and maybe a daemon."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        self._ready = directory / "index"
        with (directory / "index.log").open("ab") as log:
            ready = ["--listen", "127.0.0.1:0", "--ready-file", str(self._ready)]
            self._process = subprocess.Popen([INDEX, *ready, *arguments], stdout=log, stderr=log)
        until = time.monotonic() + 30
        while not self._ready.exists():
            assert time.monotonic() < until and self._process.poll() is None
            time.sleep(0.01)

    def _ask(self, question: str, *arguments: str, text: str = "") -> list[dict]:
        address = self._ready.read_text().strip()
        asked = subprocess.run(
            [INDEX, question, "--index", address, *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in asked.stdout.splitlines()]

    def locate(self, prompt: list[int], salt: str = "") -> list[dict]:
        arguments = ["--block-size", str(BLOCK), "--salt", salt]
        return self._ask("locate", *arguments, text=json.dumps(prompt))

    def engine(self) -> dict:
        return self._ask("publishers")[0]

    def settle(self) -> dict:
        """Waits until it is in step, and nothing more comes."""
        until = time.monotonic() + 60
        seen = None
        while True:
            state = self.engine()
            if state["standing"] == "complete" and state["sequence"] == seen:
                return state
            seen = state["sequence"]
            assert time.monotonic() < until, state
            time.sleep(0.3)

    def close(self) -> None:
        self._process.terminate()
        assert self._process.wait(30) == 0


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Ports:
    def __init__(self) -> None:
        self.events, self.replay = free_port(), free_port()

    def options(self, **more: object) -> dict[str, object]:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events}",
            "replay_endpoint": f"tcp://127.0.0.1:{self.replay}",
        }
        return {
            "kv_events_config": events,
            "prefix_caching_hash_algo": "sha256_cbor",
            "num_gpu_blocks_override": BLOCKS,
            **more,
        }

    def follow(self) -> list[str]:
        address = "vllm=tcp://127.0.0.1"
        replay = f"replay=tcp://127.0.0.1:{self.replay}"
        return ["--engine", f"{address}:{self.events},{replay},check-ms=200"]


def prompts(seed: int) -> list[list[int]]:
    """Some that share their beginnings, more than there is room for."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(16, 2000) for _ in range(count)]

    beginnings = [[1, *words(rng.randrange(200, 700))] for _ in range(6)]
    chosen = [rng.choice(beginnings) for _ in range(40)]
    return [it + words(rng.randrange(0, 200)) for it in chosen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], Index]]:
    indexes = []

    def start(arguments: list[str]) -> Index:
        indexes.append(Index(tmp_path, arguments))
        return indexes[-1]

    yield start
    for index in indexes:
        index.close()


def reusable(prompt: list[int], blocks: int) -> int:
    """Tokens of these blocks that vLLM reuses: it computes the last token in any case."""
    return min(blocks, (len(prompt) - 1) // BLOCK) * BLOCK


def test_what_is_located_is_what_vllm_reuses(start: Callable[[list[str]], Index]) -> None:
    ports = Ports()
    engine = Engine(MODELS[0], vllm=ports.options())
    index = start(ports.follow())
    hits = evicted = 0
    for prompt in prompts(1)[:20]:
        index.settle()
        [located] = index.locate(prompt)
        assert located["standing"] == "complete"
        assert located["media"] in ({"GPU": located["blocks"]}, {})
        cached = engine.run([prompt])["cached"][0]
        assert cached == reusable(prompt, located["blocks"])
        hits += cached > 0
        state = index.settle()
        assert state["hash_function"] == "sha256_cbor" and state["block_size"] == BLOCK
        assert state["blocks"] <= BLOCKS
        evicted += state["blocks"] > BLOCKS - 40
        [located] = index.locate(prompt)
        # What was computed is there; a block of an answer may be, too.
        assert located["blocks"] == len(prompt) // BLOCK
        # Another tenant's are others.
        assert index.locate(prompt, salt="another")[0]["blocks"] == 0
    assert hits > 3 and evicted > 3
    engine.close()


def test_a_vllm_that_is_killed_and_started_again_leaves_nothing_behind(
    start: Callable[[list[str]], Index],
) -> None:
    ports = Ports()
    engine = Engine(MODELS[0], vllm=ports.options())
    index = start(ports.follow())
    first, second, third, *_ = prompts(2)
    engine.run([first])
    index.settle()
    assert index.locate(first)[0]["blocks"] == len(first) // BLOCK
    engine.kill()
    until = time.monotonic() + 10
    while (located := index.locate(first)[0])["standing"] != "behind":
        assert time.monotonic() < until, "it is not noticed"
        time.sleep(0.05)
    assert located["blocks"] == 0

    # Its successor publishes more than it did, before anybody may have come back.
    engine = Engine(MODELS[0], vllm=ports.options())
    for prompt in [second, third, second, third]:
        engine.run([prompt])
        for located in index.locate(first):
            common = os.path.commonprefix([first, second]), os.path.commonprefix([first, third])
            assert located["blocks"] * BLOCK <= max(len(it) for it in common)
    state = index.settle()
    assert state["restarts"] == 1
    assert index.locate(second)[0]["blocks"] == len(second) // BLOCK
    located = index.locate(first)[0]
    assert engine.run([first])["cached"][0] == reusable(first, located["blocks"])
    engine.close()


def test_an_index_that_comes_late_knows_what_was_before(
    start: Callable[[list[str]], Index],
) -> None:
    ports = Ports()
    # Hashes as they are, which is another form of the events.
    os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "0"
    try:
        engine = Engine(MODELS[0], vllm=ports.options())
    finally:
        del os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"]
    some = prompts(3)[:12]
    for prompt in some:
        engine.run([prompt])
    index = start(ports.follow())
    index.settle()
    located = [index.locate(prompt)[0]["blocks"] for prompt in some]
    for prompt, blocks in zip(some[-2:], located[-2:], strict=True):
        assert blocks == len(prompt) // BLOCK
    assert engine.run([some[0]])["cached"][0] == reusable(some[0], located[0])
    # Everything is gone at once, and a block comes.
    engine.run([some[1][: BLOCK + 1]], reset=True)
    index.settle()
    assert index.locate(some[-1])[0]["blocks"] <= 1
    engine.close()


@pytest.mark.parametrize("kind", ["connector", "small-tier"])
def test_what_the_daemon_has_is_announced(
    daemon: Daemon, start: Callable[[list[str]], Index], kind: str
) -> None:
    """By vLLM, to those who know nothing of Kvasir, with the tokens and what came before them."""

    def stored(prompt: list[int]) -> int:
        return index.locate(prompt)[0]["media"].get("STORAGE", 0)

    def settle() -> None:
        daemon.settle()
        # What has happened is said at the next step.
        engine.run([[7, 7, 7]])
        index.settle()

    ports = Ports()
    options = {"kind": kind, "load_timeout": 30.0}
    if kind != "connector":
        options["store_timeout"] = 30.0
    engine = Engine(MODELS[0], daemon.endpoint, vllm=ports.options(), **options)
    index = start(ports.follow())
    first, second, *others = prompts(5)[:10]
    asked = [first, second, *others]
    for prompt in asked:
        engine.run([prompt])
    settle()
    for prompt in asked:
        assert stored(prompt) == len(prompt) // BLOCK
        # Wherever it is, it is reused, up to the last token.
        [located] = index.locate(prompt)
        assert located["blocks"] == len(prompt) // BLOCK
        if kind == "connector":
            assert engine.run([prompt])["cached"][0] == reusable(prompt, located["blocks"])
    assert index.locate(first, salt="another")[0]["blocks"] == 0
    assert index.engine()["unknown"] == 0 and index.engine()["malformed"] == 0
    if kind == "connector":
        # Listeners forget what the daemon has when vLLM clears its own cache, until it is found.
        engine.run([[7, 7, 7]], reset=True)
        index.settle()
        assert stored(first) == 0
        for _ in range(2):
            assert engine.run([first])["cached"][0] == reusable(first, len(first) // BLOCK)
            settle()
            assert stored(first) >= reusable(first, len(first) // BLOCK) // BLOCK
    engine.close()

    # Another one announces what it finds.
    engine = Engine(MODELS[0], daemon.endpoint, vllm=ports.options(), **options)
    settle()
    assert stored(first) == 0
    cached = engine.run([first])["cached"][0]
    settle()
    assert cached >= reusable(first, len(first) // BLOCK) - BLOCK
    assert stored(first) >= cached // BLOCK

    # What it has not any more is not announced any more.
    daemon.stop()
    shutil.rmtree(daemon.data)
    daemon.start()
    until = time.monotonic() + 60
    while stored(first):
        assert time.monotonic() < until
        time.sleep(0.5)
        engine.run([[7, 7, 7]])
    engine.close()


def test_what_the_daemon_has_is_located(
    daemon: Daemon, start: Callable[[list[str]], Index]
) -> None:
    ports = Ports()
    engine = Engine(MODELS[0], daemon.endpoint, vllm=ports.options())
    [line] = [it for it in engine.log.decode().splitlines() if "the Kvasir cache is on" in it]
    namespace = line.rpartition("namespace ")[2].strip()
    daemons = ["--daemon", f"{daemon.endpoint},namespace={namespace}"]
    index = start([*ports.follow(), *daemons])
    [prompt, *_] = prompts(4)
    rng = random.Random(4)
    others = [[2, *(rng.randrange(16, 2000) for _ in range(1000))] for _ in range(5)]
    for it in [prompt, *others]:
        engine.run([it])
    until = time.monotonic() + 30
    while (located := index.locate(prompt)[1])["blocks"] < len(prompt) // BLOCK:
        assert time.monotonic() < until, located
        time.sleep(0.1)
    assert located["kind"] == "daemon" and located["standing"] == "complete"
    assert located["media"]["memory"] == len(prompt) // BLOCK
    # vLLM itself has evicted it, and loads it.
    index.settle()
    assert index.locate(prompt)[0]["media"].get("GPU", 0) < len(prompt) // BLOCK
    assert engine.run([prompt])["cached"][0] == reusable(prompt, located["blocks"])
    engine.close()


def blocks_of(event: BlockStored) -> Iterator[tuple]:
    """A block at a time: its hash, and all that is said of it but where it is."""
    parent, size = event.parent_block_hash, event.block_size
    extra_keys = event.extra_keys or [None] * len(event.block_hashes)
    for index, (hash, extra) in enumerate(zip(event.block_hashes, extra_keys, strict=True)):
        tokens = event.token_ids[index * size : (index + 1) * size]
        yield hash, (parent, tokens, size, extra, event.lora_name, event.kv_cache_spec_kind)
        parent = hash


def test_what_is_announced_is_what_vllm_says_of_its_own(daemon: Daemon) -> None:
    ports = Ports()
    engine = Engine(MODELS[0], daemon.endpoint, vllm=ports.options())
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.connect(f"tcp://127.0.0.1:{ports.events}")
    socket.subscribe(b"")
    time.sleep(1)
    some = prompts(6)[:4]
    for salt in ["", "a tenant"]:
        for prompt in some:
            engine.run([prompt], salt=salt)
    daemon.settle()
    engine.run([[7, 7, 7]])
    decode = msgspec.msgpack.Decoder(KVEventBatch).decode
    said: dict[str, dict] = {}

    def listen() -> None:
        while socket.poll(2000):
            _, _, batch = socket.recv_multipart()
            for event in decode(batch).events:
                if isinstance(event, AllBlocksCleared):
                    said.update(GPU={}, STORAGE={})
                elif isinstance(event, BlockStored):
                    said.setdefault(event.medium, {}).update(blocks_of(event))
                elif isinstance(event, BlockRemoved) and event.medium == "STORAGE":
                    for hash in event.block_hashes:
                        del said["STORAGE"][hash]

    listen()
    # Of both tenants.
    assert len(said["STORAGE"]) >= 2 * max(len(it) // BLOCK for it in some)
    for hash, what in said["STORAGE"].items():
        assert said["GPU"][hash] == what
    salted = [it for it in said["STORAGE"].values() if it[3]]
    assert {tuple(it[3]) for it in salted} == {("a tenant",)}
    # By other names in the daemon, these are the same blocks.
    announced = said["STORAGE"].keys()
    engine.run(some, reset="connector")
    daemon.settle()
    engine.run([[7, 7, 7]])
    listen()
    assert len(said["STORAGE"]) >= len(some[0]) // BLOCK
    assert said["STORAGE"].keys() < announced
    # Nothing can be announced any more, and that is no reason to fail.
    daemon.kill()
    engine.run(some, reset=True)
    listen()
    assert not said["STORAGE"]
    context.destroy(linger=0)
    engine.close()


def test_what_vllm_takes_back_is_announced_again_when_it_is_found(daemon: Daemon) -> None:
    geometry = layout.geometry(config(spec()))
    names = Namespace(geometry.layout, architecture="a", weights="w")
    cache = BlockCache(daemon.endpoint, names, lookup_timeout=5.0)
    memory = numpy.zeros(2 * geometry.layout.layer_bytes, numpy.uint8)
    row = geometry.layout.layer_bytes // (HEADS * TOKENS)
    layers = [memory] * geometry.layout.layers
    cache.register(layers, blocks=2, block=0, plane=0, head=TOKENS * row, token=row)
    hashes = [bytes([it]) * 32 for it in range(4)]
    request = SimpleNamespace(
        block_hashes=hashes, all_token_ids=list(range(4 * TOKENS)), lora_request=None,
        mm_features=[], cache_salt=None, prompt_embeds=None, session_id=None,
    )  # fmt: skip
    pool = SimpleNamespace(kv_event_queue=[])
    announcements = Announcements(cache.follow(), spec(), TOKENS, pool)

    def said(count: int) -> list[tuple[str, int]]:
        """So many events: what, and where the block's first token is."""
        events: list[tuple[str, int]] = []
        until = time.monotonic() + 30
        while len(events) < count:
            assert time.monotonic() < until, events
            for it in announcements.take():
                [hash] = it.block_hashes
                events.append((type(it).__name__, hash & 0xFF))
            time.sleep(0.01)
        return sorted(events)

    stored = [("BlockStored", it) for it in range(3)]
    announcements.expect(request, 0, hashes)
    assert cache.put(hashes[:3], [0, 1, 0]) == [True] * 3
    assert said(3) == stored
    # What is known already is not said again.
    announcements.expect(request, 0, hashes)
    announcements.heed_clearing()
    time.sleep(0.2)
    assert not list(announcements.take())
    # Before the end of the step, and in it.
    pool.kv_event_queue.append(AllBlocksCleared())
    announcements.heed_clearing()
    announcements.expect(request, 0, hashes)
    announcements.heed_clearing()
    assert said(3) == stored
    # What waits is not forgotten, and is announced when it comes.
    pool.kv_event_queue[:] = [AllBlocksCleared()]
    announcements.heed_clearing()
    assert cache.put(hashes[3:], [1]) == [True]
    assert said(1) == [("BlockStored", 3)]
    # Where only the connector's is not of use any more, listeners have to be told.
    announcements.reset()
    assert said(1) == [("BlockRemoved", 3)]


def test_what_is_published_here_is_read_with_vllms_classes() -> None:
    decode = msgspec.msgpack.Decoder(KVEventBatch).decode
    publisher = subprocess.Popen([PUBLISH], stdout=subprocess.PIPE, text=True)
    context = zmq.Context()
    try:
        events, replay = publisher.stdout.readline().removeprefix("events at ").split(", replay at ")
        reader = context.socket(zmq.SUB)
        reader.subscribe("kv-")
        reader.connect(events)
        for _ in range(3):
            assert reader.poll(10_000)
            topic, number, payload = reader.recv_multipart()
            batch, block = decode(payload), int.from_bytes(number, "big")
            [stored, *_] = batch.events
            assert topic == b"kv-events" and batch.data_parallel_rank == 0
            assert isinstance(stored, BlockStored) and stored.medium == "GPU"
            assert stored.block_hashes == [block << 32] and stored.block_size == 16
            assert stored.token_ids == list(range(16 * block, 16 * block + 16))

        asker = context.socket(zmq.DEALER)
        asker.connect(replay.strip())
        asker.send_multipart([b"", (1).to_bytes(8, "big")])
        for expected in range(1, block + 1):
            assert asker.poll(10_000)
            empty, topic, number, again = asker.recv_multipart()
            assert (empty, topic, int.from_bytes(number, "big")) == (b"", b"kv-events", expected)
        assert again == payload
        while (answer := asker.recv_multipart())[2] != ZmqEventPublisher.END_SEQ:
            assert decode(answer[3])
        assert answer == [b"", b"", ZmqEventPublisher.END_SEQ, b""]
    finally:
        context.destroy(linger=0)
        publisher.kill()
        publisher.wait()
