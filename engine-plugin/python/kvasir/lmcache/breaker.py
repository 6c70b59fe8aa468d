"""When a daemon that has failed is asked again."""

import threading
import time

MAX_DOUBLINGS = 5


class Breaker:
    """Leaves it alone for `cooldown` seconds, twice as long after each failure that follows."""

    def __init__(self, cooldown: float) -> None:
        self._cooldown = cooldown
        self._failures = 0
        self._since = 0.0
        self._lock = threading.Lock()

    @property
    def rests(self) -> bool:
        with self._lock:
            doublings = min(max(self._failures - 1, 0), MAX_DOUBLINGS)
            over = self._since + self._cooldown * 2**doublings
            return self._failures > 0 and time.monotonic() < over

    def failed(self, begun: float) -> bool:
        """Notes that a call failed which began at `begun`: whether it was the first one to. Calls
        that were under way together are one failure.
        """
        with self._lock:
            if self._failures == 0 or begun >= self._since:
                self._failures += 1
                self._since = time.monotonic()
                return self._failures == 1
            return False

    def succeeded(self) -> bool:
        """Whether calls had failed before."""
        with self._lock:
            had_failed, self._failures = self._failures > 0, 0
            return had_failed
