"""The scheduler's side: what is found, and what workers are to load and store."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvasir import BlockCache
from kvasir._identity import adapter
from kvasir.vllm.events import Announcements
from kvasir.vllm.stats import Counts, KvasirStats

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


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
    """What a step has the workers do."""

    loads: list[Blocks] = field(default_factory=list)
    stores: list[Blocks] = field(default_factory=list)
    # Nothing is computed: requests there may be wait for their loads.
    is_idle: bool = False


@dataclass
class Tracked:
    """A request that is running."""

    request: "Request"
    blocks: list[int] = field(default_factory=list)
    # Leading blocks that need not be stored: they came from a cache, or have been stored.
    stored: int = 0


class Scheduler:
    """Of blocks of `tokens` tokens each; nothing is looked for in prompts of fewer than
    `min_tokens`. What the daemon has is announced where somebody listens.
    """

    def __init__(
        self,
        cache: BlockCache,
        tokens: int,
        min_tokens: int,
        announcements: Announcements | None,
    ) -> None:
        self._cache = cache
        self._announcements = announcements
        self._tokens = tokens
        self._min_tokens = min_tokens
        self._tracked: dict[str, Tracked] = {}
        self._wanted: list[Blocks] = []
        # Of requests that were asked for: where what was found begins.
        self._found: dict[str, int] = {}
        # Behind all names, once what was stored before must not be found any more.
        self._since_reset = b""
        self._counts = Counts()

    def find(self, request: "Request", computed: int) -> int:
        """How many tokens behind the computed ones can be loaded."""
        if self._announcements is not None:
            self._announcements.heed_clearing()
        if request.num_tokens < self._min_tokens or computed % self._tokens:
            return 0
        first = computed // self._tokens
        # The last token is computed in any case: its logits are wanted.
        names = self._names(request, first, (request.num_tokens - 1) // self._tokens)
        if not names:
            return 0
        self._found[request.request_id] = first
        found = self._cache.find(names)
        if self._announcements is not None:
            self._announcements.expect(request, first, names[:found])
        return found * self._tokens

    def allocated(
        self, request: "Request", blocks: "KVCacheBlocks", found_tokens: int
    ) -> None:
        """Notes where a request's blocks are, of which those that were found are to be loaded."""
        self._tracked.setdefault(request.request_id, Tracked(request))
        if found_tokens == 0:
            return
        table = blocks.get_block_ids()[0]
        wanted = Blocks(request.request_id, [], table)
        # vLLM waits for it from now on, whatever comes next: without names it fails.
        self._wanted.append(wanted)
        first = self._found[request.request_id]
        end = first + found_tokens // self._tokens
        wanted.names = self._names(request, first, end)
        wanted.blocks = table[first:end]

    def take_wanted(self) -> list[Blocks]:
        """What is to be loaded from the next step on."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def plan_stores(self, scheduled: "SchedulerOutput", stores: list[Blocks]) -> None:
        """Adds the blocks that are full when this step has run."""
        if self._announcements is not None:
            self._announcements.heed_clearing()
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

    def finished(self, request: str) -> None:
        self._tracked.pop(request, None)
        self._found.pop(request, None)

    def reset(self) -> None:
        """What was stored before is not found any more, by this engine."""
        self._since_reset = os.urandom(16)
        if self._announcements is not None:
            self._announcements.reset()

    def events(self) -> "Iterable[KVCacheEvent]":
        """What has happened to blocks that are announced."""
        return () if self._announcements is None else self._announcements.take()

    def stats(self) -> KvasirStats | None:
        return self._counts.since(self._cache.stats())

    def _place(
        self, request: str, blocks: tuple[list[int], ...], computed: int
    ) -> None:
        """Notes where a request's blocks are, of which the computed ones are not to be stored."""
        if tracked := self._tracked.get(request):
            tracked.blocks = list(blocks[0])
            tracked.stored = computed // self._tokens

    def _plan(
        self, scheduled: "SchedulerOutput", request: str, computed: int, stores: list[Blocks]
    ) -> None:
        tracked = self._tracked.get(request)
        if tracked is None:
            return
        # What failed to load is computed, and stored, like what comes behind it.
        tracked.stored = min(tracked.stored, computed // self._tokens)
        tokens = computed + scheduled.num_scheduled_tokens.get(request, 0)
        # Tokens that are guessed have no hash yet.
        end = min(
            tokens // self._tokens,
            len(tracked.request.block_hashes),
            len(tracked.blocks),
        )
        first = tracked.stored
        if end <= first:
            return
        names = self._names(tracked.request, max(first - 1, 0), end)
        parent = names.pop(0) if first > 0 else None
        if self._announcements is not None:
            self._announcements.expect(tracked.request, first, names)
        stores.append(Blocks(request, names, tracked.blocks[first:end], parent))
        tracked.stored = end

    def _names(self, request: "Request", first: int, end: int) -> list[bytes]:
        """Of a request's blocks: vLLM's hashes, which tell of all tokens up to the block's last
        one, of salt, images, and the name of an adapter, and behind them which adapter has that
        name.
        """
        behind = self._since_reset
        if request.lora_request is not None:
            behind = adapter(request.lora_request.lora_path) + behind
        return [bytes(it) + behind for it in request.block_hashes[first:end]]
