"""The worker's side: blocks go into vLLM's memory and come out of it."""

from typing import TYPE_CHECKING

import torch

from kvasir import BlockCache
from kvasir.vllm import layout
from kvasir.vllm._hooks import logger
from kvasir.vllm.memory import (
    Direct,
    LoadingBetweenSteps,
    LoadingByLayer,
    Memory,
    Saving,
    Staged,
    ended,
)
from kvasir.vllm.scheduler import Blocks
from kvasir.vllm.stats import Counts, KvasirStats

if TYPE_CHECKING:
    from kvasir.vllm.layout import Geometry

# How long an engine that has nothing to compute waits for a load at a time.
IDLE_SECONDS = 0.002


class Worker:
    """With `staging`, bytes of host memory, KV goes by way of that: it is on a device, or has another
    form in chunks.
    """

    def __init__(
        self,
        cache: BlockCache,
        geometry: "Geometry",
        views: list[torch.Tensor],
        form: layout.Form,
        *,
        layerwise: bool,
        staging: int | None,
    ) -> None:
        self._layers = {name: index for index, name in enumerate(geometry.layers)}
        self._layerwise = layerwise
        self._memory: Memory = (
            Direct(cache, views)
            if staging is None
            else Staged(cache, geometry, views, staging, form.places)
        )
        layout.canary(self._memory, views, form)
        self.answers = layout.round_trip(self._memory, cache, views, form)
        # Loads between steps, by request.
        self._loading: dict[str, tuple[LoadingBetweenSteps, Blocks]] = {}
        # Loads that the step which runs waits for, layer by layer.
        self._awaited: list[tuple[LoadingByLayer, Blocks]] = []
        # Blocks that the step which runs computes.
        self._saving: list[Saving] | None = None
        self._blocks = {"blocks_loaded": 0, "blocks_failed": 0}
        self._counts = Counts()
        self._failed: set[int] = set()

    def start_load(self, wanted: Blocks) -> None:
        if self._layerwise:
            load = self._memory.load_layers(wanted.names, wanted.blocks)
            self._awaited.append((load, wanted))
        else:
            load = self._memory.load(wanted.names, wanted.blocks)
            self._loading[wanted.request] = (load, wanted)

    def wait_layer(self, name: str) -> None:
        """Waits for a layer's blocks, until their load gives up if they do not come."""
        # One that has no blocks of its own uses those of any other.
        layer = self._layers.get(name, len(self._layers) - 1)
        for load, _ in self._awaited:
            load.wait_layer(layer)

    def save_layer(self, name: str, stores: list[Blocks]) -> None:
        """Copies what a step has just computed of a layer."""
        if self._layerwise and name in self._layers:
            for it in self._begin_saving(stores):
                it.layer(self._layers[name])

    def end_step(self, stores: list[Blocks]) -> None:
        """All that the step computed is there, and may be overwritten behind this."""
        # What was computed behind blocks that did not come is not what it should be.
        is_whole = self._end_awaited()
        saving = self._begin_saving(stores)
        self._saving = None
        for it in saving:
            if is_whole:
                it.end()
            else:
                it.drop()

    def _begin_saving(self, stores: list[Blocks]) -> list[Saving]:
        if self._saving is None:
            self._saving = [self._memory.save(it.names, it.blocks, it.parent) for it in stores]
        return self._saving

    def _end_awaited(self) -> bool:
        """Whether all came whole that the step has waited for."""
        is_whole = True
        for load, wanted in self._awaited:
            came = 0
            try:
                came = ended(load)
            except Exception:
                logger.exception("a load failed")
            self._count(came, wanted)
            is_whole = is_whole and came == len(wanted.blocks)
        self._awaited.clear()
        return is_whole

    def take_failed(self) -> set[int]:
        """Blocks of loads that have ended, which are to be computed."""
        failed, self._failed = self._failed, set()
        return failed

    def take_over(self, is_idle: bool) -> set[str]:
        """Requests whose loads have ended; waits a moment for one where there is nothing else to
        do, or vLLM would ask again and again, on a core that loads could use.
        """
        over = set()
        if is_idle and self._loading:
            load, _ = next(iter(self._loading.values()))
            load.wait(IDLE_SECONDS)
        for request, (load, wanted) in list(self._loading.items()):
            if (came := load.poll()) is not None:
                del self._loading[request]
                self._count(came, wanted)
                over.add(request)
        return over

    def _count(self, came: int, wanted: Blocks) -> None:
        """Notes how many of a load's leading blocks are whole; the others are to be computed."""
        self._failed.update(wanted.blocks[came:])
        self._blocks["blocks_loaded"] += came
        self._blocks["blocks_failed"] += len(wanted.blocks) - came

    def stats(self) -> KvasirStats | None:
        return self._counts.since(self._memory.stats() | self._blocks)

    def close(self, timeout: float) -> None:
        """What waits to be stored has a moment to be; loads end by themselves."""
        self._memory.flush(timeout)
