"""LMCache's own storage manager, L1 and controllers over the adapter, and keys to store in them."""

import argparse
import hashlib
import json
import random
import threading
import time
from typing import Any

import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import (
    add_l2_adapters_args,
    parse_args_to_l2_adapters_config,
)
from lmcache.v1.distributed.storage_manager import StorageManager

from kvasir.lmcache import KvasirAdapter

# `[2, layer, token, dim]`, as LMCache has it.
LAYOUT = MemoryLayoutDesc([torch.Size([2, 2, 64, 64])], [torch.bfloat16])
OBJECT_BYTES = 2 * 2 * 64 * 64 * 2
L1_BYTES = 64 << 20

# More than any task takes, on a machine that does something else too.
PATIENCE_SECONDS = 20.0


def chain(count: int, seed: int = 0, **changes: Any) -> list[ObjectKey]:
    """Keys of chunks of a prompt."""
    fields = {"model_name": "nobody/nothing", "kv_rank": 0x1000100} | changes
    hashes = (hashlib.sha256(f"{seed} {at}".encode()).digest() for at in range(count))
    return [ObjectKey(chunk_hash=it, **fields) for it in hashes]


def content(key: ObjectKey, size: int = OBJECT_BYTES) -> bytes:
    """Bytes that only this key has."""
    return random.Random(repr(key)).randbytes(size)


class Noted(L2AdapterListener):
    """What the adapter tells its listeners."""

    def __init__(self) -> None:
        self.stored: list[tuple[ObjectKey, int]] = []
        self.accessed: list[ObjectKey] = []
        self.deleted: list[ObjectKey] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.stored += zip(keys, sizes, strict=True)

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.deleted += keys


class Server:
    """As much of an `lmcache server` as has to do with L2, configured as its command line is."""

    def __init__(
        self,
        endpoint: str = "127.0.0.1:9",
        layout: MemoryLayoutDesc = LAYOUT,
        adapter: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        # Enough on a machine that does something else too.
        limits = {"lookup_timeout": 2.0, "load_timeout": 2.0, "store_timeout": 2.0, "cooldown": 0.2}
        spec = {
            "type": "plugin",
            "module_path": "kvasir.lmcache",
            "class_name": "KvasirAdapter",
            "adapter_params": {"endpoint": endpoint} | limits | options,
            **(adapter or {}),
        }
        parser = add_l2_adapters_args(argparse.ArgumentParser())
        arguments = parser.parse_args(["--l2-adapter", json.dumps(spec)])
        memory = L1MemoryManagerConfig(size_in_bytes=L1_BYTES, use_lazy=False, shm_name="")
        self.manager = StorageManager(
            StorageManagerConfig(
                L1ManagerConfig(memory),
                EvictionConfig("LRU"),
                parse_args_to_l2_adapters_config(arguments),
            )
        )
        self.layout = layout
        self._is_closed = False
        ((_, adapter_),) = self.manager.l2_adapters()
        self.adapter: KvasirAdapter = getattr(adapter_, "inner_adapter", adapter_)
        self.noted = Noted()
        self.manager.register_l2_listener(self.noted)
        # Whether each key's store succeeded, once LMCache knows.
        self.results: dict[ObjectKey, bool] = {}
        self._news = threading.Condition()
        controller = self.manager._store_controller
        finalize = controller._finalize_store

        def note(task_key: Any, task: Any) -> None:
            finalize(task_key, task)
            with self._news:
                self.results |= dict.fromkeys(task.keys, task.l2_store_result)
                self._news.notify_all()

        controller._finalize_store = note

    def store(self, keys: list[ObjectKey]) -> list[bool]:
        """As an engine does; whether each got there."""
        for key in keys:
            self.results.pop(key, None)
        objects = self.manager.reserve_write(keys, self.layout)
        assert len(objects) == len(keys), "L1 has no room"
        for key, it in objects.items():
            it.byte_array.cast("B")[:] = content(key, it.get_size())
        self.manager.finish_write(keys)
        with self._news:
            assert self._news.wait_for(
                lambda: all(key in self.results for key in keys), PATIENCE_SECONDS
            ), "a store does not end"
        return [self.results[key] for key in keys]

    def load(self, *groups: list[ObjectKey], windows: dict[int, int] | None = None) -> int:
        """How many chunks of a prompt come, of those that L1 lacks; checks what does."""
        rows = [
            GroupedObjectKeys(
                keys,
                keys[0].object_group_id,
                self.layout,
                (windows or {}).get(keys[0].object_group_id, -1),
            )
            for keys in groups
        ]
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(rows))
        assert self.manager.wait_prefetch_status(handle, PATIENCE_SECONDS), "a load does not end"
        result = self.manager.query_prefetch_status(handle)
        came = [
            keys[at]
            for keys, hits in zip(groups, result.hit_cells, strict=True)
            for at in hits.get_indices_list()
        ]
        if came:
            with self.manager.read_prefetched_results(came, result.l1_owners) as objects:
                for key, it in zip(came, objects, strict=True):
                    assert bytes(it.byte_array) == content(key, it.get_size()), "other bytes"
            self.manager.finish_read_prefetched(came, l1_owners=result.l1_owners)
        return result.l2_hit_count

    def forget(self) -> None:
        """Evicts all there is in L1."""
        self.manager.clear()

    def run(self, prompts: list[list[ObjectKey]]) -> int:
        """Asks for prompts, and computes what is not found: how many chunks were found."""
        found = 0
        for keys in prompts:
            came = self.load(keys)
            found += came
            self.store(keys[came:])
            self.forget()
        return found

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.manager.close()


def until(what: Any, why: str, seconds: float = 60.0) -> None:
    """Tries until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.05)
