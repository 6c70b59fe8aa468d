"""Chunks that are stored encoded, and come decoded."""

import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
from coded import (
    BIN,
    LAYERS,
    LEVELS,
    NESTED,
    Values,
    check,
    command,
    layout,
    of,
    stored,
    values,
)
from conftest import Daemon

from kvasir import (
    Chunk,
    Client,
    DecodeError,
    Error,
    Layout,
    Namespace,
    Profile,
    ProfileError,
)

TOKENS = 64
LAYOUT = layout(TOKENS)
NAMESPACE = Namespace(LAYOUT, architecture="a", weights="w")

# A model that is served with its profile, and its chunks.
MODEL = Path(os.environ.get("KVASIR_TEST_MODEL", "models/reader-9m"))
MODEL_CHUNK_TOKENS = 64


def key(name: object) -> bytes:
    return NAMESPACE.opaque_key(str(name).encode())


def joined(chunk: Chunk) -> bytes:
    return b"".join(bytes(layer) for layer in chunk.layers)


def learnt() -> Profile:
    return Profile.calibrate(LAYOUT, [values(100 + seed, TOKENS) for seed in range(8)])


@pytest.mark.parametrize("start", [0, TOKENS])
@pytest.mark.parametrize("level", LEVELS)
def test_a_chunk_comes_back_as_exact_as_its_level(
    daemon: Daemon, level: str, start: int
) -> None:
    client, before = Client(daemon.endpoint), values(1, TOKENS)
    assert client.put(key(1), LAYOUT, before, encoding=level, start=start)
    # Whoever gets it knows nothing of it.
    (came,) = Client(daemon.endpoint).get([key(1)])
    assert (came.level, came.layout, len(came.layers)) == (level, LAYOUT, LAYERS)
    check(level, before, of(joined(came), TOKENS), first=start == 0)
    if level != "raw":
        assert stored(daemon.endpoint)[key(1)] < 0.99 * LAYOUT.chunk_bytes


def test_chunks_of_all_levels_come_at_once(daemon: Daemon) -> None:
    client, levels = Client(daemon.endpoint), LEVELS * 2
    keys, profile = [key(it) for it in range(len(levels))], learnt()
    before = [values(seed, TOKENS) for seed in range(len(levels))]
    for at, level in enumerate(levels):
        of_this = profile if level == "l2" else None
        client.put(keys[at], LAYOUT, before[at], encoding=level, profile=of_this, start=9)
    came = Client(daemon.endpoint).get(keys)
    assert [it.level for it in came] == levels
    for level, was, chunk in zip(levels, before, came, strict=True):
        # With a profile, a value has a share in all coefficients of its group.
        by = 64 if level == "l2" else 1
        check(level, was, of(joined(chunk), TOKENS), first=False, by=by)


