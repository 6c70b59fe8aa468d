"""Where a worker's KV is, and how blocks go in and out of it."""

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvasir import BlockCache
from kvasir._identity import Unsupported
from kvasir.vllm._hooks import logger

if TYPE_CHECKING:
    from kvasir.vllm.layout import Geometry

# Parts of the staging memory: each belongs to one load or store.
PARTS = 8

# How long one call waits for a load that has been late already.
PATIENCE_SECONDS = 1.0

# How long a load waits for a free part: others have theirs until their own deadlines.
PART_SECONDS = 10.0

# How often it is looked whether a device has got somewhere.
PASS_SECONDS = 0.0005

# Loads at once. The others leave parts to stores.
LOADS = 4


class Loading(Protocol):
    """Blocks on their way in."""

    def wait(self, timeout: float) -> int | None:
        """How many leading blocks have come whole, once nothing more comes."""


class LoadingBetweenSteps(Loading, Protocol):
    def poll(self) -> int | None:
        """As `wait`, without waiting."""


class LoadingByLayer(Loading, Protocol):
    def wait_layer(self, layer: int) -> bool:
        """Waits until a layer of all blocks is there: false if it will not be."""


class Saving(Protocol):
    """Blocks on their way out."""

    def layer(self, layer: int) -> None:
        """Takes a layer of all blocks, which may be overwritten behind this."""

    def end(self) -> object:
        """Takes the layers that were not, and has the blocks stored."""

    def drop(self) -> None:
        """Forgets them."""


class Memory(Protocol):
    """KV of all layers, in blocks."""

    def load(self, names: list[bytes], blocks: list[int]) -> LoadingBetweenSteps: ...
    def load_layers(self, names: list[bytes], blocks: list[int]) -> LoadingByLayer: ...
    def save(self, names: list[bytes], blocks: list[int], parent: bytes | None) -> Saving: ...
    def read(self, block: int) -> bytes:
        """A block, as it is stored."""

    def write(self, block: int, chunk: bytes) -> None:
        """Writes a block."""

    def flush(self, timeout: float) -> bool:
        """Waits until nothing waits to be stored; false after `timeout` seconds."""

    def stats(self) -> dict[str, int]: ...


class Direct:
    """Memory of the host: blocks are read and written where they are."""

    def __init__(self, cache: BlockCache, views: list[torch.Tensor]) -> None:
        first = views[0]
        size = first.element_size()
        starts = {view.storage_offset() * size for view in views}
        cache.register(
            [_bytes(view, 0 if len(starts) > 1 else None) for view in views],
            blocks=first.shape[0],
            block=first.stride(0) * size,
            plane=0,
            head=first.stride(1) * size,
            token=first.stride(2) * size,
            start=starts.pop() if len(starts) == 1 else 0,
        )
        self._cache = cache
        self.load = self.load_layers = cache.load
        self.read, self.write = cache.read, cache.write
        self.flush, self.stats = cache.flush, cache.stats

    def save(self, names: list[bytes], blocks: list[int], parent: bytes | None) -> Saving:
        return self._cache.save(names, blocks, parent=parent)


def _bytes(view: torch.Tensor, offset: int | None):
    """The memory of a tensor, from its beginning on or from that of its storage."""
    storage = view.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)
    if offset is None:
        return raw.numpy()
    return raw[view.storage_offset() * view.element_size() :].numpy()


