"""Kvasir, a cache for the keys and values of language models.

`Client` and `AsyncClient` store and fetch chunks of KV. Serving engines use a
connector instead: `kvasir.vllm`, `kvasir.sglang`; LMCache's daemon an adapter, `kvasir.lmcache`.
"""

from kvasir._asyncio import AsyncClient
from kvasir._native import (
    BlockCache,
    Chunk,
    Client,
    Data,
    DecodeError,
    Error,
    Layout,
    Load,
    Namespace,
    Profile,
    ProfileError,
    Residency,
    Save,
    SlotCache,
    __version__,
)

__all__ = [
    "AsyncClient",
    "BlockCache",
    "Chunk",
    "Client",
    "Data",
    "DecodeError",
    "Error",
    "Layout",
    "Load",
    "Namespace",
    "Profile",
    "ProfileError",
    "Residency",
    "Save",
    "SlotCache",
    "__version__",
]
