"""A Kvasir daemon as a tier of vLLM's own KV offloading, below its CPU memory.

    --kv-transfer-config '{"kv_connector": "KvasirOffloadingConnector",
        "kv_connector_module_path": "kvasir.vllm.tier", "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 10737418240,
            "secondary_tiers": [{"type": "KvasirTier", "module_path": "kvasir.vllm.tier"}]}}'

vLLM moves KV between its devices and a region of shared memory; this tier moves chunks of that
region, whatever they hold, to a daemon and back. All of it happens in the scheduler's process, so
nothing here waits: lookups are asked for at the end of a step and answered in a later one, jobs run
in threads that do not hold the GIL, in the region itself.

Whatever becomes of the daemon, each job ends: a chunk that does not come whole is reported as
failed, and computed. A daemon that fails costs its timeouts once, and is then left alone for a
while, in which nothing is found.
"""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.config import set_current_vllm_config
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import (
    JobResult,
    SecondaryTierManager,
    TransferJob,
)

from kvasir import Residency, SlotCache
from kvasir.vllm import layout
from kvasir.vllm._hooks import harmless, logger
from kvasir.vllm.events import OWNER
from kvasir.vllm.layout import Unsupported
from kvasir.vllm.stats import COUNTERS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

# Options of the cache, and what they are.
LIMITS: dict[str, Callable[[Any], Any]] = {
    "lookup_timeout": float,
    "load_timeout": float,
    "store_timeout": float,
    "cooldown": float,
    "store_buffer": int,
    "durable": bool,
}

# Names of vLLM's keys end in the number of their group.
GROUP_BYTES = 4

# How long an engine that ends waits for chunks to be stored.
SHUTDOWN_SECONDS = 5.0

# How often a tier that is waited for says so.
DRAIN_SECONDS = 10.0


