"""`lmcache server` with the adapter, below an unmodified vLLM: `make test-lmcache`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon
from workload import whole, workload

CHUNK = 64
TOKENS = 12
ENGINE = Path(__file__).with_name("engine.py")
MODEL = os.environ["KVASIR_TEST_MODEL"]
ON = b"the Kvasir adapter is on: an object came back as it was stored"

# More than anything takes to start, on a machine that does something else too.
PATIENCE_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """A child, and what it says."""

    def __init__(self, command: list[str]) -> None:
        self.log = b""
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=[self.child.stderr], daemon=True).start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.log += line

    def tail(self) -> str:
        return self.log[-6000:].decode(errors="replace")

    def end(self) -> None:
        """Asks it to, and does not take no for an answer."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.child.pid, signal.SIGKILL)
                self.child.wait()


class Server(Process):
    """LMCache's daemon, as an operator starts it."""

    def __init__(self, endpoint: str, **options: object) -> None:
        self.port, self._http = free_port(), free_port()
        spec = {
            "type": "plugin",
            "module_path": "kvasir.lmcache",
            "class_name": "KvasirAdapter",
            "shared": True,
            "adapter_params": {"endpoint": endpoint} | options,
        }
        super().__init__(
            [str(Path(sys.executable).with_name("lmcache")), "server",
             "--port", str(self.port), "--http-port", str(self._http),
             "--prometheus-port", str(free_port()),
             "--supported-transfer-mode", "engine_driven", "--chunk-size", str(CHUNK),
             "--l1-size-gb", "1", "--eviction-policy", "LRU",
             "--l2-adapter", json.dumps(spec)]
        )  # fmt: skip
        threading.Thread(target=self._read, args=[self.child.stdout], daemon=True).start()
        until = time.monotonic() + PATIENCE_SECONDS
        while not (self._answers(self.port) and self._answers(self._http)):
            assert self.child.poll() is None, self.tail()
            assert time.monotonic() < until, self.tail()
            time.sleep(0.1)

    @staticmethod
    def _answers(port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def ask(self, path: str, body: object = None) -> Any:
        url = f"http://127.0.0.1:{self._http}{path}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as it:
            return json.load(it)

    def forget(self) -> None:
        """Evicts all there is in L1."""
        self.ask("/cache/clear", {"tier": "l1"})


class Engine(Process):
    """A vLLM, beside LMCache's daemon if it is told where."""

    def __init__(self, port: int | None = None) -> None:
        super().__init__([sys.executable, str(ENGINE), MODEL, *([str(port)] if port else [])])
        self._answer()

    def _answer(self) -> dict:
        line = self.child.stdout.readline()
        assert line, f"vLLM ended:\n{self.tail()}"
        return json.loads(line)

    def run(self, prompts: list[list[int]], alone: bool = False) -> dict:
        """All at once, or one after another: of prompts that begin alike and are asked for at the
        same time, LMCache itself does not find all, whatever is below it.
        """
        order = {"prompts": prompts, "tokens": TOKENS, "alone": alone}
        self.child.stdin.write(json.dumps(order).encode() + b"\n")
        self.child.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.child.stdin.close()
        assert self.child.wait(60) == 0, self.tail()


def possible(prompts: list[list[int]]) -> int:
    return whole(prompts, CHUNK)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts processes, of which none is left."""
    running: list[Process] = []

    def begin(kind: type, *arguments: Any, **options: Any) -> Any:
        running.append(kind(*arguments, **options))
        return running[-1]

    yield begin
    for process in reversed(running):
        process.end()


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What vLLM answers without LMCache."""
    engine = Engine()
    outputs = engine.run(workload(1))["outputs"]
    engine.close()
    return outputs


def test_what_was_computed_outlives_lmcache_and_vllm(
    expected: list[list[int]], daemon: Daemon, start: Callable
) -> None:
    prompts = workload(1)
    server = start(Server, daemon.endpoint)
    assert ON in server.log
    engine = start(Engine, server.port)
    assert engine.run(prompts)["outputs"] == expected
    daemon.settle()
    engine.close()
    server.end()

    server = start(Server, daemon.endpoint)
    engine = start(Engine, server.port)
    warm = engine.run(prompts, alone=True)
    assert warm["outputs"] == expected
    assert sum(warm["cached"]) >= 0.95 * possible(prompts)
    (status,) = server.ask("/status")["storage_manager"]["l2_adapters"]
    assert status["type"] == "KvasirAdapter" and status["why_off"] is None

    # What is found and does not come is computed, and stored again. In another order, so that L1
    # does not happen to hold the right bytes where they should come.
    daemon.damage(every=3 << 20)
    others = prompts[::-1]
    for _ in range(20):
        server.forget()
        again = engine.run(others, alone=True)
        assert again["outputs"] == expected[::-1]
        if sum(again["cached"]) >= 0.95 * possible(others):
            break
    else:
        pytest.fail("not all was stored again")
    engine.close()


def test_a_daemon_that_fails_harms_no_request(
    expected: list[list[int]], daemon: Daemon, start: Callable
) -> None:
    prompts = workload(1)
    server = start(
        Server, daemon.endpoint, load_timeout=1.0, store_timeout=1.0, cooldown=0.2
    )
    engine = start(Engine, server.port)
    engine.run(prompts)
    over = threading.Event()

    def harm() -> None:
        at = 0
        # Until it was noticed, which takes one that fails while it is asked.
        while at < 8 or (b"the Kvasir daemon fails" not in server.log and at < 40):
            at += 1
            if at % 2:
                daemon.freeze()
                over.wait(1.5)
                daemon.thaw()
            else:
                daemon.kill()
                over.wait(0.5)
                daemon.start()
            over.wait(0.5)
        over.set()

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        while not over.is_set():
            server.forget()
            assert engine.run(prompts)["outputs"] == expected
    finally:
        over.set()
        thread.join()
    assert b"the Kvasir daemon fails" in server.log
    # It comes back by itself, and so does what was lost meanwhile.
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        daemon.settle()
        server.forget()
        again = engine.run(prompts, alone=True)
        assert again["outputs"] == expected
        if sum(again["cached"]) >= 0.95 * possible(prompts):
            break
        assert time.monotonic() < until, server.tail()
    assert b"is off" not in server.log
    engine.close()
