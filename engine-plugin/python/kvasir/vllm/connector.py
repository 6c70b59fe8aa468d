"""vLLM's connector to a Kvasir daemon.

The scheduler asks what is cached (`BlockCache.find`), the worker loads and stores it. Blocks are
loaded between steps, by threads that do not hold the GIL, or on request while the step runs that
needs them, each layer until it is its turn (`layerwise`). They are copied out of the engine's
memory before a step ends, so that no block is ever held for the cache's sake.

Whatever becomes of the daemon, requests are answered as without it: what is not found is
computed, what was found and does not come is reported as failed, and computed
(`kv_load_failure_policy: recompute`). A daemon that fails costs its timeouts once, and is then
left alone for a while.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvasir import BlockCache, Load
from kvasir._identity import Unsupported, adapter
from kvasir.vllm import layout
from kvasir.vllm._hooks import harmless, logger
from kvasir.vllm.stats import COUNTERS, KvasirMetrics, KvasirStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# How long an engine that ends waits for blocks to be stored.
SHUTDOWN_SECONDS = 5.0

# How long one call waits for a load that has been late already.
PATIENCE_SECONDS = 1.0


@dataclass
class Blocks:
    """Blocks of a request, by name and by where they are."""

    request: str
    names: list[bytes]
    blocks: list[int]
    # Name of the block before them.
    parent: bytes | None = None


@dataclass
class Work(KVConnectorMetadata):
    """What a step has the worker do."""

    loads: list[Blocks] = field(default_factory=list)
    stores: list[Blocks] = field(default_factory=list)


@dataclass
class Tracked:
    """A request that is running, as the scheduler's side sees it."""

    request: "Request"
    blocks: list[int] = field(default_factory=list)
    # Leading blocks that need not be stored: they came from a cache, or have been stored.
    stored: int = 0


@dataclass
class Findings(KVConnectorWorkerMetadata):
    """What workers tell the scheduler."""

    is_off: bool

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Findings":
        assert isinstance(other, Findings)
        return Findings(self.is_off or other.is_off)


class _Elsewhere(Exception):
    """What has been said already, where it was found."""