def test_nested_levels_come_as_coarse_as_one_likes(daemon: Daemon) -> None:
    client, before = Client(daemon.endpoint), values(1, TOKENS)
    client.put(key("l2"), LAYOUT, before, encoding="l2")
    client.put(key("raw"), LAYOUT, before)
    for level in NESTED:
        came = client.get([key("l2"), key("raw")], finest=level)
        assert [it.level for it in came] == [level, "raw"]
        check(level, before, of(joined(came[0]), TOKENS), first=True)
    errors = [
        numpy.square(of(joined(it), TOKENS).astype(float) - before).mean()
        for level in NESTED
        for it in client.get([key("l2")], finest=level)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_with_a_profile_few_tokens_take_few_bytes(daemon: Daemon) -> None:
    client, small = Client(daemon.endpoint), layout(16)
    profile, before = learnt(), values(3, 16)
    assert profile == Profile(bytes(profile)) and len(profile.digest) == 32
    assert profile != Profile.calibrate(LAYOUT, [values(1, TOKENS)])
    client.put(key("without"), small, before, encoding="l1", start=16)
    client.put(key("with"), small, before, encoding="l1", start=16, profile=profile)
    sizes = stored(daemon.endpoint)
    assert 2 * sizes[key("with")] < sizes[key("without")]
    for came in Client(daemon.endpoint).get([key("with"), key("without")]):
        check("l1", before, of(joined(came), 16), first=False, by=64)


def test_a_profile_that_is_missing_is_asked_for(daemon: Daemon) -> None:
    client, profile, before = Client(daemon.endpoint), learnt(), values(1, TOKENS)
    client.put(key("raw"), LAYOUT, before)
    client.put(key("l1"), LAYOUT, before, encoding="l1", profile=profile)
    reader, digest = Client(daemon.endpoint), profile.digest.hex()
    came = reader.get([key("l1")])
    command("kvasir", daemon.endpoint, "profiles", "rm", digest)
    # Who has it, has it.
    for holder in (client, reader):
        assert joined(holder.get([key("l1")])[0]) == joined(came[0])
    fresh = Client(daemon.endpoint)
    with pytest.raises(ProfileError, match=f"chunk 1 .*{digest}.*put_profile") as caught:
        fresh.get([key("raw"), key("l1")])
    assert isinstance(caught.value, DecodeError) and isinstance(caught.value, Error)
    assert len(fresh.get([key("raw")])) == 1
    assert fresh.put_profile(profile) and not fresh.put_profile(profile)
    assert joined(fresh.get([key("l1")])[0]) == joined(came[0])


def test_a_daemon_is_believed_for_a_while_to_have_a_profile(daemon: Daemon) -> None:
    client, profile, before = Client(daemon.endpoint), learnt(), values(1, TOKENS)
    client.put(key("first"), LAYOUT, before, encoding="l1", profile=profile)
    command("kvasir", daemon.endpoint, "profiles", "rm", profile.digest.hex())
    client.put(key("second"), LAYOUT, before, encoding="l1", profile=profile)
    with pytest.raises(ProfileError):
        Client(daemon.endpoint).get([key("second")])
    time.sleep(10.5)
    client.put(key("third"), LAYOUT, before, encoding="l1", profile=profile)
    assert len(Client(daemon.endpoint).get([key("first"), key("second"), key("third")])) == 3


def test_a_profile_that_is_damaged_is_missing(daemon: Daemon) -> None:
    client, profile, before = Client(daemon.endpoint), learnt(), values(1, TOKENS)
    client.put(key("l1"), LAYOUT, before, encoding="l1", profile=profile)
    daemon.stop()
    (file,) = (daemon.data / "profiles").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    daemon.start()
    fresh = Client(daemon.endpoint)
    with pytest.raises(ProfileError, match="put_profile"):
        fresh.get([key("l1")])
    # What is put with it brings it along.
    fresh.put(key("another"), LAYOUT, before, encoding="l1", profile=profile)
    assert len(Client(daemon.endpoint).get([key("l1"), key("another")])) == 2


def test_what_is_no_profile_is_refused(daemon: Daemon) -> None:
    client, profile = Client(daemon.endpoint), learnt()
    content = bytearray(bytes(profile))
    content[100] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        Profile(content)
    with pytest.raises(ValueError, match="not a profile"):
        Profile(b"no profile")
    with pytest.raises(ValueError, match="bytes"):
        Profile.calibrate(LAYOUT, [b"abc"])
    with pytest.raises(ValueError, match="no token"):
        Profile.calibrate(LAYOUT, [])
    with pytest.raises(ValueError, match="no profile"):
        client.put(key(1), LAYOUT, values(1, TOKENS), encoding="int8", profile=profile)
    other = Layout(layers=1, kv_heads=1, head_dim=8, tokens=16, dtype="f16")
    with pytest.raises(ValueError, match="profile"):
        client.put(key(1), other, bytes(other.chunk_bytes), encoding="l1", profile=profile)
    # It turns its keys, which nothing is told of here.
    of_model = Profile((MODEL / "kvasir-profile.bin").read_bytes())
    with pytest.raises(ValueError, match="profile"):
        client.put(key(1), LAYOUT, values(1, TOKENS), encoding="l1", profile=of_model)


def test_levels_that_cannot_be_are_refused(daemon: Daemon) -> None:
    client, before = Client(daemon.endpoint), values(1, TOKENS)
    with pytest.raises(ValueError, match="not a level"):
        client.put(key(1), LAYOUT, before, encoding="L2")
    with pytest.raises(ValueError, match="not a level"):
        client.get([key(1)], finest="fine")
    quantised = Layout(layers=1, kv_heads=1, head_dim=8, tokens=16, dtype="f8e4m3")
    with pytest.raises(ValueError, match="quantised already"):
        client.put(key(1), quantised, bytes(quantised.chunk_bytes), encoding="l1")
    assert client.lookup([key(1)]) == 0


def test_what_cannot_be_made_smaller_stays_exact(daemon: Daemon) -> None:
    client = Client(daemon.endpoint)
    noise = numpy.random.default_rng(1).bytes(LAYOUT.chunk_bytes)
    for level in ["lossless", "cachegen"]:
        client.put(key(level), LAYOUT, noise, encoding=level)
        (came,) = client.get([key(level)])
        assert joined(came) == noise and came.level in ("raw", "lossless")


def test_a_chunk_that_is_damaged_does_not_come(daemon: Daemon) -> None:
    client = Client(daemon.endpoint)
    keys = [key(it) for it in range(4)]
    for name, level in zip(keys, ["raw", "lossless", "l2", "l1"], strict=True):
        client.put(name, LAYOUT, values(1, TOKENS), encoding=level)
    daemon.damage(every=7000)
    fresh = Client(daemon.endpoint)
    for name in keys:
        assert fresh.get([name]) == []


def test_a_chunk_that_is_none_is_an_error(daemon: Daemon, tmp_path: Path) -> None:
    client, small = Client(daemon.endpoint), Layout(
        layers=1, kv_heads=1, head_dim=8, tokens=16, dtype="f16"
    )
    client.put(key(1), small, numpy.ones(256, dtype=numpy.float16), encoding="int8", start=9)
    file = tmp_path / "chunk"
    command("kvasir", daemon.endpoint, "get", key(1).hex(), "--output", str(file))
    content = file.read_bytes()
    # Rows of a scale and eight numbers. No scale is infinite; what is said of the bytes is true.
    extent = content[-2 * 16 * 10 :]
    head = content[: -len(extent) - 8]
    infinite = b"\x80\x7f" + extent[2:]
    assert head.count(checksum(extent)) == 1
    head = head.replace(checksum(extent), checksum(infinite))
    file.write_bytes(head + checksum(head) + infinite)
    client.delete([key(1)])
    command("kvasir", daemon.endpoint, "put", str(file))
    client.put(key(0), small, bytes(small.chunk_bytes))
    with pytest.raises(DecodeError, match="chunk 1 cannot be decoded.*scale") as caught:
        client.get([key(0), key(1)])
    assert not isinstance(caught.value, ProfileError)


def checksum(data: bytes) -> bytes:
    """CRC-64/NVME."""
    remainder = (1 << 64) - 1
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x9A6C9329AC4BC9B5 if remainder & 1 else 0)
    return (remainder ^ (1 << 64) - 1).to_bytes(8, "little")


