"""vLLM's connector to a Kvasir daemon.

The scheduler asks what is cached (`BlockCache.find`), the worker loads and stores it. Blocks are
loaded between steps, by threads that do not hold the GIL, or on request while the step runs that
needs them, each layer until it is its turn (`layerwise`). They are copied out of the engine's
memory before a step ends, or before the next one computes, so that no block is ever held for the
cache's sake.

Whatever becomes of the daemon, requests are answered as without it: what is not found is
computed, what was found and does not come is reported as failed, and computed
(`kv_load_failure_policy: recompute`). A daemon that fails costs its timeouts once, and is then
left alone for a while.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvasir import BlockCache
from kvasir._identity import Unsupported
from kvasir.vllm import layout
from kvasir.vllm._hooks import harmless, logger
from kvasir.vllm.events import Announcements
from kvasir.vllm.scheduler import Blocks, Scheduler, Work
from kvasir.vllm.stats import KvasirMetrics, KvasirStats
from kvasir.vllm.worker import Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# How long an engine that ends waits for blocks to be stored.
SHUTDOWN_SECONDS = 5.0

# Memory of the host that KV of a device goes by way of.
STAGING_BYTES = 1 << 30


@dataclass
class Findings(KVConnectorWorkerMetadata):
    """What workers tell the scheduler."""

    is_off: bool

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Findings":
        assert isinstance(other, Findings)
        return Findings(self.is_off or other.is_off)


@dataclass
class Arrangement(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler when the engine starts; nothing where the cache is off."""

    arrangement: str | None


class _Elsewhere(Exception):
    """What has been said already, where it was found."""


