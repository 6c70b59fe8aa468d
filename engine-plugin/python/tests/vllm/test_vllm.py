"""Unmodified vLLM with the connector, beside vLLM without: `make test-vllm`."""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Daemon
from tokenizers import Tokenizer
from workload import whole, workload

from kvasir import Client

BLOCK = 32
TOKENS = 12
ENGINE = Path(__file__).with_name("engine.py")
MODELS = os.environ["KVASIR_TEST_MODELS"].split(":")
# By way of memory of the host, as KV of a device goes: all of it, and of some blocks alone.
STAGED = {"staging": 256 << 20}
SMALL = {"staging": 8 << 20}


class Engine:
    """A vLLM of its own, with a cache if it is told where."""

    def __init__(
        self,
        model: str,
        endpoint: str | None = None,
        vllm: dict[str, object] | None = None,
        **options: object,
    ) -> None:
        arguments = [sys.executable, str(ENGINE), model, json.dumps(vllm or {})]
        if endpoint:
            arguments.append(json.dumps({"endpoint": endpoint} | options))
        self.log = b""
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self._answer()

    def _read_log(self) -> None:
        for line in self._process.stderr:
            self.log += line

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        assert line, f"vLLM ended:\n{self.log[-4000:].decode()}"
        return json.loads(line)

    def begin(
        self,
        prompts: list[list[int]],
        reset: bool | str = False,
        tokens: int = TOKENS,
        salt: str = "",
    ) -> None:
        order = {"prompts": prompts, "tokens": tokens, "reset": reset, "salt": salt}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def end(self) -> dict:
        return self._answer()

    def run(
        self,
        prompts: list[list[int]],
        reset: bool | str = False,
        tokens: int = TOKENS,
        salt: str = "",
    ) -> dict:
        self.begin(prompts, reset, tokens, salt)
        return self.end()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(60)

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0, self.log[-4000:].decode()


def possible(prompts: list[list[int]]) -> int:
    return whole(prompts, BLOCK)


@pytest.fixture(params=MODELS, ids=lambda path: Path(path).name)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def answers(model: str) -> list[list[int]]:
    engine = Engine(model)
    outputs = engine.run(workload(1))["outputs"]
    engine.close()
    return outputs


@pytest.fixture
def expected(model: str) -> list[list[int]]:
    """What vLLM answers without a cache of ours."""
    return answers(model)


def test_answers_are_those_without_a_cache_and_outlive_restarts(
    model: str, expected: list[list[int]], daemon: Daemon
) -> None:
    prompts = workload(1)
    engine = Engine(model, daemon.endpoint)
    assert b"a block came back as it was stored" in engine.log
    cold = engine.run(prompts)
    assert cold["outputs"] == expected
    daemon.settle()
    warm = engine.run(prompts, reset=True)
    assert warm["outputs"] == expected
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    engine.close()

    engine = Engine(model, daemon.endpoint)
    again = engine.run(prompts)
    assert again["outputs"] == expected
    assert sum(again["cached"]) >= 0.95 * possible(prompts)

    daemon.stop()
    daemon.start()
    # The connection comes back by itself.
    until = time.monotonic() + 30
    while True:
        after = engine.run(prompts, reset=True)
        assert after["outputs"] == expected
        if sum(after["cached"]) >= 0.95 * possible(prompts):
            break
        assert time.monotonic() < until
    engine.close()


def test_as_a_tier_it_fills_the_memory_of_another_vllm(
    model: str, expected: list[list[int]], daemon: Daemon
) -> None:
    prompts = workload(1)
    engine = Engine(model, daemon.endpoint, kind="tier")
    assert b"a chunk came back as it was stored" in engine.log
    assert engine.run(prompts)["outputs"] == expected
    engine.close()

    engine = Engine(model, daemon.endpoint, kind="tier")
    warm = engine.run(prompts)
    assert warm["outputs"] == expected
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    engine.close()


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("kill", {}),
        ("freeze", {}),
        ("slow", {}),
        ("kill", {"layerwise": True}),
        ("freeze", {"layerwise": True}),
        ("kill", STAGED),
        ("freeze", STAGED | {"layerwise": True}),
        ("kill", {"kind": "small-tier"}),
        ("freeze", {"kind": "small-tier"}),
    ],
    ids=str,
)
def test_a_daemon_that_fails_harms_no_request(
    model: str,
    expected: list[list[int]],
    daemon: Daemon,
    fault: str,
    options: dict[str, object],
) -> None:
    prompts = workload(1)
    engine = Engine(model, daemon.endpoint, **options)
    assert engine.run(prompts)["outputs"] == expected
    over = threading.Event()

    def harm() -> None:
        while not over.wait(0.05):
            if fault == "kill":
                daemon.kill()
                if not over.wait(0.3):
                    daemon.start()
            else:
                daemon.freeze()
                over.wait(0.02 if fault == "slow" else 0.4)
                daemon.thaw()

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        for _ in range(4):
            assert engine.run(prompts, reset=True)["outputs"] == expected
    finally:
        over.set()
        thread.join()
    engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"layerwise": True}, STAGED, STAGED | {"layerwise": True}],
    ids=str,
)
def test_what_is_found_and_does_not_come_is_computed(
    model: str, expected: list[list[int]], daemon: Daemon, options: dict[str, object]
) -> None:
    prompts = workload(1)
    engine = Engine(model, daemon.endpoint, **options)
    # Of what is asked later, the end is computed in the step that finds the beginning.
    engine.run([prompt[:500] for prompt in prompts])
    engine.close()
    daemon.damage(every=1 << 20)

    engine = Engine(model, daemon.endpoint, **options)
    assert engine.run(prompts)["outputs"] == expected
    assert b"Recovered from KV load failure" in engine.log
    # Nothing that was computed in between was stored as something else; what is damaged is found
    # out and stored again, of each prompt a block at a time.
    for _ in range(20):
        daemon.settle()
        again = engine.run(prompts, reset=True)
        assert again["outputs"] == expected
        if sum(again["cached"]) >= 0.95 * possible(prompts):
            break
    else:
        pytest.fail("not all was stored again")
    engine.close()