class Staged:
    """Memory of a device: blocks go by way of memory of the host, which is pinned. With `places`, by
    layer, each element is put where those say.

    That memory is in parts. A load or a store takes a free one for as many blocks as it holds, and another
    for the next. Loads that find none wait; stores that find none are left out, because the
    engine would wait. Blocks leave the device in a stream of their own, for which the engine's
    waits before it computes the next step, so that none is overwritten before.
    """

    def __init__(
        self,
        cache: BlockCache,
        geometry: "Geometry",
        views: list[torch.Tensor],
        size: int,
        places: list[torch.Tensor] | None = None,
    ) -> None:
        layout, first = geometry.layout, views[0]
        self.part_blocks = size // layout.chunk_bytes // PARTS
        if self.part_blocks == 0:
            needed = layout.chunk_bytes * PARTS
            raise Unsupported(f'"staging" of {size} bytes is too small: it takes {needed}')
        self.cache, self.views = cache, views
        self.device = torch.get_device_module(first.device)
        self._is_device = first.device.type != "cpu"
        self.staged = torch.empty(
            (layout.layers, PARTS * self.part_blocks, first[0].numel()),
            dtype=first.dtype,
            pin_memory=self._is_device,
        )
        row = geometry.content // (1 if places is None else 2) * first.element_size()
        cache.register(
            [_bytes(it, 0) for it in self.staged],
            blocks=self.staged.shape[1],
            block=first[0].numel() * first.element_size(),
            plane=layout.kv_heads * layout.tokens * row,
            head=layout.tokens * row,
            token=row,
        )
        self._gather = self._scatter = None
        if places is not None:
            self._gather = [it.to(first.device) for it in places]
            self._scatter = [it.argsort().to(first.device) for it in places]
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for part in range(PARTS):
            self.free.put(part)
        self.out, self.into = self.device.Stream(), self.device.Stream()
        self._stores = self._threads("kvasir-store", 1)
        self._loads = self._threads("kvasir-load", LOADS)
        self._lock = threading.Lock()
        self._waiting = self._dropped = 0

    def _threads(self, name: str, count: int) -> ThreadPoolExecutor:
        """In order, where it is one."""
        device = self.views[0].device
        return ThreadPoolExecutor(
            count, name, initializer=self.device.set_device, initargs=(device,)
        )

    def slots(self, part: int, count: int) -> list[int]:
        begin = part * self.part_blocks
        return list(range(begin, begin + count))

    def places(self, blocks: list[int]) -> torch.Tensor:
        # From memory that is not pinned, a copy would wait for all that the device has to do.
        places = torch.tensor(blocks, dtype=torch.int64, pin_memory=self._is_device)
        return places.to(self.views[0].device, non_blocking=True)

    @torch.inference_mode()
    def take(self, layer: int, part: int, places: torch.Tensor) -> None:
        """Copies a layer of blocks out, in the stream of the moment."""
        begin = part * self.part_blocks
        staged = self.staged[layer, begin : begin + len(places)]
        blocks = self.views[layer].index_select(0, places).flatten(1)
        if self._gather is not None:
            blocks = blocks.gather(1, self._gather[layer].expand(len(places), -1))
        staged.copy_(blocks, non_blocking=True)

    @torch.inference_mode()
    def bring(self, layer: int, part: int, places: torch.Tensor) -> None:
        """Copies a layer of blocks in, in the stream of the moment."""
        begin = part * self.part_blocks
        staged = self.staged[layer, begin : begin + len(places)]
        blocks = staged.to(self.views[layer].device, non_blocking=True)
        if self._scatter is not None:
            blocks = blocks.gather(1, self._scatter[layer].expand(len(places), -1))
        self.views[layer].index_copy_(0, places, blocks.view(-1, *self.views[layer].shape[1:]))

    def mark(self, stream: object) -> "torch.Event":
        """Passes when all has that was begun in a stream."""
        event = self.device.Event()
        event.record(stream)
        return event

    def read(self, block: int) -> bytes:
        part, places = self.free.get(timeout=PART_SECONDS), self.places([block])
        for layer in range(len(self.views)):
            self.take(layer, part, places)
        self.device.synchronize()
        chunk = self.cache.read(self.slots(part, 1)[0])
        self.free.put(part)
        return chunk

    def write(self, block: int, chunk: bytes) -> None:
        part, places = self.free.get(timeout=PART_SECONDS), self.places([block])
        self.cache.write(self.slots(part, 1)[0], chunk)
        for layer in range(len(self.views)):
            self.bring(layer, part, places)
        self.device.synchronize()
        self.free.put(part)

    def load_layers(self, names: list[bytes], blocks: list[int]) -> LoadingByLayer:
        return _LoadingLayers(self, names, blocks)

    def load(self, names: list[bytes], blocks: list[int]) -> LoadingBetweenSteps:
        # The blocks were others', who may still use them on the device.
        ready = self.mark(self.device.current_stream())
        return _LoadingParts(self._loads.submit(self._load, names, blocks, ready))

    def _load(self, names: list[bytes], blocks: list[int], ready: "torch.Event") -> int:
        came = 0
        try:
            ready.wait(self.into)
            for begin in range(0, len(blocks), self.part_blocks):
                end = min(begin + self.part_blocks, len(blocks))
                whole = self._load_part(names[begin:end], blocks[begin:end])
                came += whole
                if whole < end - begin:
                    break
        except Exception:
            logger.exception("a load failed")
        return came

    def _load_part(self, names: list[bytes], blocks: list[int]) -> int:
        part = self.free.get(timeout=PART_SECONDS)
        try:
            load = self.cache.load(names, self.slots(part, len(blocks)))
            came = ended(load)
            with self.device.stream(self.into):
                places = self.places(blocks[:came])
                for layer in range(len(self.views)):
                    self.bring(layer, part, places)
            _pass(self.mark(self.into))
        finally:
            self.free.put(part)
        return came

    def save(self, names: list[bytes], blocks: list[int], parent: bytes | None) -> Saving:
        return _SavingParts(self, names, blocks, parent)

    def note_dropped(self, blocks: int) -> None:
        with self._lock:
            self._dropped += blocks

    def behind(self, event: "torch.Event", part: int, names: list[bytes], parent: bytes | None) -> None:
        """Has a part stored, and freed, once an event has passed."""
        with self._lock:
            self._waiting += 1
        self._stores.submit(self._store, event, part, names, parent)

    def _store(self, event: "torch.Event", part: int, names: list[bytes], parent: bytes | None) -> None:
        try:
            _pass(event)
            if names:
                self.cache.store(names, self.slots(part, len(names)), parent=parent)
        except Exception:
            logger.exception("a store failed")
        finally:
            self.free.put(part)
            with self._lock:
                self._waiting -= 1

    def flush(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        while self._waiting:
            if time.monotonic() >= until:
                return False
            time.sleep(0.001)
        return self.cache.flush(max(0.0, until - time.monotonic()))

    def stats(self) -> dict[str, int]:
        stats = self.cache.stats()
        stats["stores_dropped"] += self._dropped
        return stats


def _pass(event: "torch.Event") -> None:
    """Waits for an event. To be told of it, a thread would keep a core busy."""
    while not event.query():
        time.sleep(PASS_SECONDS)


def ended(load: Loading) -> int:
    """Memory is the load's until it has ended, which its own deadlines see to."""
    while (came := load.wait(PATIENCE_SECONDS)) is None:
        pass
    return came


class _LoadingParts:
    """Brought by a thread, part by part."""

    def __init__(self, future: "Future[int]") -> None:
        self._future = future

    def poll(self) -> int | None:
        return self._future.result() if self._future.done() else None

    def wait(self, timeout: float) -> int | None:
        try:
            return self._future.result(timeout)
        except NotYet:
            return None

@dataclass
class _Part:
    """Blocks in a part of the staging memory."""

    part: int
    names: list[bytes]
    places: torch.Tensor
    parent: bytes | None = None
    load: Loading | None = None
    # Layers that were copied.
    layers: int = 0


class _Parts:
    """Blocks in as many parts as are free."""

    def __init__(
        self, memory: Staged, names: list[bytes], blocks: list[int], parent: bytes | None
    ) -> None:
        self._memory = memory
        self._parts: list[_Part] = []
        for begin in range(0, len(blocks), memory.part_blocks):
            end = min(begin + memory.part_blocks, len(blocks))
            try:
                part = memory.free.get_nowait()
            except queue.Empty:
                break
            places = memory.places(blocks[begin:end])
            self._parts.append(_Part(part, names[begin:end], places, parent))
            parent = names[end - 1]
        self._left = len(blocks) - sum(len(it.names) for it in self._parts)


class _LoadingLayers(_Parts):
    """Brought by the step that needs them, layer by layer, in its own stream."""

    def __init__(self, memory: Staged, names: list[bytes], blocks: list[int]) -> None:
        super().__init__(memory, names, blocks, None)
        for it in self._parts:
            it.load = memory.cache.load(it.names, memory.slots(it.part, len(it.names)))

    def wait_layer(self, layer: int) -> bool:
        for it in self._parts:
            while it.layers <= layer and it.load.wait_layer(it.layers):
                self._memory.bring(it.layers, it.part, it.places)
                it.layers += 1
        return self._left == 0 and all(it.layers > layer for it in self._parts)

    def wait(self, timeout: float) -> int | None:
        whole, is_whole = 0, True
        event = self._memory.mark(self._memory.device.current_stream())
        for it in self._parts:
            came = ended(it.load)
            # Of a part that came short, no layer need be there of all that did come.
            is_whole = is_whole and came == len(it.names) and it.layers == len(self._memory.views)
            whole += came if is_whole else 0
            self._memory.behind(event, it.part, [], None)
        self._parts = []
        return whole


class _SavingParts(_Parts):
    """Taken in a stream of their own, and stored by a thread."""

    def __init__(
        self, memory: Staged, names: list[bytes], blocks: list[int], parent: bytes | None
    ) -> None:
        super().__init__(memory, names, blocks, parent)
        memory.note_dropped(self._left)

    def layer(self, layer: int) -> None:
        memory = self._memory
        if not self._parts:
            return
        memory.mark(memory.device.current_stream()).wait(memory.out)
        with memory.device.stream(memory.out):
            for it in self._parts:
                if it.layers == layer:
                    memory.take(layer, it.part, it.places)
                    it.layers += 1

    def end(self) -> None:
        for layer in range(len(self._memory.views)):
            self.layer(layer)
        self._close(is_stored=True)

    def drop(self) -> None:
        self._close(is_stored=False)

    def _close(self, is_stored: bool) -> None:
        memory = self._memory
        event = memory.mark(memory.out)
        # Behind this the engine may overwrite them.
        event.wait(memory.device.current_stream())
        for it in self._parts:
            memory.behind(event, it.part, it.names if is_stored else [], it.parent)
        self._parts = []
