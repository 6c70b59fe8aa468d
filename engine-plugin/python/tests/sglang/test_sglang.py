"""SGLang with its own caches on host and device, and the storage behind them, beside SGLang
without: `make test-sglang`.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Daemon
from workload import whole, workload

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


PROMPTS = workload(1, groups=2, each=3, shared=(500, 900))
POSSIBLE = whole(PROMPTS, PAGE)


def until_warm(engine: Engine, expected: list[list[int]]) -> None:
    """Pages are stored, and daemons connected to, behind the requests' backs."""
    until = time.monotonic() + 60
    while True:
        warm = engine.run(PROMPTS, reset=True)
        assert warm["outputs"] == expected
        if sum(warm["cached"]) >= 0.95 * POSSIBLE:
            return
        assert time.monotonic() < until, (warm["cached"], POSSIBLE)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What SGLang answers without a cache of ours."""
    engine = Engine()
    outputs = engine.run(PROMPTS)["outputs"]
    engine.close()
    return outputs


def test_answers_are_those_without_a_cache_and_outlive_restarts(
    expected: list[list[int]], daemon: Daemon
) -> None:
    engine = Engine("page_first_direct", daemon.endpoint)
    assert b"a page of kv came back as it was stored" in engine.log
    assert engine.run(PROMPTS)["outputs"] == expected
    until_warm(engine, expected)
    engine.close()

    # Another process, whose host pool has another layout.
    engine = Engine("layer_first", daemon.endpoint)
    again = engine.run(PROMPTS)
    assert again["outputs"] == expected
    assert sum(again["cached"]) >= 0.95 * POSSIBLE

    daemon.stop()
    daemon.start()
    until_warm(engine, expected)
    engine.close()


def test_a_daemon_that_fails_harms_no_request(
    expected: list[list[int]], daemon: Daemon
) -> None:
    engine = Engine("page_first_direct", daemon.endpoint)
    assert engine.run(PROMPTS)["outputs"] == expected
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
                assert engine.run(PROMPTS, reset=True)["outputs"] == expected, fault
        finally:
            over.set()
            thread.join()
        if fault == "kill":
            daemon.kill()
            daemon.start()
        until_warm(engine, expected)
    # What is left of a request when the daemon is not there at all.
    daemon.kill()
    assert engine.run(PROMPTS, reset=True)["outputs"] == expected
    engine.close()
    assert b"the Kvasir cache is off" not in engine.log


def test_sglangs_own_faults_harm_no_request(
    expected: list[list[int]], daemon: Daemon
) -> None:
    engine = Engine(
        "layer_first",
        daemon.endpoint,
        SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY="0.02",
        SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE="0.2",
    )
    assert b"storage test injector enabled" in engine.log
    cached = []
    for _ in range(4):
        answers = engine.run(PROMPTS, reset=True)
        assert answers["outputs"] == expected
        cached.append(sum(answers["cached"]))
    assert max(cached) > 0
    engine.close()
