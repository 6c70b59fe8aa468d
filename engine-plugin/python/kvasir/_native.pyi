"""The native half. Times are in seconds."""

from collections.abc import Awaitable, Sequence
from typing import final

from typing_extensions import Buffer

__version__: str

class Error(Exception):
    """A call of a daemon failed.

    What Python has exceptions for comes as these: `ValueError` for what is malformed,
    `TimeoutError` for a deadline, `ConnectionError` where no daemon answers.
    """

@final
class Layout:
    """Geometry of a chunk: `[layer, plane (K, V), kv_head, token, dim]`, row-major, little-endian.

    `dtype` is one of f32, f16, bf16, f8e4m3, f8e5m2. Of latent attention, there is one plane.
    """

    def __new__(
        cls,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        dtype: str,
        planes: int = 2,
    ) -> Layout: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def layer_bytes(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...

@final
class Namespace:
    """Everything outside of the tokens that changes KV."""

    def __new__(
        cls,
        layout: Layout,
        *,
        architecture: str,
        weights: str,
        rope: str = "",
        adapter: tuple[str, str] | None = None,
        tokenizer: bytes | None = None,
        salt: bytes | None = None,
    ) -> Namespace: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def digest(self) -> bytes: ...
    def prefix_keys(self, tokens: Sequence[int]) -> list[bytes]: ...
    def content_key(self, tokens: Sequence[int]) -> bytes: ...
    def opaque_key(self, name: bytes) -> bytes: ...

@final
class Data:
    """Bytes that came from a daemon; has the buffer protocol, read-only."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Chunk:
    """A chunk that came: its layers in order, each as its layout says."""

    @property
    def layout(self) -> Layout: ...
    @property
    def layers(self) -> list[Data]: ...

@final
class Client:
    """A daemon. Does not wait for it: calls fail until it is there."""

    def __new__(
        cls,
        endpoint: str = "127.0.0.1:7420",
        *,
        call_timeout: float | None = None,
        transfer_timeout: float | None = None,
    ) -> Client: ...
    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many of the leading chunks are there."""

    def put(
        self, key: bytes, layout: Layout, data: Buffer, *, durable: bool = True
    ) -> bool:
        """Stores a chunk; true if it was not there.

        Its bytes are not copied: leave them as they are until this returns.
        """

    def get(
        self, keys: Sequence[bytes], *, timeout: float | None = None
    ) -> list[Chunk]:
        """The leading chunks that are there and came whole."""

    def delete(self, keys: Sequence[bytes]) -> int:
        """Deletes chunks; how many were there."""

    def stats(self) -> dict[str, dict[str, int]]:
        """What the daemon holds, by tier: chunks, bytes, capacity."""

    @property
    def data_path(self) -> str | None: ...
    def lookup_async(self, keys: Sequence[bytes]) -> Awaitable[int]: ...
    def put_async(
        self, key: bytes, layout: Layout, data: Buffer, *, durable: bool = True
    ) -> Awaitable[bool]: ...
    def get_async(
        self, keys: Sequence[bytes], *, timeout: float | None = None
    ) -> Awaitable[list[Chunk]]: ...
    def delete_async(self, keys: Sequence[bytes]) -> Awaitable[int]: ...

@final
class BlockCache:
    """Blocks of an engine, named by what it calls them, in a daemon's cache.

    `lookup_timeout` bounds `find`, `load_timeout` a load, `store_timeout` the storing of one
    block. A daemon that has failed is left
    alone for `cooldown`, twice as long each time; what is asked for meanwhile is not there.
    `store_buffer` bounds the bytes that wait to be stored.
    """

    def __new__(
        cls,
        endpoint: str,
        namespace: Namespace,
        *,
        lookup_timeout: float = 0.05,
        load_timeout: float = 2.0,
        store_timeout: float = 10.0,
        cooldown: float = 1.0,
        store_buffer: int = ...,
        durable: bool = True,
    ) -> BlockCache: ...
    def beside(self) -> BlockCache:
        """The same cache, of other memory, which is to be registered."""

    def register(
        self,
        layers: Sequence[Buffer],
        *,
        blocks: int,
        block: int,
        plane: int,
        head: int,
        token: int,
        start: int = 0,
    ) -> None:
        """Says where the engine's KV is: a buffer a layer, with these strides in bytes. Once."""

    def read(self, block: int) -> bytes:
        """A block of the engine's memory, as a chunk holds it."""

    def write(self, block: int, chunk: bytes) -> None:
        """Writes a block of the engine's memory."""

    def find(self, names: Sequence[bytes]) -> int:
        """How many of the leading blocks can be loaded."""

    def load(self, names: Sequence[bytes], blocks: Sequence[int]) -> Load:
        """Starts to load blocks into memory, which is the load's until it has ended."""

    def store(
        self,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        parent: bytes | None = None,
    ) -> int:
        """Copies blocks out of memory and has them stored; returns how many will be."""

    def put(
        self,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        parent: bytes | None = None,
    ) -> list[bool]:
        """Stores those blocks that the daemon lacks, and waits: which of them it has now."""

    def flush(self, timeout: float) -> bool:
        """Waits until nothing waits to be stored; false after `timeout` seconds."""

    def stats(self) -> dict[str, int]:
        """What became of loads and stores so far."""

@final
class Load:
    """Blocks on their way into an engine's memory."""

    def poll(self) -> int | None:
        """How many leading blocks have come whole, once nothing more comes."""

    def wait(self, timeout: float) -> int | None:
        """As `poll`, and waits for it."""

    def wait_layer(self, layer: int) -> bool:
        """Waits until a layer of all blocks is there: false if it will not be."""
