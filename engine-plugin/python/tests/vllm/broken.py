"""A connector with a defect: what is called `broken` in its options raises. With `arrangement`, it is
that of a host whose attention writes blocks in another way.
"""

from typing import Any

from kvasir.vllm import KvasirConnector, layout


class Broken:
    def __init__(self, whole: object, call: str) -> None:
        self._whole = whole
        self._call = call

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            raise RuntimeError(f"{name} is broken")
        return getattr(self._whole, name)


class BrokenDict(dict):
    def __getitem__(self, key: object) -> Any:
        raise RuntimeError("what was found is broken")


class BrokenConnector(KvasirConnector):
    """Not before it has found the cache to be whole."""

    @property
    def _call(self) -> str:
        return self._option("broken", None)

    def set_xfer_handshake_metadata_pp_aware(self, *arguments: Any) -> None:
        super().set_xfer_handshake_metadata_pp_aware(*arguments)
        self._scheduler._cache = Broken(self._scheduler._cache, self._call)
        if self._call == "plan":
            self._scheduler._found = BrokenDict()

    def register_kv_caches(self, *arguments: Any) -> None:
        if self._call == "arrangement":
            layout.arrangement = lambda *_: "another"
        super().register_kv_caches(*arguments)
        self._worker._memory = Broken(self._worker._memory, self._call)
