"""KV events of what the daemon has of an engine's blocks, for routers that listen to vLLM's.

A block is announced when the daemon says that it has it, if this engine has stored or found it,
and gone when the daemon says so. What other engines stored, and this one never asked for, they
announce.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import (
    MEDIUM_STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import (
    ExternalBlockHash,
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)
from vllm.v1.kv_cache_interface import (
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
)

from kvasir import Residency

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

# Who says so, among the tiers that an engine may have.
OWNER = "kvasir"

# Events that wait for the daemon to have their blocks. What waits longest is not announced.
WAITING = 1 << 14


class Announcements:
    """Of blocks of `tokens` tokens, which layers as `spec` says have computed; `pool` is where vLLM's
    own are.
    """

    def __init__(
        self, residency: Residency, spec: "KVCacheSpec", tokens: int, pool: "BlockPool | None"
    ) -> None:
        self._residency = residency
        self._pool = pool
        # The last time that vLLM has said to have cleared its own cache.
        self._cleared: KVCacheEvent | None = None
        self._kind = get_kv_cache_spec_kind(spec).value
        self._window = get_kv_cache_spec_sliding_window(spec)
        self._tokens = tokens
        self._waiting: dict[bytes, BlockStored] = {}
        # What was announced, by name.
        self._held: dict[bytes, list[ExternalBlockHash]] = {}

    def expect(self, request: "Request", first: int, names: list[bytes]) -> None:
        """Blocks of a request from the first on, which the daemon has or is given."""
        new = []
        for index, name in enumerate(names, first):
            if name not in self._held and name not in self._waiting:
                self._waiting[name] = self._stored(request, index)
                new.append(name)
        while len(self._waiting) > WAITING:
            del self._waiting[next(iter(self._waiting))]
        if new:
            self._residency.expect(new)

    def heed_clearing(self) -> None:
        """When vLLM has cleared its own cache, listeners forget all of this engine's blocks, those
        that the daemon has included: they are announced again when they are found again.
        """
        queued = getattr(self._pool, "kv_event_queue", ())
        cleared = [it for it in queued if isinstance(it, AllBlocksCleared)]
        # It is there from the clearing to the end of the next step.
        if cleared and cleared[-1] is not self._cleared:
            self._cleared = cleared[-1]
            self._held.clear()
            self._residency.clear()
            self._residency.expect(list(self._waiting))

    def take(self) -> Iterable[KVCacheEvent]:
        """What has happened since."""
        for name, is_there in self._residency.take():
            if not is_there:
                if hashes := self._held.pop(name, None):
                    yield self._removed(hashes)
            elif event := self._waiting.pop(name, None):
                self._held[name] = event.block_hashes
                yield event

    def reset(self) -> None:
        """None of them is of use any more."""
        self._waiting.clear()
        self._residency.clear()

    def _stored(self, request: "Request", index: int) -> BlockStored:
        hashes, lora = request.block_hashes, request.lora_request
        start, end = index * self._tokens, (index + 1) * self._tokens
        extra_keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(hashes[index])],
            parent_block_hash=maybe_convert_block_hash(hashes[index - 1]) if index else None,
            token_ids=list(request.all_token_ids[start:end]),
            block_size=self._tokens,
            lora_id=lora.adapter_id if lora else None,
            medium=MEDIUM_STORAGE,
            lora_name=lora.name if lora else None,
            extra_keys=to_event_extra_keys([extra_keys]),
            group_idx=0,
            kv_cache_spec_kind=self._kind,
            kv_cache_spec_sliding_window=self._window,
            ownership=OWNER,
            session_id=request.session_id,
        )

    def _removed(self, hashes: list[ExternalBlockHash]) -> BlockRemoved:
        return BlockRemoved(hashes, medium=MEDIUM_STORAGE, group_idx=0, ownership=OWNER)