@pytest.mark.parametrize(
    ("call", "layerwise"),
    [("find", False), ("plan", False), ("load", False), ("load_layers", True), ("save", True)],
)
def test_a_defect_turns_the_cache_off(daemon: Daemon, call: str, layerwise: bool) -> None:
    model, prompts = MODELS[0], workload(1)
    engine = Engine(model, daemon.endpoint)
    engine.run(prompts)
    engine.close()
    engine = Engine(model, daemon.endpoint, broken=call, layerwise=layerwise)
    # Some prompts are new: there is something to store.
    others = workload(2)
    for _ in range(2):
        assert len(engine.run(others, reset=True)["outputs"]) == len(others)
        assert engine.run(prompts, reset=True)["outputs"] == answers(model)
    # Each side of the connector says so once.
    assert engine.log.count(b"the Kvasir cache is off") in (1, 2)
    engine.close()


@pytest.mark.parametrize(
    "options",
    [{"layerwise": True}, STAGED, STAGED | {"layerwise": True}, SMALL],
    ids=str,
)
def test_blocks_go_in_and_out_by_layer_and_by_way_of_other_memory(
    model: str, expected: list[list[int]], daemon: Daemon, options: dict[str, object]
) -> None:
    prompts = workload(1)
    engine = Engine(model, daemon.endpoint, **options)
    # What found no room in that memory, a later pass stores.
    for _ in range(12):
        warm = engine.run(prompts, reset=True)
        assert warm["outputs"] == expected
        daemon.settle()
        if sum(warm["cached"]) >= 0.95 * possible(prompts):
            break
    else:
        pytest.fail("not all was stored")
    engine.close()

    engine = Engine(model, daemon.endpoint, **options)
    again = engine.run(prompts)
    assert again["outputs"] == expected
    assert sum(again["cached"]) >= 0.95 * possible(prompts)
    engine.close()


