"""vLLM's own tiering, with what its engine would do beside it: chunks that come out of a device,
and prompts that ask for them.
"""

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvasir.vllm.tier import KvasirTier

TOKENS = 16
# Of a block; vLLM rounds up to a page.
BLOCK_BYTES = 39_000
CHUNK_BYTES = 40_960
# How long a job may take at most, with what the machine does beside it.
PATIENCE_SECONDS = 60.0


def config(
    endpoint: str,
    chunks: int = 24,
    tensor_parallel: int = 1,
    blocks_per_chunk: int = 1,
    dtype: str = "bfloat16",
    layers: int = 2,
    groups: int = 1,
    events: bool = False,
    **options: Any,
) -> OffloadingConfig:
    """As vLLM makes it of its command line."""
    tier = {
        "type": "KvasirTier",
        "module_path": "kvasir.vllm.tier",
        "endpoint": endpoint,
        "weights": "random",
        # The tests ask what is answered; that answers are quick is not to be relied on here.
        "lookup_timeout": 2.0,
        "load_timeout": 5.0,
    }
    row = -(-BLOCK_BYTES * tensor_parallel * blocks_per_chunk // 4096) * 4096
    return OffloadingConfig(
        groups=tuple(
            OffloadingGroupConfig(
                tokens_per_block=TOKENS,
                layer_names=tuple(f"layers.{group}.{it}" for it in range(layers)),
                group_id=group,
            )
            for group in range(groups)
        ),
        worker_kv_bytes_per_block=BLOCK_BYTES,
        enable_kv_cache_events=events,
        extra_config={
            "cpu_bytes_to_use": chunks * row,
            "secondary_tiers": [tier | options],
        },
        engine_id=f"test-{uuid4()}",
        model=OffloadingModelConfig(name="nobody/nothing", dtype=dtype),
        cache=OffloadingCacheConfig(
            tokens_per_hash=TOKENS, blocks_per_chunk=blocks_per_chunk
        ),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=tensor_parallel,
            tp_size=tensor_parallel,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
    )


def content(key: OffloadKey, size: int = CHUNK_BYTES) -> bytes:
    """What a device has computed: of each chunk something else."""
    return random.Random(bytes(key)).randbytes(size)


def chain(tokens: Sequence[int], group: int = 0) -> list[OffloadKey]:
    """Keys of the chunks of a prompt, each of which tells of all tokens before."""
    keys, parent = [], b""
    for first in range(0, len(tokens) - TOKENS + 1, TOKENS):
        own = ",".join(map(str, tokens[first : first + TOKENS]))
        parent = hashlib.sha256(parent + own.encode()).digest()
        keys.append(make_offload_key(parent, group))
    return keys


def workload(seed: int, prefixes: int = 3, prompts: int = 4) -> list[list[OffloadKey]]:
    """Prompts that share what they begin with."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(32_000) for _ in range(count)]

    shared = [words(rng.randrange(6, 10) * TOKENS) for _ in range(prefixes)]
    return [
        chain(prefix + words(rng.randrange(2, 7) * TOKENS))
        for prefix in shared
        for _ in range(prompts)
    ]


class Scheduler:
    """The part of vLLM's that drives its offloading, a step at a time."""

    def __init__(self, endpoint: str, **changes: Any) -> None:
        self.spec = TieringOffloadingSpec(config(endpoint, **changes))
        self.manager = self.spec.get_manager()
        self.view = self.manager.primary_tier.get_kv_memoryview()
        self._requests = 0
        # How long the longest call of the tier's took, of those that must not wait.
        self.longest = 0.0

    @property
    def tier(self) -> KvasirTier:
        return self.manager.secondary_tiers[0]

    def request(self, keys: Iterable[OffloadKey]) -> ReqContext:
        self._requests += 1
        context = ReqContext(req_id=f"request {self._requests}")
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, (index + 1) * TOKENS)
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        begun = time.monotonic()
        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        self.longest = max(self.longest, time.monotonic() - begun)
        time.sleep(0.0005)

    def settle(self) -> None:
        """Steps until all jobs have ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        self.step()
        while self.manager.has_pending_work():
            assert time.monotonic() < until, "a job does not end"
            self.step()

    def _chunks(self, ids: Iterable[int]) -> list[memoryview]:
        flat, size = self.view.cast("B"), self.view.shape[1]
        return [flat[int(it) * size :][:size] for it in ids]

    def store(self, keys: list[OffloadKey], context: ReqContext | None = None) -> None:
        """As if a device had computed these chunks."""
        own = context or self.request(keys)
        until = time.monotonic() + PATIENCE_SECONDS
        while (prepared := self.manager.prepare_store(keys, own)) is None:
            # All of the memory is in use by jobs.
            assert time.monotonic() < until, "memory does not become free"
            self.step()
        if new := prepared.keys_to_store:
            self._compute(new, prepared.store_spec.chunk_ids, own)
        if context is None:
            self.manager.on_request_finished(own)

    def _compute(
        self, keys: list[OffloadKey], ids: Iterable[int], context: ReqContext
    ) -> None:
        for key, chunk in zip(keys, self._chunks(ids), strict=True):
            chunk[:] = content(key, len(chunk))
        begun = time.monotonic()
        self.manager.complete_store(keys, context)
        self.longest = max(self.longest, time.monotonic() - begun)

    def found(self, keys: list[OffloadKey], context: ReqContext) -> int:
        """How many of the leading chunks can be had; what is loaded is checked."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert time.monotonic() < until, "a lookup does not end"
            waits, hits = False, 0
            for key in keys:
                begun = time.monotonic()
                result = self.manager.lookup(key, context)
                self.longest = max(self.longest, time.monotonic() - begun)
                if result is LookupResult.MISS:
                    break
                waits |= result is not LookupResult.HIT
                hits += 1
            if not waits:
                break
            self.step()
        if hits:
            spec = self.manager.prepare_load(keys[:hits], context)
            for key, chunk in zip(keys, self._chunks(spec.chunk_ids), strict=False):
                assert chunk == content(key, len(chunk)), "wrong bytes"
            self.manager.complete_load(keys[:hits], context)
        return hits

    def run(self, prompts: list[list[OffloadKey]]) -> int:
        """Answers prompts: loads what can be had, computes the rest; how many chunks were had."""
        had = 0
        for keys in prompts:
            context = self.request(keys)
            hits = self.found(keys, context)
            had += hits
            # No more than may be computed in a step.
            for first in range(hits, len(keys), 4):
                self.store(keys[first : first + 4], context)
            self.manager.on_request_finished(context)
            self.step()
        return had

    def reset(self) -> None:
        """As when vLLM's weights have changed."""
        self.manager.reset_cache()
        # From 0.33 on, it is told when its workers have stopped.
        if flushed := getattr(self.manager, "on_reset_flushed", None):
            flushed()

    def close(self) -> None:
        self.manager.shutdown()
