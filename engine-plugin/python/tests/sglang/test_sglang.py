"""SGLang with its own caches on host and device, and the storage behind them, beside SGLang
without: `make test-sglang`.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Daemon

PAGE = 32
TOKENS = 6
ENGINE = Path(__file__).with_name("engine.py")
MODEL = os.environ["KVASIR_TEST_MODEL"]


class Engine:
    """An SGLang of its own, with a cache if it is told where."""

    def __init__(
        self, layout: str = "layer_first", endpoint: str | None = None, **env: str
    ) -> None:
        arguments = [sys.executable, str(ENGINE), MODEL, layout]
        self.log = b""
        self._process = subprocess.Popen(
            arguments + ([endpoint] if endpoint else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | env,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self._answer()

    def _read_log(self) -> None:
        for line in self._process.stderr:
            self.log += line

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        assert line, f"SGLang ended:\n{self.log[-4000:].decode()}"
        return json.loads(line)

    def run(self, prompts: list[list[int]], reset: bool = False) -> dict:
        order = {"prompts": prompts, "tokens": TOKENS, "reset": reset}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0, self.log[-4000:].decode()


def workload(seed: int, vocabulary: int = 2000) -> list[list[int]]:
    """Prompts that share what they begin with, by threes."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(16, vocabulary) for _ in range(count)]

    prompts = []
    for _ in range(2):
        common = [1, *words(rng.randrange(500, 900))]
        prompts += [common + words(rng.randrange(40, 300)) for _ in range(3)]
    return prompts


def possible(prompts: list[list[int]]) -> int:
    """Tokens of all whole pages, but for the last token of each prompt."""
    return sum((len(prompt) - 1) // PAGE * PAGE for prompt in prompts)


def until_warm(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Pages are stored, and daemons connected to, behind the requests' backs."""
    until = time.monotonic() + 60
    while True:
        warm = engine.run(prompts, reset=True)
        assert warm["outputs"] == expected
        if sum(warm["cached"]) >= 0.95 * possible(prompts):
            return
        assert time.monotonic() < until, (warm["cached"], possible(prompts))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What SGLang answers without a cache of ours."""
    engine = Engine()
    outputs = engine.run(workload(1))["outputs"]
    engine.close()
    return outputs


def test_answers_are_those_without_a_cache_and_outlive_restarts(
    expected: list[list[int]], daemon: Daemon
) -> None:
    prompts = workload(1)
    engine = Engine("page_first_direct", daemon.endpoint)
    assert b"a page of kv came back as it was stored" in engine.log
    assert engine.run(prompts)["outputs"] == expected
    until_warm(engine, prompts, expected)
    engine.close()

    # Another process, whose host pool has another layout.
    engine = Engine("layer_first", daemon.endpoint)
    again = engine.run(prompts)
    assert again["outputs"] == expected
    assert sum(again["cached"]) >= 0.95 * possible(prompts)

    daemon.stop()
    daemon.start()
    until_warm(engine, prompts, expected)
    engine.close()


def test_a_daemon_that_fails_harms_no_request(
    expected: list[list[int]], daemon: Daemon
) -> None:
    prompts = workload(1)
    engine = Engine("page_first_direct", daemon.endpoint)
    assert engine.run(prompts)["outputs"] == expected
    for fault in ("kill", "freeze", "slow"):
        over = threading.Event()

        def harm(fault: str, over: threading.Event) -> None:
            while not over.wait(0.05):
                if fault == "kill":
                    daemon.kill()
                    if not over.wait(0.3):
                        daemon.start()
                else:
                    daemon.freeze()
                    over.wait(0.02 if fault == "slow" else 0.4)
                    daemon.thaw()

        thread = threading.Thread(target=harm, args=(fault, over))
        thread.start()
        try:
            for _ in range(2):
                assert engine.run(prompts, reset=True)["outputs"] == expected, fault
        finally:
            over.set()
            thread.join()
        if fault == "kill":
            daemon.kill()
            daemon.start()
        until_warm(engine, prompts, expected)
    # What is left of a request when the daemon is not there at all.
    daemon.kill()
    assert engine.run(prompts, reset=True)["outputs"] == expected
    engine.close()
    assert b"the Kvasir cache is off" not in engine.log


def test_sglangs_own_faults_harm_no_request(
    expected: list[list[int]], daemon: Daemon
) -> None:
    prompts = workload(1)
    engine = Engine(
        "layer_first",
        daemon.endpoint,
        SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY="0.02",
        SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE="0.2",
    )
    assert b"storage test injector enabled" in engine.log
    cached = []
    for _ in range(4):
        answers = engine.run(prompts, reset=True)
        assert answers["outputs"] == expected
        cached.append(sum(answers["cached"]))
    assert max(cached) > 0
    engine.close()
