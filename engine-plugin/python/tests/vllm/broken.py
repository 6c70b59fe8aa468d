"""A connector with a defect: what is called `broken` in its options raises."""

from typing import Any

from kvasir import BlockCache
from kvasir.vllm import KvasirConnector


class BrokenCache:
    def __init__(self, cache: BlockCache, call: str) -> None:
        self._cache = cache
        self._call = call

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            raise RuntimeError(f"{name} is broken")
        return getattr(self._cache, name)


class BrokenDict(dict):
    def __getitem__(self, key: object) -> Any:
        raise RuntimeError("what was found is broken")


class BrokenConnector(KvasirConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        call = self._kv_transfer_config.get_from_extra_config("broken", None)
        if call == "plan":
            self._found = BrokenDict()
        self._break = call

    def get_num_new_matched_tokens(self, *arguments: Any) -> Any:
        self._put_broken()
        return super().get_num_new_matched_tokens(*arguments)

    def start_load_kv(self, *arguments: Any, **more: Any) -> None:
        self._put_broken()
        super().start_load_kv(*arguments, **more)

    def _put_broken(self) -> None:
        """Not before the connector has found the cache to be whole."""
        if isinstance(self._cache, BlockCache):
            self._cache = BrokenCache(self._cache, self._break)