class KvasirConnector(KVConnectorBase_V1, SupportsHMA):
    """Options, in `kv_connector_extra_config`: `endpoint` (127.0.0.1:7420); `lookup_timeout`,
    `load_timeout` and `cooldown`, in seconds; `store_buffer`, in bytes; `durable`; `layerwise`;
    `min_tokens`, below which nothing is looked for.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._cache: BlockCache | None = None
        self._tracked: dict[str, Tracked] = {}
        self._wanted: list[Blocks] = []
        # Of requests that were asked for: where what was found begins.
        self._found: dict[str, int] = {}
        self._loading: dict[str, tuple[Load, Blocks]] = {}
        # Loads that the step which runs waits for, layer by layer.
        self._awaited: list[tuple[Load, Blocks]] = []
        # Requests whose loads have ended.
        self._over: set[str] = set()
        self._failed: set[int] = set()
        self._blocks = {"blocks_loaded": 0, "blocks_failed": 0}
        # What was counted when that was asked last.
        self._counted: dict[str, int] = {}
        option = self._kv_transfer_config.get_from_extra_config
        self._min_tokens = int(option("min_tokens", 0))
        self._layerwise = bool(option("layerwise", False))
        try:
            if self._kv_transfer_config.kv_load_failure_policy != "recompute":
                raise Unsupported(
                    'what fails to load would fail its request: set "kv_load_failure_policy": "recompute"'
                )
            self._geometry = layout.geometry(kv_cache_config)
            self._cache = self._open(vllm_config, option)
        except Unsupported as error:
            self._disable(error)

    def _open(self, config: "VllmConfig", option: Any) -> BlockCache:
        rank = 0
        if self.role == KVConnectorRole.WORKER:
            rank = config.parallel_config.rank
        limits = {
            name: kind(value)
            for name, kind in [
                ("lookup_timeout", float),
                ("load_timeout", float),
                ("cooldown", float),
                ("store_buffer", int),
                ("durable", bool),
            ]
            if (value := option(name, None)) is not None
        }
        namespace = layout.namespace(config, self._geometry, rank)
        self._namespace = namespace.digest.hex()
        return BlockCache(option("endpoint", "127.0.0.1:7420"), namespace, **limits)

    def _disable(self, why: Exception) -> None:
        if self._cache is not None or not isinstance(why, _Elsewhere):
            logger.error("the Kvasir cache is off: %s", why)
        self._cache = None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of the whole step would not wait for a layer."""
        return bool(extra_config.get("layerwise", False))

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose what it was given."""
        return False

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._tracked.pop(request.request_id, None)
        self._found.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # The scheduler's side.

    @harmless(default=(0, False))
    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._cache is None or request.num_tokens < self._min_tokens:
            return 0, False
        size = self._geometry.layout.tokens
        first = num_computed_tokens // size
        # The last token is computed in any case: its logits are wanted.
        names = _names(request, first, (request.num_tokens - 1) // size)
        if num_computed_tokens % size or not names:
            return 0, False
        found = self._cache.find(names)
        self._found[request.request_id] = first
        return found * size, found > 0 and not self._layerwise

    @harmless(default=None)
    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        if self._cache is None:
            return
        self._tracked.setdefault(request.request_id, Tracked(request))
        if num_external_tokens == 0:
            return
        table = blocks.get_block_ids()[0]
        wanted = Blocks(request.request_id, [], table)
        # vLLM waits for it from now on, whatever comes next: without names it fails.
        self._wanted.append(wanted)
        first = self._found[request.request_id]
        end = first + num_external_tokens // self._geometry.layout.tokens
        wanted.names = _names(request, first, end)
        wanted.blocks = table[first:end]

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Work:
        work = Work(loads=self._wanted)
        self._wanted = []
        if self._cache is not None:
            self._plan_stores(scheduler_output, work.stores)
        return work

    @harmless(default=None)
    def _plan_stores(
        self, scheduled: "SchedulerOutput", stores: list[Blocks]
    ) -> None:
        for new in scheduled.scheduled_new_reqs:
            self._place(new.req_id, new.block_ids, new.num_computed_tokens)
            self._plan(scheduled, new.req_id, new.num_computed_tokens, stores)
        cached = scheduled.scheduled_cached_reqs
        for request, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request in cached.resumed_req_ids:
                self._place(request, blocks or ([],), computed)
            elif blocks and request in self._tracked:
                self._tracked[request].blocks.extend(blocks[0])
            self._plan(scheduled, request, computed, stores)

    def _place(
        self, request: str, blocks: tuple[list[int], ...], computed: int
    ) -> None:
        """Notes where a request's blocks are, of which the computed ones are not to be stored."""
        if tracked := self._tracked.get(request):
            tracked.blocks = list(blocks[0])
            tracked.stored = computed // self._geometry.layout.tokens

    def _plan(
        self, scheduled: "SchedulerOutput", request: str, computed: int, stores: list[Blocks]
    ) -> None:
        """Has blocks stored that are full when this step has run."""
        tracked = self._tracked.get(request)
        if tracked is None:
            return
        # What failed to load is computed, and stored, like what comes behind it.
        tracked.stored = min(tracked.stored, computed // self._geometry.layout.tokens)
        tokens = computed + scheduled.num_scheduled_tokens.get(request, 0)
        # Tokens that are guessed have no hash yet.
        end = min(
            tokens // self._geometry.layout.tokens,
            len(tracked.request.block_hashes),
            len(tracked.blocks),
        )
        first = tracked.stored
        if end <= first:
            return
        names = _names(tracked.request, max(first - 1, 0), end)
        parent = names.pop(0) if first > 0 else None
        stores.append(Blocks(request, names, tracked.blocks[first:end], parent))
        tracked.stored = end

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, Findings) and found.is_off:
            self._disable(_Elsewhere("a worker cannot use it"))

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._cache is None:
            return
        try:
            views = layout.register(self._cache, self._geometry, kv_caches)
            if layout.round_trip(self._cache, self._geometry, views):
                # `kvasir-index` needs the namespace.
                logger.info(
                    "the Kvasir cache is on: a block came back as it was stored; namespace %s",
                    self._namespace,
                )
            else:
                logger.warning("no Kvasir daemon answers: going on without until one does")
        except Exception as error:
            self._disable(error)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        for wanted in self._work().loads:
            try:
                if self._cache is None:
                    raise _Elsewhere("the cache is off")
                load = self._cache.load(wanted.names, wanted.blocks)
            except Exception as error:
                self._disable(error)
                self._count(0, wanted)
                if not self._layerwise:
                    self._over.add(wanted.request)
            else:
                if self._layerwise:
                    self._awaited.append((load, wanted))
                else:
                    self._loading[wanted.request] = (load, wanted)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Waits for a layer's blocks, until their load gives up if they do not come."""
        if not self._awaited:
            return
        layers = self._geometry.layers
        # One that has no blocks of its own uses those of any other.
        layer = layers.index(layer_name) if layer_name in layers else len(layers) - 1
        for load, _ in self._awaited:
            load.wait_layer(layer)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: "AttentionMetadata",
        **kwargs: Any,
    ) -> None:
        """Blocks are stored when a step has computed all of their layers."""

    @harmless(default=None)
    def wait_for_save(self) -> None:
        is_whole = self._end_awaited()
        # What was computed behind blocks that did not come is not what it should be.
        if self._cache is None or not is_whole:
            return
        for full in self._work().stores:
            self._cache.store(full.names, full.blocks, parent=full.parent)

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        for request, (load, wanted) in list(self._loading.items()):
            if (came := load.poll()) is not None:
                del self._loading[request]
                self._count(came, wanted)
                self._over.add(request)
        over, self._over = self._over, set()
        return None, over or None

    def _end_awaited(self) -> bool:
        """Whether all came whole that the step has waited for."""
        is_whole = True
        for load, wanted in self._awaited:
            # The blocks are the load's until it has ended, which its own deadlines see to.
            while (came := load.wait(PATIENCE_SECONDS)) is None:
                pass
            self._count(came, wanted)
            is_whole = is_whole and came == len(wanted.blocks)
        self._awaited.clear()
        return is_whole

    def _count(self, came: int, wanted: Blocks) -> None:
        """Notes how many of a load's leading blocks are whole; the others are to be computed."""
        self._failed.update(wanted.blocks[came:])
        self._blocks["blocks_loaded"] += came
        self._blocks["blocks_failed"] += len(wanted.blocks) - came

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def build_connector_worker_meta(self) -> "Findings | None":
        return Findings(is_off=True) if self._cache is None else None

    def get_kv_connector_stats(self) -> KvasirStats | None:
        if self._cache is None:
            return None
        now = self._cache.stats() | self._blocks
        since = {name: now[name] - self._counted.get(name, 0) for name in COUNTERS}
        self._counted = now
        stats = KvasirStats(since)
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KvasirStats:
        return KvasirStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> KvasirMetrics:
        return KvasirMetrics(*arguments)

    def shutdown(self) -> None:
        """What waits to be stored has a moment to be; loads end by themselves."""
        if self._cache is not None and self.role == KVConnectorRole.WORKER:
            self._cache.flush(SHUTDOWN_SECONDS)

    def _work(self) -> Work:
        work = self._connector_metadata
        return work if isinstance(work, Work) else Work()


def _names(request: "Request", first: int, end: int) -> list[bytes]:
    """Of a request's blocks: vLLM's hashes, which tell of all tokens up to the block's last one,
    of salt, images, and the name of an adapter, and behind them which adapter has that name.
    """
    hashes = request.block_hashes[first:end]
    if request.lora_request is None:
        return [bytes(it) for it in hashes]
    which = adapter(request.lora_request.lora_path)
    return [bytes(it) + which for it in hashes]
