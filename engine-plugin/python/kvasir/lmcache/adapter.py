"""A Kvasir daemon as an L2 adapter of LMCache's multi-process daemon, below its L1.

LMCache's threads submit tasks, and are woken by an event when one is over. All that waits happens
in threads of ours, without the GIL, between L1's memory itself and the daemon.

Whatever becomes of the daemon, each task ends: an object that does not come whole is reported as
not loaded, and LMCache drops what it had reserved for it. A daemon that fails costs its timeouts
once, and is then left alone for a while, in which nothing is found and nothing stored.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy
import torch
from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj

from kvasir import Chunk, Client, Error, SlotCache
from kvasir._hooks import harmless
from kvasir._identity import Unsupported
from kvasir.lmcache.breaker import Breaker
from kvasir.lmcache.names import Geometry, Names, geometry
from kvasir.lmcache.tasks import TASK_SECONDS, Task, Tasks

logger = init_logger("kvasir.lmcache")

# Options, what they are, and what they are unless they are given.
OPTIONS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "endpoint": (str, "127.0.0.1:7420"),
    "weights": (str, ""),
    "lookup_timeout": (float, 0.25),
    "load_timeout": (float, 2.0),
    "store_timeout": (float, 5.0),
    "cooldown": (float, 1.0),
    "store_buffer": (int, 2 << 30),
    "durable": (bool, True),
}

# About what one get loads, which is held beside L1 until it is copied there.
GET_BYTES = 64 << 20

# Gets that this takes, at most: one, if the daemon has all that was found there.
GETS = 3

LOOKUP_THREADS = 2
LOAD_THREADS = 4
STORE_THREADS = 4

CANARY_BYTES = 1 << 16

Answer = TypeVar("Answer")


class KvasirAdapter(L2AdapterInterface):
    """Options, in `adapter_params`: `endpoint` (127.0.0.1:7420); `weights`, a name for what LMCache
    does not tell; `lookup_timeout`, `load_timeout`, `store_timeout` and `cooldown`, in seconds;
    `store_buffer`, in bytes; `durable`.
    """

    def __init__(self, options: dict[str, Any], l1_memory_desc: object = None) -> None:
        super().__init__()
        self._why_off: str | None = None
        self._options = {name: default for name, (_, default) in OPTIONS.items()}
        self._breaker = Breaker(0.0)
        self._lock = threading.Lock()
        self._names: dict[Geometry, Names] = {}
        self._finders: dict[Geometry, SlotCache] = {}
        # What objects of a model, rank and group look like.
        self._seen: dict[tuple[str, int, int], Geometry] = {}
        self._has_serde = False
        # Whether it has been said how it begins.
        self._is_open = False
        # Bytes of L1 that stores hold.
        self._held = 0
        self._lookups: Tasks[Geometry] = Tasks(
            "lookup", LOOKUP_THREADS, self._look_up, lambda _: None, self._defect
        )
        self._loads: Tasks[MemoryObj] = Tasks(
            "load", LOAD_THREADS, self._load, self._settle_load, self._defect
        )
        self._stores: Tasks[MemoryObj] = Tasks(
            "store", STORE_THREADS, self._store, self._settle_store, self._defect
        )
        try:
            self._open(options)
        except Exception as error:
            self._disable(error)

    def _open(self, given: dict[str, Any]) -> None:
        if unknown := sorted(given.keys() - OPTIONS.keys()):
            raise Unsupported(f"there is no option {unknown[0]}; there are {[*OPTIONS]}")
        options = self._options
        options.update({name: OPTIONS[name][0](value) for name, value in given.items()})
        for name, value in options.items():
            if isinstance(value, int | float) and value < 0:
                raise Unsupported(f"{name} of {value} is less than nothing")
        self._breaker = Breaker(options["cooldown"])
        self._client = Client(
            options["endpoint"],
            call_timeout=options["lookup_timeout"],
            transfer_timeout=options["store_timeout"],
        )
        if self._round_trip():
            logger.info("the Kvasir adapter is on: an object came back as it was stored")
        else:
            logger.warning("no Kvasir daemon answers: going on without until one does")
        self._is_open = True

    def _round_trip(self) -> bool:
        """Stores and loads bytes of no meaning. False where there is no daemon."""
        names = self._named((((CANARY_BYTES,), torch.uint8),))
        key, content = names.namespace.opaque_key(os.urandom(16)), os.urandom(CANARY_BYTES)
        if self._put(key, names, content) is None:
            return False
        chunks = self._get([key], self._options["load_timeout"])
        self._call(lambda: self._client.delete([key]))
        if not chunks:
            return False
        came = bytearray(CANARY_BYTES)
        if not _copy(chunks[0], memoryview(came)) or came != content:
            raise Unsupported("an object does not come back as it was stored")
        return True

    def _disable(self, why: Exception) -> None:
        if self._why_off is None:
            self._why_off = str(why) or type(why).__name__
            logger.error("the Kvasir adapter is off: %s", self._why_off)

    def _defect(self, error: Exception) -> None:
        """A thread of ours failed, as none should."""
        if self._why_off is None:
            logger.error("a task failed", exc_info=error)
        self._disable(error)

    # The daemon.

    @property
    def _rests(self) -> bool:
        return self._why_off is not None or self._breaker.rests

    def _call(self, call: Callable[[], Answer]) -> Answer | None:
        """What the daemon answers; `None` where it does not, and as long as it is left alone."""
        begun = time.monotonic()
        if self._rests:
            return None
        try:
            answer = call()
        except OSError as error:
            self._failed(begun, str(error))
            return None
        except (Error, ValueError) as error:
            # It has no room, or does not take this one.
            logger.warning("the Kvasir daemon refuses: %s", error)
            return None
        self._answered()
        return answer

    def _failed(self, begun: float, why: str) -> None:
        if self._breaker.failed(begun) and self._is_open:
            logger.warning("the Kvasir daemon fails, and is left alone for a while: %s", why)

    def _answered(self) -> None:
        if self._breaker.succeeded():
            logger.info("the Kvasir daemon answers again")

    def _put(self, key: bytes, names: Names, data: Any) -> bool | None:
        durable = self._options["durable"]
        return self._call(lambda: self._client.put(key, names.layout, data, durable=durable))

    def _get(self, keys: list[bytes], timeout: float) -> list[Chunk] | None:
        return self._call(lambda: self._client.get(keys, timeout=timeout))

    def _named(self, geometry: Geometry) -> Names:
        with self._lock:
            if geometry not in self._names:
                self._names[geometry] = Names(geometry, self._options["weights"])
            return self._names[geometry]

    def _finder(self, geometry: Geometry, names: Names) -> SlotCache:
        """Tells of each name whether it is there, where a client counts the leading ones."""
        with self._lock:
            if geometry not in self._finders:
                self._finders[geometry] = SlotCache(
                    self._options["endpoint"],
                    names.namespace,
                    # Of memory that nothing is loaded into, and which takes none.
                    mmap.mmap(-1, names.bytes),
                    lookup_timeout=self._options["lookup_timeout"],
                    cooldown=self._options["cooldown"],
                )
            return self._finders[geometry]

    # What LMCache polls for.

    def get_store_event_fd(self) -> int:
        return self._stores.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fileno()

    def get_load_event_fd(self) -> int:
        return self._loads.fileno()

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return {
            task.number: L2StoreResult(None not in task.moved, sum(filter(None, task.moved)))
            for task in self._stores.all_ended()
        }

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return _bitmap(self._lookups.ended(task_id))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return _bitmap(self._loads.ended(task_id))

    # What is there.

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        return self._lookups.begin(keys, [self._wanted(keys, group_layout_descs)])

    @harmless(logger, default=[])
    def _wanted(
        self, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]
    ) -> list[tuple[int, Geometry]]:
        groups = {group: geometry(it.shapes, it.dtypes) for group, it in layouts.items()}
        wanted = []
        for at, key in enumerate(keys):
            if (looks := groups.get(key.object_group_id)) is not None:
                self._seen[_place(key)] = looks
                wanted.append((at, looks))
        return wanted

    def _look_up(self, task: Task, wanted: list[tuple[int, Geometry]]) -> None:
        """One call for all keys whose objects look alike."""
        for looks in {looks for _, looks in wanted}:
            if self._rests:
                return
            finder, begun = self._finder(looks, self._named(looks)), time.monotonic()
            if finder.rests:
                return
            alike = [at for at, it in wanted if it == looks]
            found = finder.find([Names.name(task.keys[at]) for at in alike])
            if finder.rests:
                return self._failed(begun, "a lookup was not answered")
            self._answered()
            for at, is_there in zip(alike, found, strict=True):
                task.moved[at] = 0 if is_there else None

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing is locked: what is evicted before it is loaded does not come."""

    # What is loaded.

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._loads.begin(keys, self._gets(objects))

    @harmless(logger, default=[])
    def _gets(self, objects: list[MemoryObj]) -> list[list[tuple[int, MemoryObj]]]:
        parts: list[list[tuple[int, MemoryObj]]] = []
        size = GET_BYTES
        for at, it in enumerate(objects):
            if size + it.get_size() > GET_BYTES:
                parts.append([])
                size = 0
            parts[-1].append((at, it))
            size += it.get_size()
        return parts

    def _load(self, task: Task, wanted: list[tuple[int, MemoryObj]]) -> None:
        until = time.monotonic() + self._options["load_timeout"]
        for _ in range(GETS):
            left = until - time.monotonic()
            if not wanted or left <= 0:
                return
            keys = [self._named(_looks(it)).key(task.keys[at]) for at, it in wanted]
            if (chunks := self._get(keys, left)) is None:
                return
            for (at, it), chunk in zip(wanted, chunks, strict=False):
                if _copy(chunk, it.byte_array):
                    task.moved[at] = it.get_size()
            # A get ends where one is missing, or was lost; what is behind that may be there.
            wanted = wanted[len(chunks) + 1 :]

    def _settle_load(self, task: Task) -> None:
        if came := [task.keys[at] for at, _ in task.done()]:
            self._notify_keys_accessed(came)

    # What is stored.

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        parts, holds = self._lend(objects)
        return self._stores.begin(keys, parts, holds)

    @harmless(logger, default=([], 0))
    def _lend(self, objects: list[MemoryObj]) -> tuple[list[list[tuple[int, MemoryObj]]], int]:
        """The last ones are left out where stores would hold more than `store_buffer`."""
        parts: list[list[tuple[int, MemoryObj]]] = []
        holds = 0
        with self._lock:
            room = 0 if self._rests else self._options["store_buffer"] - self._held
            for at, it in enumerate(objects):
                if holds + it.get_size() > room:
                    break
                holds += it.get_size()
                parts.append([(at, it)])
            self._held += holds
        return parts, holds

    def _store(self, task: Task, wanted: list[tuple[int, MemoryObj]]) -> None:
        ((at, it),) = wanted
        key, looks = task.keys[at], _looks(it)
        names, data = self._named(looks), it.byte_array
        is_new = None
        if self._seen.setdefault(_place(key), looks) == looks and len(data) == names.bytes:
            is_new = self._put(names.key(key), names, data)
        elif not self._has_serde:
            self._has_serde = True
            logger.error("objects that are not as they are looked up are not stored: take no serde")
        if is_new is None:
            # Those behind it would not be found without it.
            task.is_cut = True
        else:
            task.moved[at] = len(data) if is_new else 0

    def _settle_store(self, task: Task) -> None:
        with self._lock:
            self._held -= task.holds
        if stored := [(task.keys[at], moved) for at, moved in task.done() if moved]:
            self._notify_keys_stored([key for key, _ in stored], [size for _, size in stored])

    # The rest.

    @harmless(logger, default=None)
    def delete(self, keys: list[ObjectKey]) -> None:
        """Waits, as LMCache has it."""
        until = time.monotonic() + TASK_SECONDS
        for key in keys:
            if (looks := self._seen.get(_place(key))) is None:
                continue
            chunk, names = [self._named(looks).key(key)], self._named(looks)
            deleted = self._call(lambda: self._client.delete(chunk))
            if deleted:
                self._notify_keys_deleted([key], [names.bytes])
            if deleted is None or time.monotonic() > until:
                if self._why_off is None:
                    logger.warning("not all objects were deleted that LMCache wanted to be")
                return

    def report_status(self) -> dict[str, Any]:
        """A daemon that is down is no ailment of LMCache."""
        return {
            "is_healthy": True,
            "type": type(self).__name__,
            "why_off": self._why_off,
            "rests": self._rests,
            "bytes_being_stored": self._held,
        }

    def close(self) -> None:
        """Ends by the timeouts of what is under way."""
        for tasks in (self._lookups, self._loads, self._stores):
            tasks.close()
        for finder in self._finders.values():
            finder.close()


def _place(key: ObjectKey) -> tuple[str, int, int]:
    return key.model_name, key.kv_rank, key.object_group_id


def _looks(memory: MemoryObj) -> Geometry:
    return geometry(memory.get_shapes(), memory.get_dtypes())


def _copy(chunk: Chunk, memory: memoryview) -> bool:
    """Whether it is as large as that. It has come whole."""
    (data,) = chunk.layers
    if len(data) != memory.nbytes:
        return False
    # Without the GIL, which a slice of a view would hold.
    source = numpy.frombuffer(memoryview(data), numpy.uint8)
    numpy.copyto(numpy.frombuffer(memory, numpy.uint8), source)
    return True


def _bitmap(task: Task | None) -> Bitmap | None:
    if task is None:
        return None
    bitmap = Bitmap(len(task.keys))
    for at, _ in task.done():
        bitmap.set(at)
    return bitmap
