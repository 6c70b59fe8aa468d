"""Tasks that LMCache submits, and polls for: they end in threads of ours, always."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.platform import create_event_notifier

# What is not begun by then is given up. LMCache's own locks last some minutes.
TASK_SECONDS = 60.0

Item = TypeVar("Item")


class Task:
    """Of each key, how many bytes were moved for it, or that it did not get there."""

    def __init__(self, number: int, keys: list[ObjectKey], parts: int, holds: int) -> None:
        self.number = number
        self.keys = keys
        # Bytes of LMCache's memory that are spoken for as long as it runs.
        self.holds = holds
        self.moved: list[int | None] = [None] * len(keys)
        # Whether what is left of it need not be tried.
        self.is_cut = False
        self.until = time.monotonic() + TASK_SECONDS
        # Parts that have not ended.
        self.left = parts

    def done(self) -> list[tuple[int, int]]:
        """Keys that got there, by their index, and bytes that were moved for each."""
        return [(at, moved) for at, moved in enumerate(self.moved) if moved is not None]


class Tasks(Generic[Item]):
    """Tasks of one kind, in threads of their own. `work` does a part of one: some of its keys, by
    their index, each with what is to be done for it. `settle` is called once a task is over,
    before LMCache hears of it. An exception of either is `defect`'s, and harms no task.
    """

    def __init__(
        self,
        kind: str,
        threads: int,
        work: Callable[[Task, list[tuple[int, Item]]], None],
        settle: Callable[[Task], None],
        defect: Callable[[Exception], None],
    ) -> None:
        self._work, self._settle, self._defect = work, settle, defect
        self._event = create_event_notifier()
        self._pool = ThreadPoolExecutor(threads, f"kvasir-{kind}")
        self._numbers = itertools.count()
        self._ended: dict[int, Task] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def fileno(self) -> int:
        return self._event.fileno()

    def begin(
        self, keys: list[ObjectKey], parts: Sequence[list[tuple[int, Item]]], holds: int = 0
    ) -> int:
        """Keys that are in no part do not get there."""
        task = Task(next(self._numbers), keys, max(len(parts), 1), holds)
        for part in parts or [[]]:
            try:
                self._pool.submit(self._run, task, part)
            except RuntimeError:
                # No thread for it, or it is closed.
                self._end_part(task)
        return task.number

    def _run(self, task: Task, part: list[tuple[int, Item]]) -> None:
        try:
            if part and not task.is_cut and not self._is_closed and time.monotonic() < task.until:
                self._work(task, part)
        except Exception as error:
            self._defect(error)
        finally:
            self._end_part(task)

    def _end_part(self, task: Task) -> None:
        with self._lock:
            task.left -= 1
            if task.left > 0:
                return
        try:
            self._settle(task)
        except Exception as error:
            self._defect(error)
        finally:
            with self._lock:
                self._ended[task.number] = task
                if not self._is_closed:
                    self._event.notify()

    def ended(self, number: int) -> Task | None:
        """A task that is over, once."""
        with self._lock:
            return self._ended.pop(number, None)

    def all_ended(self) -> list[Task]:
        with self._lock:
            ended, self._ended = self._ended, {}
        return list(ended.values())

    def close(self) -> None:
        """Waits for what is under way; afterwards no thread touches LMCache's memory."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown()
        self._event.close()
