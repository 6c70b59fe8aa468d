"""A daemon for the tests, and what they have of it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvasir import Client

# `make test-python` says where it was built.
KVASIRD = os.environ.get("KVASIRD", "kvasird")


class Daemon:
    """A real one, with a directory of its own."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self._directory = directory
        self.data = directory / "data"
        self._flags = flags
        self.endpoint = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Starts it, where it was before if it was anywhere."""
        ready = self._directory / "ready"
        ready.unlink(missing_ok=True)
        arguments = ["--listen", self.endpoint, "--ready-file", str(ready)]
        arguments += self._flags or ["--data-dir", str(self.data)]
        log = (self._directory / "log").open("ab")
        self._process = subprocess.Popen([KVASIRD, *arguments], stdout=log, stderr=log)
        log.close()
        until = time.monotonic() + 30
        while not ready.exists() or not ready.read_text().strip():
            assert self._process.poll() is None, "the daemon did not start"
            assert time.monotonic() < until, "the daemon is not ready"
            time.sleep(0.01)
        self.endpoint = ready.read_text().strip()

    def stop(self) -> None:
        """Ends it in order."""
        self._process.terminate()
        self._process.wait(30)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait(30)

    def freeze(self) -> None:
        """It is there, and answers nobody."""
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        # The signal takes a moment to reach all threads.
        while any(_state(task) != "T" for task in tasks.iterdir()):
            time.sleep(0.001)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def settle(self) -> None:
        """Waits until nothing more is stored for a while."""
        client, before = Client(self.endpoint), None
        while (stored := client.stats()) != before:
            before = stored
            time.sleep(1)

    def damage(self, every: int) -> None:
        """Ends it, and turns a bit in as many bytes of what it has on disk; it will not know
        before it reads that.
        """
        self.stop()
        for path in (self._directory / "data" / "segments").iterdir():
            with path.open("r+b") as segment:
                for at in range(every, path.stat().st_size, every):
                    segment.seek(at)
                    (byte,) = segment.read(1)
                    segment.seek(at)
                    segment.write(bytes([byte ^ 1]))
        self.start()


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(") ")[2][0]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.kill()