class KvasirConnector(KVConnectorBase_V1, SupportsHMA):
    """Options, in `kv_connector_extra_config`: `endpoint` (127.0.0.1:7420); `lookup_timeout`,
    `load_timeout` and `cooldown`, in seconds; `store_buffer` and `staging`, in bytes; `durable`;
    `layerwise`; `min_tokens`, below which nothing is looked for; `encoding`, a level.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        self._is_off = False
        self._pool: BlockPool | None = None
        # The side that this one is, once the engine's memory is known.
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._arrangement: str | None = None
        # Of loads that were not begun: requests, and blocks.
        self._over: set[str] = set()
        self._failed: set[int] = set()
        self._layerwise = bool(self._option("layerwise", False))
        try:
            if self._kv_transfer_config.kv_load_failure_policy != "recompute":
                raise Unsupported(
                    'what fails to load would fail its request: set "kv_load_failure_policy": "recompute"'
                )
            encoding = self._option("encoding", None)
            self._encoding = None if encoding is None else str(encoding)
            self._geometry = layout.geometry(kv_cache_config, as_it_is=encoding is None)
            self._spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        except Unsupported as error:
            self._disable(error)

    def _option(self, name: str, default: Any) -> Any:
        return self._kv_transfer_config.get_from_extra_config(name, default)

    def _open(self, rank: int, arrangement: str) -> BlockCache:
        limits = {
            name: kind(value)
            for name, kind in [
                ("lookup_timeout", float),
                ("load_timeout", float),
                ("cooldown", float),
                ("store_buffer", int),
                ("durable", bool),
            ]
            if (value := self._option(name, None)) is not None
        }
        namespace = layout.namespace(self._config, self._geometry, rank, arrangement)
        self._namespace = namespace.digest.hex()
        return BlockCache(
            self._option("endpoint", "127.0.0.1:7420"),
            namespace,
            encoding=self._encoding or "raw",
            **limits,
        )

    def _disable(self, why: Exception) -> None:
        if not self._is_off and not isinstance(why, _Elsewhere):
            logger.error("the Kvasir cache is off: %s", why)
        self._is_off = True

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of the whole step would not wait for a layer."""
        return bool(extra_config.get("layerwise", False))

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose what it was given."""
        return False

    # The scheduler's side.

    @property
    def _finder(self) -> Scheduler | None:
        return None if self._is_off else self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._pool = gpu_block_pool

    @harmless(default=None)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """What all ranks hold is looked for by what the first one calls it."""
        told = [it.arrangement for it in metadata.values() if isinstance(it, Arrangement)]
        if self._is_off or not told or None in told:
            self._disable(_Elsewhere("a worker cannot use it"))
            return
        cache = self._open(0, metadata[0, 0].arrangement)
        tokens = self._geometry.layout.tokens
        self._scheduler = Scheduler(
            cache,
            tokens,
            int(self._option("min_tokens", 0)),
            self._announcements(cache, tokens),
        )

    def _announcements(self, cache: BlockCache, tokens: int) -> Announcements | None:
        events = self._config.kv_events_config
        if events is None or not events.enable_kv_cache_events:
            return None
        return Announcements(cache.follow(), self._spec, tokens, self._pool)

    @harmless(default=(0, False))
    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if (scheduler := self._finder) is None:
            return 0, False
        found = scheduler.find(request, num_computed_tokens)
        return found, found > 0 and not self._layerwise

    @harmless(default=None)
    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Work:
        # Workers hear of all that was to be loaded, even if the cache is off since.
        work = Work(
            self._scheduler.take_wanted() if self._scheduler else [],
            is_idle=scheduler_output.total_num_scheduled_tokens == 0,
        )
        self._plan_stores(scheduler_output, work.stores)
        return work

    @harmless(default=None)
    def _plan_stores(self, scheduled: "SchedulerOutput", stores: list[Blocks]) -> None:
        if (scheduler := self._finder) is not None:
            scheduler.plan_stores(scheduled, stores)

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finished(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, Findings) and found.is_off:
            self._disable(_Elsewhere("a worker cannot use it"))

    @harmless(default=())
    def take_events(self) -> "Iterable[KVCacheEvent]":
        """Of what the daemon has, as medium `STORAGE`."""
        return [] if (scheduler := self._finder) is None else list(scheduler.events())

    def reset_cache(self) -> bool:
        """As vLLM asks when its weights have been changed in place."""
        if self._scheduler is not None:
            self._scheduler.reset()
            logger.info("vLLM has reset its caches: what Kvasir had is not used any more")
        return True

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._is_off:
            return
        try:
            views = layout.views(self._geometry, kv_caches)
            attention = self._config.compilation_config.static_forward_context
            form = layout.form(self._geometry, views, attention, self._encoding)
            staging = self._option("staging", None)
            if staging is None and (form.places is not None or views[0].device.type != "cpu"):
                staging = STAGING_BYTES
            self._worker = Worker(
                self._open(self._config.parallel_config.rank, form.name),
                self._geometry,
                views,
                form,
                layerwise=self._layerwise,
                staging=None if staging is None else int(staging),
            )
        except Exception as error:
            self._disable(error)
            return
        self._arrangement = form.name
        if self._worker.answers:
            # `kvasir-index` needs the namespace.
            logger.info(
                "the Kvasir cache is on: a block came back as it was stored; namespace %s",
                self._namespace,
            )
        else:
            logger.warning("no Kvasir daemon answers: going on without until one does")

    def get_handshake_metadata(self) -> Arrangement:
        return Arrangement(None if self._is_off else self._arrangement)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        for wanted in self._work().loads:
            try:
                if self._is_off or self._worker is None:
                    raise _Elsewhere("the cache is off")
                self._worker.start_load(wanted)
            except Exception as error:
                self._disable(error)
                self._failed.update(wanted.blocks)
                if not self._layerwise:
                    self._over.add(wanted.request)

    @harmless(default=None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    @harmless(default=None)
    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: "AttentionMetadata",
        **kwargs: Any,
    ) -> None:
        if self._worker is not None and not self._is_off:
            self._worker.save_layer(layer_name, self._work().stores)

    @harmless(default=None)
    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end_step([] if self._is_off else self._work().stores)

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        over, self._over = self._over, set()
        if self._worker is not None:
            over |= self._worker.take_over(self._work().is_idle)
        return None, over or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        if self._worker is not None:
            failed |= self._worker.take_failed()
        return failed

    def build_connector_worker_meta(self) -> "Findings | None":
        return Findings(is_off=True) if self._is_off else None

    def shutdown(self) -> None:
        if self._worker is not None and not self._is_off:
            self._worker.close(SHUTDOWN_SECONDS)

    # Both sides'.

    def get_kv_connector_stats(self) -> KvasirStats | None:
        side = self._worker or self._scheduler
        return None if side is None or self._is_off else side.stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KvasirStats:
        return KvasirStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> KvasirMetrics:
        return KvasirMetrics(*arguments)

    def _work(self) -> Work:
        work = self._connector_metadata
        return work if isinstance(work, Work) else Work()
