"""The native half. Times are in seconds."""

from collections.abc import Awaitable, Sequence
from typing import Any, Literal, Protocol, final

from typing_extensions import Buffer

__version__: str

class Error(Exception):
    """A call of a daemon failed.

    What Python has exceptions for comes as these: `ValueError` for what is malformed,
    `TimeoutError` for a deadline, `ConnectionError` where no daemon answers.
    """

class DecodeError(Error):
    """A chunk came as it was stored, and cannot be decoded: delete it, or get those before it."""

class ProfileError(DecodeError):
    """The profile that a chunk was encoded with is missing, or of no use.

    Give it to the daemon (`Client.put_profile`), or get the chunks before this one.
    """

Level = Literal["raw", "lossless", "int8", "int4", "cachegen", "l0", "l1", "l2"]
"""In which form a chunk is stored.

`raw` and `lossless` are exact, bit for bit. `int8` is off by half a scale at most, which is the
largest of a token and head over 127; `int4` has 4 bits and a scale after a Hadamard transform, of up
to 128 channels, and `cachegen` is that of the paper, to compare with.

Of `l0`, `l1` and `l2` each holds the coarser ones. Values are off by half a step at most, and by what
rounding to the type of elements adds. At `l0`, a step is 1.35 deviations of a layer's keys, and 4.5
of its values, from the means of their channels; at `l1` a third of that, at `l2` a ninth. With a
profile the same holds of coefficients, so that values are off by as much in the mean. The first four
tokens of a prompt are exact. A chunk that would take more bytes than it has is left exact.

Elements of 8 bits are quantised already: `raw` and `lossless` alone.
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
    @staticmethod
    def opaque(bytes: int) -> Layout:
        """Of bytes that mean something to their writer alone."""

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

class Tensor(Protocol):
    """What has DLPack: tensors of torch, arrays of numpy and jax, and others."""

    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class Data:
    """Bytes that came from a daemon; has the buffer protocol and DLPack, read-only."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class Profile:
    """What the keys and values of a model are like.

    Chunks at levels `l0` to `l2` that are encoded with one take fewer bytes, above all those of few
    tokens, and can be decoded only by those who have it: the daemon keeps it. `data` is the bytes of
    one.
    """

    def __new__(cls, data: Buffer) -> Profile: ...
    @staticmethod
    def calibrate(layout: Layout, chunks: Sequence[Buffer | Tensor]) -> Profile:
        """Learnt from chunks of a model, which are as they are put; it is good for any number of
        tokens.

        Take some thousand tokens of what the model usually reads, and not the first chunks of
        prompts. Can take minutes for a large model.
        """

    @property
    def digest(self) -> bytes:
        """What chunks name it by."""

    def __bytes__(self) -> bytes: ...

@final
class Chunk:
    """A chunk that came: its layers in order, decoded, each as its layout says."""

    @property
    def layout(self) -> Layout: ...
    @property
    def layers(self) -> list[Data]: ...
    @property
    def level(self) -> str:
        """The `Level` that it came at."""

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
        self,
        key: bytes,
        layout: Layout,
        data: Buffer | Tensor,
        *,
        encoding: Level = "raw",
        profile: Profile | None = None,
        start: int = 0,
        durable: bool = True,
    ) -> bool:
        """Stores a chunk; true if it was not there.

        It is stored at the level `encoding`, and its profile with it, if there is one. `start` is
        the position of its first token: at nested levels, the first tokens of a prompt are exact.
        Its bytes are not copied: leave them as they are until this returns.
        """

    def get(
        self,
        keys: Sequence[bytes],
        *,
        finest: Level | None = None,
        timeout: float | None = None,
    ) -> list[Chunk]:
        """The leading chunks that are there and came whole, decoded.

        What is stored at a nested level comes up to `finest`. Raises `ProfileError` for a chunk
        whose profile nobody has, and `DecodeError` for one that is none.
        """

    def put_profile(self, profile: Profile) -> bool:
        """Gives the daemon a profile to keep; true if it was not there."""

    def delete(self, keys: Sequence[bytes]) -> int:
        """Deletes chunks; how many were there."""

    def stats(self) -> dict[str, dict[str, int]]:
        """What the daemon holds, by tier: chunks, bytes, capacity."""

    @property
    def data_path(self) -> str | None: ...
    def lookup_async(self, keys: Sequence[bytes]) -> Awaitable[int]: ...
    def put_async(
        self,
        key: bytes,
        layout: Layout,
        data: Buffer | Tensor,
        *,
        encoding: Level = "raw",
        profile: Profile | None = None,
        start: int = 0,
        durable: bool = True,
    ) -> Awaitable[bool]: ...
    def get_async(
        self,
        keys: Sequence[bytes],
        *,
        finest: Level | None = None,
        timeout: float | None = None,
    ) -> Awaitable[list[Chunk]]: ...
    def put_profile_async(self, profile: Profile) -> Awaitable[bool]: ...
    def delete_async(self, keys: Sequence[bytes]) -> Awaitable[int]: ...