def share(daemon: Daemon, model: str) -> float:
    """Bytes that the daemon has, of those that its blocks had in f32."""
    config = json.loads((Path(model) / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = 2 * BLOCK * config["num_hidden_layers"] * config["num_key_value_heads"] * dim
    stored = Client(daemon.endpoint).stats()["memory"]
    return stored["bytes"] / (stored["chunks"] * 4 * values)


@pytest.mark.parametrize(
    ("encoding", "options"), [("raw", {}), ("lossless", {"layerwise": True})], ids=str
)
def test_blocks_are_stored_as_keys_and_values(
    model: str,
    expected: list[list[int]],
    daemon: Daemon,
    encoding: str,
    options: dict[str, object],
) -> None:
    prompts = workload(1)
    engine = Engine(model, daemon.endpoint, encoding=encoding, **options)
    assert engine.run(prompts)["outputs"] == expected
    daemon.settle()
    engine.close()
    # What is known of a chunk beside it takes some bytes, too.
    assert share(daemon, model) <= {"raw": 1.05, "lossless": 0.95}[encoding]

    engine = Engine(model, daemon.endpoint, encoding=encoding, **options)
    warm = engine.run(prompts)
    assert warm["outputs"] == expected
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    engine.close()


@functools.cache
def questions() -> tuple[list[list[int]], list[list[int]]]:
    """Of the trained model: prompts, and what the answers to them begin with."""
    tokenizer = Tokenizer.from_file(str(Path(MODELS[0]) / "tokenizer.json"))

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    lines = (Path(MODELS[0]) / "questions.jsonl").read_text().splitlines()
    asked = [it for it in map(json.loads, lines) if it["document_tokens"] < 1000]
    prompts = [tokens(f"{it['document']} {it['question']}") for it in asked]
    return prompts, [tokens(it["answer"]) for it in asked]


def right(outputs: list[list[int]]) -> int:
    pairs = zip(outputs, questions()[1], strict=True)
    return sum(output[: len(answer)] == answer for output, answer in pairs)


@functools.cache
def right_without() -> int:
    engine = Engine(MODELS[0])
    outputs = engine.run(questions()[0])["outputs"]
    engine.close()
    return right(outputs)


@pytest.mark.parametrize(
    ("encoding", "options", "bytes"),
    [("int8", {}, 0.3), ("l2", {"layerwise": True}, 0.2), ("l0", {}, 0.1)],
    ids=str,
)
def test_over_coarse_blocks_most_answers_are_right(
    daemon: Daemon, encoding: str, options: dict[str, object], bytes: float
) -> None:
    model, (prompts, _) = MODELS[0], questions()
    engine = Engine(model, daemon.endpoint, encoding=encoding, **options)
    # What is computed is no other.
    assert right(engine.run(prompts)["outputs"]) == right_without() > len(prompts) // 2
    daemon.settle()
    engine.close()
    assert share(daemon, model) <= bytes

    engine = Engine(model, daemon.endpoint, encoding=encoding, **options)
    warm = engine.run(prompts)
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    lost = 0.4 if encoding == "l0" else 0.05
    assert right(warm["outputs"]) >= (1 - lost) * right_without()
    engine.close()

    # Others do not find what is coarser than they store, nor blocks as vLLM has them.
    for others in ({"encoding": "raw"}, {}):
        engine = Engine(model, daemon.endpoint, **others)
        assert engine.run(prompts[:1])["cached"] == [0]
        engine.close()


def test_blocks_of_hosts_that_arrange_them_differently_are_not_found(daemon: Daemon) -> None:
    model, prompts = MODELS[0], workload(1)
    engine = Engine(model, daemon.endpoint)
    engine.run(prompts)
    engine.close()
    engine = Engine(model, daemon.endpoint, broken="arrangement")
    found = engine.run(prompts)
    assert not any(found["cached"][::4])
    assert found["outputs"] == answers(model)
    engine.close()


def test_after_a_reset_nothing_of_before_is_used(daemon: Daemon) -> None:
    model, prompts = MODELS[0], workload(1)
    engine = Engine(model, daemon.endpoint)
    engine.run(prompts)
    daemon.settle()
    # Prompts share what they begin with by fours, which vLLM finds by itself.
    assert not any(engine.run(prompts, reset="connector")["cached"][::4])
    daemon.settle()
    # But what was stored since is.
    warm = engine.run(prompts, reset=True)
    assert warm["outputs"] == answers(model)
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    engine.close()


@pytest.mark.parametrize("options", [{}, STAGED | {"layerwise": True}], ids=str)
def test_requests_that_are_preempted_answer_the_same(
    daemon: Daemon, options: dict[str, object]
) -> None:
    model, prompts, tokens = MODELS[0], workload(1), 70
    # Room for the prompts of a few requests, and not for all they answer.
    vllm = {"num_gpu_blocks_override": 110}
    engine = Engine(model, None, vllm)
    computed = engine.run(prompts, tokens=tokens)
    assert computed["preempted"] > 0
    engine.close()
    engine = Engine(model, daemon.endpoint, vllm, **options)
    for _ in range(3):
        found = engine.run(prompts, reset=True, tokens=tokens)
        assert found["outputs"] == computed["outputs"]
        daemon.settle()
    assert found["preempted"] > 0
    engine.close()


def test_ranks_store_their_own_heads(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or all workers would share the first cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model, prompts = MODELS[0], workload(1)
    engine = Engine(model, daemon.endpoint, {"tensor_parallel_size": 2})
    cold = engine.run(prompts)
    daemon.settle()
    engine.close()

    engine = Engine(model, daemon.endpoint, {"tensor_parallel_size": 2})
    warm = engine.run(prompts)
    assert warm["outputs"] == cold["outputs"]
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    engine.close()

    # One that has all heads finds nothing of theirs.
    engine = Engine(model, daemon.endpoint)
    alone = engine.run(prompts)
    assert not any(alone["cached"][::4])
    assert alone["outputs"] == answers(model)
    engine.close()


def test_without_a_daemon_it_is_as_if_there_was_no_cache(
    model: str, expected: list[list[int]]
) -> None:
    engine = Engine(model, "127.0.0.1:9")
    assert b"no Kvasir daemon answers" in engine.log
    assert engine.run(workload(1))["outputs"] == expected
    engine.close()