class KvasirOffloadingConnector(OffloadingConnector):
    """vLLM's own, which lets its tiers know what the engine computes."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: "KVConnectorRole",
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        with set_current_vllm_config(vllm_config):
            super().__init__(vllm_config, role, kv_cache_config)


class _Lookups(AsyncLookupManager):
    """Asks the daemon once a step, in a thread of its own."""

    def __init__(self, tier: "KvasirTier") -> None:
        self._tier = tier
        super().__init__(tier.tier_type)

    def batch_lookup(
        self, keys: list[OffloadKey], req_context: ReqContext
    ) -> Iterable[bool]:
        return self._tier.find(keys)


class KvasirTier(SecondaryTierManager):
    """Options, beside `type` and `module_path`: `endpoint` (127.0.0.1:7420); `lookup_timeout`,
    `load_timeout`, `store_timeout` and `cooldown`, in seconds; `store_buffer`, in bytes; `durable`;
    `weights`, a name for what the engine computes; `keep_after_reset`; `locality` and
    `enable_kv_events`, as vLLM's own tiers have them.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: "OffloadingSpec",
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: "BackpressureDetector | None" = None,
        **options: Any,
    ) -> None:
        super().__init__(
            offloading_spec, primary_kv_view, tier_type, backpressure_detector
        )
        self._cache: SlotCache | None = None
        self._lookups: _Lookups | None = None
        # Where somebody listens to KV events.
        self._residency: Residency | None = None
        self._is_on = True
        # Prefix of all names, once what was stored before must not be found any more.
        self._since_reset = b""
        # Of each key: what a name ends in.
        self._key_bytes = 0
        self._jobs: dict[int, TransferJob] = {}
        # Results of jobs that were not begun.
        self._refused: list[JobResult] = []
        # By request and group, where the last chunk ends that has been stored or loaded, and its
        # name.
        self._tails: dict[str, dict[bytes, tuple[int, bytes]]] = {}
        self._chunks = {"blocks_loaded": 0, "blocks_failed": 0}
        # What was counted when that was asked last.
        self._counted: dict[str, int] = {}
        try:
            self._open(offloading_spec, primary_kv_view, dict(options))
        except Exception as error:
            self._disable(error)

    def _open(
        self, spec: "OffloadingSpec", view: memoryview, options: dict[str, Any]
    ) -> None:
        endpoint = options.pop("endpoint", "127.0.0.1:7420")
        named = options.pop("weights", None)
        self._keeps = bool(options.pop("keep_after_reset", False))
        announces = bool(options.pop("enable_kv_events", False))
        if (locality := options.pop("locality", None)) is not None:
            self.locality = Locality(locality)
        if unknown := sorted(options.keys() - LIMITS.keys()):
            ours = ["endpoint", "weights", "keep_after_reset", "locality", "enable_kv_events"]
            known = [*ours, *LIMITS]
            raise Unsupported(f"there is no option {unknown[0]}; there are {known}")
        if view.ndim != 2 or not view.c_contiguous or view.itemsize != 1:
            raise Unsupported("vLLM's CPU memory is not one row of bytes a chunk")
        size = view.shape[1]
        config = get_current_vllm_config_or_none()
        groups = spec.config.groups
        blocks = spec.config.cache.blocks_per_chunk
        self._spans = {
            it.group_id.to_bytes(GROUP_BYTES, "big"): it.tokens_per_block * blocks
            for it in groups
        }
        limits = {name: LIMITS[name](value) for name, value in options.items()}
        # vLLM ends its view of the memory before its tiers are gone.
        owner = view.obj if memoryview(view.obj).nbytes == view.nbytes else view
        self._cache = SlotCache(
            endpoint,
            layout.tier_namespace(spec, size, config, named),
            owner,
            **limits,
        )
        with view.cast("B") as memory:
            canary(self._cache, memory[:size])
            answers = round_trip(self._cache, memory[:size])
        self._lookups = _Lookups(self)
        if announces and spec.kv_events_config.enable_kv_cache_events:
            self._residency = self._cache.follow()
        if answers:
            logger.info("the Kvasir tier is on: a chunk came back as it was stored")
        else:
            logger.warning("no Kvasir daemon answers: going on without until one does")

    def _disable(self, why: Exception) -> None:
        if self._is_on:
            logger.error("the Kvasir tier is off: %s", why)
        self._is_on = False

    def _name(self, key: OffloadKey) -> bytes:
        self._key_bytes = len(key)
        return self._since_reset + bytes(key)

    def find(self, keys: list[OffloadKey]) -> list[bool]:
        """Of each key, whether it can be loaded; waits for the daemon."""
        assert self._cache is not None
        since_reset = self._since_reset
        names = [self._name(it) for it in keys]
        found = self._cache.find(names)
        if since_reset == self._since_reset:
            self._expect([name for name, is_there in zip(names, found, strict=True) if is_there])
        return found

    def _expect(self, names: list[bytes]) -> None:
        """Has vLLM hear of chunks that the daemon has, or is given."""
        if self._residency is not None:
            self._residency.expect(names)

    @harmless(default=())
    def take_events(self) -> Iterable[OffloadingEvent]:
        """Of what the daemon has of what this engine stored or found."""
        events: list[OffloadingEvent] = []
        for name, is_there in self._residency.take() if self._residency else []:
            if not events or events[-1].removed == is_there:
                event = OffloadingEvent(
                    [],
                    self.medium,
                    removed=not is_there,
                    locality=self.locality,
                    ownership=OWNER,
                    removal_expected=True,
                )
                events.append(event)
            events[-1].keys.append(OffloadKey(name[-self._key_bytes :]))
        return events

    @harmless(default=LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if not self._is_on or self._cache.rests:
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._begin(job_metadata, self._store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._begin(job_metadata, self._load)

    def _begin(self, job: TransferJob, begin: Callable[[TransferJob], None]) -> None:
        """Whatever happens, vLLM hears of the job again."""
        try:
            if self._is_on:
                begin(job)
                self._jobs[job.job_id] = job
                return
        except Exception as error:
            logger.exception("a job failed")
            self._disable(error)
        self._refused.append(JobResult(job.job_id, success=False))

    def _store(self, job: TransferJob) -> None:
        names = [self._name(it) for it in job.keys]
        self._expect(names)
        parents, tokens = self._parents(job, names), min(self._spans.values())
        self._cache.store(job.job_id, names, job.chunk_ids.tolist(), parents, tokens)

    def _load(self, job: TransferJob) -> None:
        names = [self._name(it) for it in job.keys]
        self._parents(job, names)
        self._cache.load(job.job_id, names, job.chunk_ids.tolist())

    def _parents(self, job: TransferJob, names: list[bytes]) -> list[bytes | None]:
        """Names of the chunks before these in their prompt, so that it is evicted from its end."""
        tails = self._tails.setdefault(job.req_context.req_id, {})
        parents: list[bytes | None] = []
        for key, name in zip(job.keys, names, strict=True):
            group, parent = key[-GROUP_BYTES:], None
            end = job.req_context.get_offload_key_position(key)
            if end is not None:
                tail, before = tails.get(group, (0, None))
                if tail + self._spans.get(group, 0) == end:
                    parent = before
                tails[group] = (end, name)
            parents.append(parent)
        return parents

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results, self._refused = self._refused, []
        lost: list[OffloadKey] = []
        ended = self._cache.finished() if self._cache is not None else []
        for number, whole, seconds in ended:
            if (job := self._jobs.pop(number, None)) is None:
                continue
            keys = list(zip(job.keys, whole, strict=True))
            came = [key for key, is_whole in keys if is_whole]
            if job.is_promotion:
                lost += [key for key, is_whole in keys if not is_whole]
                self._chunks["blocks_loaded"] += len(came)
                self._chunks["blocks_failed"] += len(keys) - len(came)
            result = JobResult(
                number,
                success=len(came) == len(keys),
                successful_keys=came if job.is_promotion else None,
                transfer_time=seconds,
                transfer_bytes=len(came) * self.block_size_bytes,
            )
            results.append(result)
        self._forget(lost)
        return results

    @harmless(default=None)
    def _forget(self, lost: list[OffloadKey]) -> None:
        """Or vLLM would ask for them again and again."""
        if lost:
            self._lookups.mark_miss(lost)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    @harmless(default=None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._tails.pop(req_context.req_id, None)
        if self._lookups is not None:
            self._lookups.cleanup(req_context.req_id)

    @harmless(default=None)
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        if self._lookups is not None:
            self._lookups.flush()

    @harmless(default=None)
    def drain_jobs(self) -> None:
        """Called when vLLM resets its caches, which it does when its weights have changed."""
        if self._cache is None:
            return
        while not self._cache.drain(DRAIN_SECONDS, cut=True):
            logger.warning("still waiting for jobs of the Kvasir tier to end")
        self._tails.clear()
        if self._is_on and not self._keeps:
            self._since_reset = os.urandom(16)
            if self._residency is not None:
                self._residency.clear()
            logger.info("vLLM has reset its caches: what the tier had is not used any more")

    @harmless(default=None)
    def shutdown(self) -> None:
        """What waits to be stored has a moment to be."""
        self._is_on = False
        if self._lookups is not None:
            self._lookups.shutdown()
        if self._cache is not None:
            self._cache.drain(SHUTDOWN_SECONDS)
            # The memory stays as long as a job is in it.
            self._cache.drain(SHUTDOWN_SECONDS, cut=True)
            self._cache.close()

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return {
            _metric(name): OffloadingCounterMetadata(documentation=documentation)
            for name, documentation in COUNTERS.items()
        }

    @harmless(default=None)
    def get_stats(self) -> OffloadingConnectorStats | None:
        if self._cache is None:
            return None
        now = self._cache.stats() | self._chunks
        stats = OffloadingConnectorStats()
        for name in COUNTERS:
            if (since := now[name] - self._counted.get(name, 0)) > 0:
                stats.increase_counter(_metric(name), since)
        self._counted = now
        return None if stats.is_empty() else stats


def _metric(counter: str) -> str:
    return f"vllm:kvasir_tier_{counter}"


def canary(cache: SlotCache, chunk: memoryview) -> None:
    """Writes and reads the first chunk, which is still nobody's, on both sides of the memory."""
    before, content = bytes(chunk), os.urandom(len(chunk))
    try:
        chunk[:] = content
        if cache.read(0) != content:
            raise Unsupported("vLLM's CPU memory is not where it is said to be")
        chunk[:] = bytes(len(chunk))
        cache.write(0, content)
        if chunk != content:
            raise Unsupported("vLLM's CPU memory is not written where it is said to be")
    finally:
        chunk[:] = before


def round_trip(cache: SlotCache, chunk: memoryview) -> bool:
    """The same by way of the daemon. False where there is none."""
    before, content = bytes(chunk), os.urandom(len(chunk))
    name = b"canary" + os.urandom(16)

    try:
        chunk[:] = content
        cache.store(0, [name], [0], [None], None)
        if not _came(cache):
            return False
        chunk[:] = bytes(len(chunk))
        cache.load(0, [name], [0])
        came = _came(cache)
        if came and chunk != content:
            raise Unsupported("a chunk does not come back as it was stored")
        return came
    finally:
        cache.delete([name])
        chunk[:] = before


def _came(cache: SlotCache) -> bool:
    """Whether the one job under way succeeds. It ends by its own deadlines, and not before is the
    chunk anybody else's.
    """
    while not cache.drain(DRAIN_SECONDS):
        pass
    return all(all(whole) for _, whole, _ in cache.finished())