def test_other_threads_go_on_while_one_decodes(daemon: Daemon) -> None:
    large = Layout(layers=8, kv_heads=8, head_dim=64, tokens=256, dtype="f16")
    rng = numpy.random.default_rng(1)
    before = rng.standard_normal(large.chunk_bytes // 2, dtype=numpy.float32)
    client, keys = Client(daemon.endpoint), [key(it) for it in range(8)]
    for name in keys:
        client.put(name, large, before.astype(numpy.float16), encoding="l2")
    begun, over = threading.Event(), threading.Event()

    def get() -> None:
        begun.set()
        assert len(client.get(keys)) == len(keys)
        over.set()

    thread = threading.Thread(target=get)
    thread.start()
    begun.wait()
    count = 0
    while not over.is_set():
        count += 1
    thread.join()
    # With the GIL held, there would be hardly any.
    assert count > 10_000


@contextmanager
def engine(endpoint: str, *flags: str) -> Iterator[str]:
    """A server of the model, whose chunks the daemon gets."""
    called = [BIN / "kvasir-engine", "serve", "--model", MODEL, "--listen", "127.0.0.1:0"]
    called += ["--kvasir", endpoint, "--chunk-tokens", str(MODEL_CHUNK_TOKENS), *flags]
    process = subprocess.Popen(called, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening on "):
                yield line.split()[2]
                break
    finally:
        process.terminate()
        process.wait(30)


def chunks_of_an_engine(daemon: Daemon, *flags: str) -> dict[bytes, int]:
    """What the daemon has of a prompt of two chunks and a bit."""
    prompt = " ".join(f"word {number}" for number in range(200))
    with engine(daemon.endpoint, *flags) as address:
        request = urllib.request.Request(
            f"http://{address}/v1/completions",
            json.dumps({"prompt": prompt, "max_tokens": 1}).encode(),
            {"content-type": "application/json"},
        )
        urllib.request.urlopen(request).read()
        daemon.settle()
    return stored(daemon.endpoint)


@pytest.fixture
def other_daemon(tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "other").mkdir()
    daemon = Daemon(tmp_path / "other")
    yield daemon
    daemon.kill()


@pytest.mark.parametrize("with_profile", [False, True])
def test_chunks_of_the_rust_engine_are_read(
    daemon: Daemon, other_daemon: Daemon, with_profile: bool
) -> None:
    flags = ["--profile", str(MODEL / "kvasir-profile.bin")] if with_profile else []
    sizes = chunks_of_an_engine(daemon)
    smaller = chunks_of_an_engine(other_daemon, "--cache-level", "l2", *flags)
    assert len(sizes) >= 2 and sizes.keys() == smaller.keys()
    exact, coded = Client(daemon.endpoint), Client(other_daemon.endpoint)
    for name in sizes:
        assert smaller[name] < sizes[name] / 2
        before = numbers(exact.get([name])[0], "raw")
        errors = numpy.square(before - numbers(coded.get([name])[0], "l2")).mean()
        # The model's profile has errors where attention does not look.
        assert 0 < errors < (0.4 if with_profile else 0.05) * before.var()


def numbers(chunk: Chunk, level: str) -> Values:
    assert chunk.level == level
    kinds = {"f32": numpy.float32, "f16": numpy.float16}
    return numpy.frombuffer(joined(chunk), dtype=kinds[chunk.layout.dtype]).astype(float)
