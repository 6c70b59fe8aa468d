"""SGLang's storage backend on a Kvasir daemon.

SGLang's threads call it, and wait: one asks what is there and has it loaded into pages of the
host pool, another has pages stored. Bytes go between these pages and the daemon by native
threads that do not hold the GIL.

Whatever becomes of the daemon, nothing is raised here: what does not come is not there, and
what is not stored has failed. SGLang takes the least that all ranks have, so ranks may differ.
A daemon that fails costs its timeouts once, and is then left alone for a while.
"""

import functools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from kvasir import BlockCache, Client, Error
from kvasir._identity import Unsupported
from kvasir.sglang import identity
from kvasir.sglang.pages import Geometry, Pages, geometry

logger = logging.getLogger(__name__)

OPTIONS = {
    "lookup_timeout": float,
    "load_timeout": float,
    "store_timeout": float,
    "cooldown": float,
    "durable": bool,
}

# How long storing a page may take, unless an option says so.
STORE_SECONDS = 2.0

# Pages that are remembered, so that they can be cleared.
REMEMBERED = 1 << 16
CLEARED_AT_ONCE = 4096


def _harmless(
    default: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has a call that fails turn the cache off, and not the engine down. `default` makes the
    answer of a cache that is off from the call's arguments.
    """

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def guarded(self: "KvasirStorage", *arguments: Any, **named: Any) -> Any:
            try:
                if self._is_on():
                    return call(self, *arguments, **named)
            except Exception as error:
                logger.exception("%s failed", call.__name__)
                self._disable(error)
            return default(*arguments, **named)

        return guarded

    return guard


def _no_page(keys: list[str], *_: Any, **__: Any) -> list[bool]:
    return [False] * len(keys)


def _no_transfer(transfers: list[PoolTransfer], *_: Any, **__: Any) -> dict[str, list[bool]]:
    return {it.name: _no_page(it.keys or []) for it in transfers}


class KvasirStorage(HiCacheStorage):
    """Options, beside those of SGLang in `--hicache-storage-backend-extra-config`: `endpoint`
    (127.0.0.1:7420); `lookup_timeout`, `load_timeout`, `store_timeout` and `cooldown`, in
    seconds; `durable`.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, arguments: dict[str, Any] | None = None
    ) -> None:
        self._config = storage_config
        self._pools: dict[str, Pages] = {}
        # By pool and hash; SGLang's threads all add to it.
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lock = threading.Lock()
        self._moved: dict[str, list[tuple[int, float]]] = {"prefetch": [], "backup": []}
        self._why_off: str | None = None
        try:
            options = storage_config.extra_config or {}
            self._endpoint = str(options.get("endpoint", "127.0.0.1:7420"))
            self._limits = {"store_timeout": STORE_SECONDS} | {
                name: kind(options[name]) for name, kind in OPTIONS.items() if name in options
            }
            self._loaded = identity.loaded()
            if not options.get("interface_v1"):
                logger.warning('pages are copied one by one: set "interface_v1": 1')
        except Exception as error:
            self._disable(error)

    def _is_on(self) -> bool:
        if self._why_off is None and self._loaded != identity.loaded():
            self._disable(Unsupported("the engine's weights were replaced: attach the cache anew"))
        return self._why_off is None

    def _disable(self, why: Exception) -> None:
        if self._why_off is None:
            self._why_off = str(why) or type(why).__name__
            logger.error("the Kvasir cache is off: %s", self._why_off)

    # Where pages are.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(mem_pool_host, PoolName.KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        # The pool of all layers comes by both ways.
        if host_pool is not getattr(self, "mem_pool_host", None):
            self._register(host_pool, host_pool_name)

    @_harmless(default=lambda *_: None)
    def _register(self, pool: Any, name: Any) -> None:
        try:
            known = geometry(pool)
            shares = self._shares(pool, known)
            names = identity.namespace(known.layout(len(shares)), str(name))
            cache = BlockCache(self._endpoint, names, **self._limits)
            pages = Pages(pool, known, shares, names, cache)
            answers = pages.round_trip()
        except Unsupported as error:
            self._disable(Unsupported(f"{name}: {error}"))
            return
        self._pools[str(name)] = pages
        if answers:
            logger.info("the Kvasir cache is on: a page of %s came back as it was stored", name)
        else:
            logger.warning("no Kvasir daemon answers: going on without until one does")

    def _shares(self, pool: Any, geometry: Geometry) -> list[bytes]:
        """What this rank's pages hold of the model's, in the parts they are stored in.

        Heads are counted over all ranks, so that another number of ranks finds the same parts
        where they are cut alike (`tp_lcm_size`). What all ranks have alike has no heads.
        """
        config = self._config
        if config.attn_cp_size != 1:
            raise Unsupported("pages of context parallelism are not known")
        if config.is_mla_model != (geometry.planes == 1):
            raise Unsupported("whether all ranks have the same pages is not known")
        layers, drafts = pool.target_layer_num, pool.layer_num - pool.target_layer_num
        held = f" layers {pool.start_layer}+{layers} drafts {drafts}"
        if config.is_mla_model:
            return [held.encode()]
        parts = (config.tp_lcm_size or config.tp_size) // config.tp_size
        count = geometry.layout(parts).kv_heads
        begin, total = config.tp_rank * parts * count, config.tp_size * parts * count
        return [
            f"{held} heads {begin + part * count}+{count} of {total}".encode()
            for part in range(parts)
        ]

    # What is there.

    @_harmless(default=lambda *_, **__: 0)
    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        return self._find(PoolName.KV, keys)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    @_harmless(default=lambda *_, **__: PoolTransferResult.empty())
    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Of pools that hold something of every page."""
        transfers = pool_transfers or []
        if any(it.hit_policy != PoolHitPolicy.ALL_PAGES for it in transfers):
            return PoolTransferResult.empty()
        found = {PoolName.KV: self._find(PoolName.KV, keys)}
        for transfer in transfers:
            found[transfer.name] = self._find(transfer.name, keys[: found[PoolName.KV]])
        pages = min(found.values())
        return PoolTransferResult(pages, found, list(range(1, pages + 1)))

    def _find(self, pool: Any, keys: list[str]) -> int:
        pages = self._pools.get(str(pool))
        found = pages.find(keys) if pages else 0
        self._remember(pool, keys[:found])
        return found

    # Pages of the host pool.

    @_harmless(default=_no_page)
    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._load(PoolName.KV, keys, host_indices)

    @_harmless(default=_no_page)
    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._store(PoolName.KV, keys, host_indices, extra_info)

    @_harmless(default=_no_transfer)
    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {it.name: self._load(it.name, it.keys or [], it.host_indices) for it in transfers}

    @_harmless(default=_no_transfer)
    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {
            it.name: self._store(it.name, it.keys or [], it.host_indices, extra_info)
            for it in transfers
        }

    def _load(self, pool: Any, keys: list[str], indices: torch.Tensor | None) -> list[bool]:
        pages = self._pools.get(str(pool))
        if pages is None or indices is None:
            return _no_page(keys)
        begun = time.monotonic()
        whole = pages.load(keys, indices)
        self._note("prefetch", pages, whole, begun)
        return [True] * whole + [False] * (len(keys) - whole)

    def _store(
        self,
        pool: Any,
        keys: list[str],
        indices: torch.Tensor | None,
        extra_info: HiCacheStorageExtraInfo | None,
    ) -> list[bool]:
        pages = self._pools.get(str(pool))
        if pages is None or indices is None:
            return _no_page(keys)
        if not self._config.is_storage_writer:
            # Another rank stores the same.
            return [True] * len(keys)
        begun = time.monotonic()
        before = (extra_info and extra_info.prefix_keys or [None])[-1]
        stored = pages.store(keys, indices, before)
        self._note("backup", pages, sum(stored), begun)
        self._remember(pool, [key for key, is_there in zip(keys, stored, strict=True) if is_there])
        return stored

    # Pages as tensors.

    @_harmless(default=lambda *_, **__: None)
    def get(
        self, key: str, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        pages = self._pools.get(str(PoolName.KV))
        return pages.load_tensor(key, target_location) if pages else None

    def batch_get(
        self,
        keys: list[str],
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> list[torch.Tensor | None]:
        """The leading ones that come, and none behind."""
        came: list[torch.Tensor | None] = [None] * len(keys)
        for at, key in enumerate(keys):
            came[at] = self.get(key, target_locations[at] if target_locations else None)
            if came[at] is None:
                break
        return came

    @_harmless(default=lambda *_, **__: False)
    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        pages = self._pools.get(str(PoolName.KV))
        if pages is None or value is None:
            return False
        if not self._config.is_storage_writer:
            return True
        is_stored = pages.store_tensor(key, value)
        self._remember(PoolName.KV, [key] if is_stored else [])
        return is_stored

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        return values is not None and all(map(self.set, keys, values))

    # The rest.

    @_harmless(default=lambda *_, **__: False)
    def clear(self) -> bool:
        """Deletes pages that this process has stored or found, the latest `REMEMBERED` of them.
        What else the daemon has stays.
        """
        with self._lock:
            known = list(self._known)
        keys = []
        for name, pages in self._pools.items():
            keys += pages.chunk_keys([key for pool, key in known if pool == name])
        client = Client(self._endpoint)
        try:
            for first in range(0, len(keys), CLEARED_AT_ONCE):
                client.delete(keys[first : first + CLEARED_AT_ONCE])
        except (Error, OSError) as error:
            logger.error("pages were not cleared: %s", error)
            return False
        with self._lock:
            for page in known:
                self._known.pop(page, None)
        return True

    def get_stats(self) -> Any:
        """Pages and GB/s of what was moved since the last time it was asked for."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        stats = StorageMetrics()
        for kind, moved in self._moved.items():
            since, moved[:] = list(moved), []
            getattr(stats, f"{kind}_pgs").extend(pages for pages, _ in since)
            getattr(stats, f"{kind}_bandwidth").extend(speed for _, speed in since)
        return stats

    def close(self) -> None:
        """Lets go of the pools."""
        self._pools = {}

    def _note(self, kind: str, pages: Pages, count: int, begun: float) -> None:
        if self._config.enable_storage_metrics and count:
            seconds = max(time.monotonic() - begun, 1e-9)
            self._moved[kind].append((count, count * pages.page_bytes / seconds / 1e9))

    def _remember(self, pool: Any, keys: list[str]) -> None:
        with self._lock:
            for key in keys:
                self._known[str(pool), key] = None
                self._known.move_to_end((str(pool), key))
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