@final
class BlockCache:
    """Blocks of an engine, named by what it calls them, in a daemon's cache.

    `lookup_timeout` bounds `find`, `load_timeout` a load, `store_timeout` the storing of one
    block. A daemon that has failed is left
    alone for `cooldown`, twice as long each time; what is asked for meanwhile is not there.
    `store_buffer` bounds the bytes that wait to be stored.

    Blocks are stored at the level `encoding`, and loaded whatever level they are stored at. A block
    whose profile is not here does not come; it is fetched meanwhile, for the next load. Without a
    parent, a block is the first of its prompt.
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
        encoding: Level = "raw",
        profile: Profile | None = None,
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

    def save(
        self,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        parent: bytes | None = None,
    ) -> Save:
        """The same, layer by layer as they are computed: none is copied yet."""

    def put(
        self,
        names: Sequence[bytes],
        blocks: Sequence[int],
        *,
        parent: bytes | None = None,
    ) -> list[bool]:
        """Stores those blocks that the daemon lacks, and waits: which of them it has now."""

    def delete(self, names: Sequence[bytes]) -> int:
        """Deletes blocks; how many there were."""

    def flush(self, timeout: float) -> bool:
        """Waits until nothing waits to be stored; false after `timeout` seconds."""

    def follow(self, *, limit: int = ...) -> Residency:
        """Follows which blocks, that are to be named, the daemon has: the last `limit`."""

    def stats(self) -> dict[str, int]:
        """What became of loads and stores so far."""

@final
class Load:
    """Blocks on their way into an engine's memory."""

    def poll(self) -> int | None:
        """How many leading blocks have come whole, once nothing more comes."""

    def may_store(self) -> bool:
        """Whether what is computed over these blocks may be stored, once nothing more comes.

        Not where they came coarser than blocks are stored here: nobody could tell.
        """

    def wait(self, timeout: float) -> int | None:
        """As `poll`, and waits for it."""

    def wait_layer(self, layer: int) -> bool:
        """Waits until a layer of all blocks is there: false if it will not be."""

@final
class Save:
    """Blocks on their way out of an engine's memory."""

    def layer(self, layer: int) -> None:
        """Copies a layer of all blocks."""

    def end(self) -> int:
        """Copies the layers that were not, and has the blocks stored; how many will be."""

    def drop(self) -> None:
        """Forgets them."""

@final
class Residency:
    """Which of an engine's blocks the daemon has, as it tells: for KV events.

    What was told holds until it is told otherwise: while the daemon cannot be reached nothing
    changes, and when it is back it is compared. For each chunk of the daemon, 20 to 40 bytes are
    kept.
    """

    def expect(self, names: Sequence[bytes]) -> None:
        """Asks to be told about blocks, whether they are there already or come one day."""

    def take(self) -> list[tuple[bytes, bool]]:
        """What has become of them since, in order: a name, and whether the daemon has it.

        One that it has not any more is not followed until it is asked for again.
        """

    def clear(self) -> None:
        """Gives all of them up: those that were there are told to be gone."""

@final
class SlotCache:
    """Slots of an engine's host memory, whose bytes only it understands, in a daemon's cache.

    `memory` is one buffer of slots as large as a chunk of the namespace, which has one layer.
    Jobs read and write it without a copy, and end behind the caller's back: see `finished`.

    `lookup_timeout` bounds `find`, `load_timeout` a load, `store_timeout` each slot of a store. A
    daemon that has failed is left alone for `cooldown`, twice as long each time; what is asked for
    meanwhile is not there. `store_buffer` bounds the bytes of slots that stores hold.
    """

    def __new__(
        cls,
        endpoint: str,
        namespace: Namespace,
        memory: Buffer,
        *,
        lookup_timeout: float = 0.05,
        load_timeout: float = 2.0,
        store_timeout: float = 5.0,
        cooldown: float = 1.0,
        store_buffer: int = ...,
        durable: bool = True,
    ) -> SlotCache: ...
    def read(self, slot: int) -> bytes:
        """What a slot holds."""

    def write(self, slot: int, bytes: bytes) -> None:
        """Writes a slot."""

    def find(self, names: Sequence[bytes]) -> list[bool]:
        """Of each name, whether it can be loaded."""

    def delete(self, names: Sequence[bytes]) -> int:
        """Deletes what has these names; how many there were."""

    def load(self, job: int, names: Sequence[bytes], slots: Sequence[int]) -> None:
        """Begins to load into slots, which are the job's until it has ended.

        A slot is written when all of it has come and matches its checksum, and not before.
        """

    def store(
        self,
        job: int,
        names: Sequence[bytes],
        slots: Sequence[int],
        parents: Sequence[bytes | None],
        tokens: int | None,
    ) -> None:
        """Begins to store slots, in order, which stay as they are until the job has ended.

        `parents` are the names before them in their prompt, `tokens` what it costs to compute one.
        Where `store_buffer` has no room for all, the last ones are left out.
        """

    def finished(self) -> list[tuple[int, list[bool], float]]:
        """Jobs that have ended since: number, which of their slots came whole, seconds."""

    def drain(self, timeout: float, *, cut: bool = False) -> bool:
        """Waits until all jobs have ended; false after `timeout` seconds.

        Jobs that are `cut` store nothing behind the slot that they are at.
        """

    @property
    def rests(self) -> bool:
        """Whether the daemon is left alone at this moment."""

    def close(self) -> None:
        """Gives the memory back, once no job is in it."""

    def follow(self, *, limit: int = ...) -> Residency:
        """Follows which blocks, that are to be named, the daemon has: the last `limit`."""

    def stats(self) -> dict[str, int]:
        """What became of jobs and calls so far."""
