"""Where SGLang's host pools have their pages: taken from its own tensors.

Nothing is guessed. What is not known here raises `Unsupported`, and the cache stays out of
the way.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from kvasir import BlockCache, Layout, Load, Namespace
from kvasir._identity import DTYPES, Unsupported

# Orders of axes, outermost first, by what SGLang calls them. Tokens are those of a page where
# pages are an axis too, and those of the pool otherwise. Latent pools have no planes.
ORDERS = {
    "layer_first": "plane layer token head dim",
    "page_first": "plane token layer head dim",
    "page_first_direct": "plane page layer token head dim",
    "page_head": "plane page head token layer dim",
}

# As a chunk has them.
AXES = ("page", "layer", "plane", "head", "token", "dim")

# Pages that are loaded together: all layers of one come before its last one does.
LOAD_BYTES = 64 << 20

# Names that a daemon is asked for at once.
FIND_NAMES = 4096

# How long a daemon may take for a page when the engine starts.
ROUND_TRIP_SECONDS = 1.0


@dataclass(frozen=True)
class Geometry:
    """Of one rank's share of a page."""

    order: str
    layers: int
    planes: int
    heads: int
    dim: int
    tokens: int
    dtype: torch.dtype

    def layout(self, parts: int) -> Layout:
        """Of one of `parts` shares of the heads."""
        if self.heads % parts:
            raise Unsupported(f"{self.heads} heads cannot be cut into {parts} parts")
        return Layout(
            layers=self.layers,
            kv_heads=self.heads // parts,
            head_dim=self.dim,
            tokens=self.tokens,
            dtype=DTYPES[str(self.dtype)],
            planes=self.planes,
        )

    def shape(self, pages: int) -> tuple[int, ...]:
        """Of a tensor of that many pages."""
        order = self.order.split()
        sizes = {
            "page": pages,
            "layer": self.layers,
            "plane": self.planes,
            "head": self.heads,
            "token": self.tokens if "page" in order else pages * self.tokens,
            "dim": self.dim,
        }
        return tuple(sizes[axis] for axis in order if axis != "plane" or self.planes == 2)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, with axes as in `AXES`."""
        order = self.order.split()
        if self.planes == 1:
            tensor = tensor.unsqueeze(order.index("plane"))
        if "page" not in order:
            at = order.index("token")
            tensor = tensor.unflatten(at, (-1, self.tokens))
            order.insert(at, "page")
        return tensor.permute([order.index(axis) for axis in AXES])


def geometry(pool: Any) -> Geometry:
    """Of a pool whose kind and layout are known."""
    # Others of these kinds are subclasses, with more in their pages, or less.
    if type(pool) is MHATokenToKVPoolHost:
        planes, heads, dim = 2, pool.head_num, pool.head_dim
        if pool.v_head_dim != dim:
            raise Unsupported("keys and values differ in width")
    elif type(pool) is MLATokenToKVPoolHost:
        planes, heads, dim = 1, 1, pool.kv_cache_dim
    else:
        raise Unsupported(f"pools of {type(pool).__name__} are not known")
    order = ORDERS.get(pool.layout)
    if order is None or (planes == 1 and pool.layout == "page_head"):
        raise Unsupported(f"the host layout {pool.layout} is not known")
    if str(pool.dtype) not in DTYPES:
        raise Unsupported(f"elements of {pool.dtype} are not known")
    if pool.dcp_size != 1 or pool.shared_allocation_domain or pool.stores_page_envelope:
        raise Unsupported("pages of the pool are not where their numbers say")
    found = Geometry(order, pool.layer_num, planes, heads, dim, pool.page_size, pool.dtype)
    buffer = pool.kv_buffer
    if not isinstance(buffer, torch.Tensor) or buffer.device.type != "cpu":
        raise Unsupported("the pool is not one tensor of host memory")
    if tuple(buffer.shape) != found.shape(pool.page_num) or not buffer.is_contiguous():
        raise Unsupported(
            f"the pool is of shape {tuple(buffer.shape)}, not {found.shape(pool.page_num)}"
        )
    return found


def register(caches: list[BlockCache], geometry: Geometry, tensor: torch.Tensor) -> torch.Tensor:
    """Tells caches where pages are, each its share of the heads; returns the tensor's view."""
    view = geometry.view(tensor)
    size = view.element_size()
    page, layer, plane, head, token, dim = (step * size for step in view.stride())
    if dim != size:
        raise Unsupported("elements do not adjoin")
    raw = tensor.view(torch.uint8).reshape(-1).numpy()
    for part, cache in enumerate(caches):
        cache.register(
            [raw[index * layer :] for index in range(geometry.layers)],
            blocks=view.shape[0],
            block=page,
            plane=plane,
            head=head,
            token=token,
            start=part * (geometry.heads // len(caches)) * head,
        )
    return view


class Pages:
    """Pages of a pool, in a daemon's cache, under names that say what of the page they hold."""

    def __init__(
        self,
        pool: Any,
        geometry: Geometry,
        shares: list[bytes],
        namespace: Namespace,
        first: BlockCache,
    ) -> None:
        self._pool = pool
        self._geometry = geometry
        self._shares = shares
        self._namespace = namespace
        self._caches = [first, *(first.beside() for _ in shares[1:])]
        self._view = register(self._caches, geometry, pool.kv_buffer)
        # Pages that are given and taken as tensors come by here.
        self._spare = torch.empty(geometry.shape(1), dtype=geometry.dtype)
        self._spares = [first.beside() for _ in shares]
        register(self._spares, geometry, self._spare)
        self._spare_lock = threading.Lock()
        self._together = max(1, LOAD_BYTES // self.page_bytes)
        self._check()

    @property
    def page_bytes(self) -> int:
        return self._spare.numel() * self._spare.element_size()

    def names(self, keys: list[str], share: int) -> list[bytes]:
        """Of a share of these pages."""
        return [key.encode() + self._shares[share] for key in keys]

    def chunk_keys(self, keys: list[str]) -> list[bytes]:
        """Of all shares of these pages."""
        return [
            self._namespace.opaque_key(name)
            for share in range(len(self._shares))
            for name in self.names(keys, share)
        ]

    def find(self, keys: list[str]) -> int:
        """How many of the leading pages are there, all shares of them."""
        shares = len(self._shares)
        step = max(1, FIND_NAMES // shares)
        for first in range(0, len(keys), step):
            some = keys[first : first + step]
            by_share = (self.names(some, share) for share in range(shares))
            names = [name for page in zip(*by_share, strict=True) for name in page]
            found = self._caches[0].find(names) // shares
            if found < len(some):
                return first + found
        return len(keys)

    def load(self, keys: list[str], indices: torch.Tensor) -> int:
        """Loads pages to where these tokens are; how many leading ones are whole."""
        pages = self._numbers(keys, indices)
        for first in range(0, len(keys), self._together):
            some = slice(first, first + self._together)
            whole = self._load(self._caches, keys[some], pages[some])
            if whole < len(pages[some]):
                return first + whole
        return len(keys)

    def store(
        self, keys: list[str], indices: torch.Tensor, before: str | None = None
    ) -> list[bool]:
        """Stores pages of these tokens: which of them the daemon has now."""
        return self._store(self._caches, keys, self._numbers(keys, indices), before)

    def load_tensor(self, key: str, into: torch.Tensor | None) -> torch.Tensor | None:
        """A page as SGLang has it flat."""
        with self._spare_lock:
            if self._load(self._spares, [key], [0]) == 0:
                return None
            if into is None:
                return self._spare.flatten().clone()
            into.view(-1).copy_(self._spare.flatten())
            return into

    def store_tensor(self, key: str, page: torch.Tensor) -> bool:
        """Stores such a page."""
        with self._spare_lock:
            self._spare.copy_(page.view(self._spare.shape))
            return self._store(self._spares, [key], [0], None) == [True]

    def _load(self, caches: list[BlockCache], keys: list[str], pages: list[int]) -> int:
        loads = [
            cache.load(self.names(keys, share), pages) for share, cache in enumerate(caches)
        ]
        # All of them are waited for: until it has ended, the memory is the load's.
        return min([_ended(load) for load in loads])

    def _store(
        self, caches: list[BlockCache], keys: list[str], pages: list[int], before: str | None
    ) -> list[bool]:
        stored = [
            cache.put(
                self.names(keys, share),
                pages,
                parent=self.names([before], share)[0] if before else None,
            )
            for share, cache in enumerate(caches)
        ]
        return [all(page) for page in zip(*stored, strict=True)]

    def _numbers(self, keys: list[str], indices: torch.Tensor) -> list[int]:
        """Of the pages that hold these tokens."""
        size = self._geometry.tokens
        if indices.numel() != len(keys) * size:
            raise ValueError(f"{len(keys)} pages of {size} tokens, and {indices.numel()} tokens")
        tokens = indices.cpu().view(-1, size)
        first = tokens[:, :1]
        if (first % size).any() or (tokens != first + torch.arange(size)).any():
            raise ValueError("tokens are not those of whole pages")
        return (first.flatten() // size).tolist()

    def _check(self) -> None:
        """Holds what is known of the pool against what it says itself, on a page of nobody's."""
        indices = self._pool.alloc(self._geometry.tokens)
        if indices is None:
            raise Unsupported("the pool has no page left to try: attach the cache to an empty one")
        try:
            (page,) = self._numbers(["canary"], indices)
            self._check_addresses(indices, page)
            self._check_copies(page)
        finally:
            self._pool.free(indices)

    def _check_addresses(self, indices: torch.Tensor, page: int) -> None:
        """Where SGLang's own backends would read the page."""
        said, _ = self._pool.get_page_buffer_meta(indices)
        layers = self._geometry.layers if self._pool.layout == "layer_first" else 1
        planes = self._geometry.planes
        known = [
            self._view[page, layer, plane].data_ptr()
            for layer in range(layers)
            for plane in range(planes)
        ]
        if list(said) != known:
            raise Unsupported("pages are not where they seem: their layout is another one")

    def _check_copies(self, page: int) -> None:
        fill(self._view[page])
        expected = self._shares_of(page)
        if [cache.read(page) for cache in self._caches] != expected:
            raise Unsupported("pages are not read as they are: their layout is another one")
        fill(self._view[page])
        for cache, share in zip(self._caches, expected, strict=True):
            cache.write(page, share)
        if self._shares_of(page) != expected:
            raise Unsupported("pages are not written as they are: their layout is another one")

    def round_trip(self) -> bool:
        """A page by way of the daemon, compared as SGLang itself reads it. False where there is
        no daemon.
        """
        indices = self._pool.alloc(self._geometry.tokens)
        if indices is None:
            return False
        key = "canary" + os.urandom(16).hex()
        try:
            (page,) = self._numbers([key], indices)
            fill(self._view[page])
            first = int(indices[0])
            expected = self._pool.get_data_page(first).clone()
            if self._store(self._caches, [key], [page], None) != [True]:
                return False
            fill(self._view[page])
            if self._load(self._caches, [key], [page]) == 0:
                return False
            if not same(self._pool.get_data_page(first), expected):
                raise Unsupported("a page does not come back as it was stored")
            return True
        finally:
            for share, cache in enumerate(self._caches):
                cache.delete(self.names([key], share))
            self._pool.free(indices)

    def _shares_of(self, page: int) -> list[bytes]:
        """A page as the cache should see it: `[layer, plane, head, token, dim]`, by share."""
        shares = self._view[page].chunk(len(self._shares), dim=2)
        return [
            share.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for share in shares
        ]


def _ended(load: Load) -> int:
    """Its own deadlines see to it."""
    while (whole := load.wait(ROUND_TRIP_SECONDS)) is None:
        pass
    return whole


def fill(view: torch.Tensor) -> None:
    """Any bits, also those that are no numbers."""
    bits = torch.randint(0, 256, (view.numel() * view.element_size(),), dtype=torch.uint8)
    view.copy_(bits.view(view.dtype).view(view.shape))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit."""
    bytes = [it.contiguous().view(-1).view(torch.uint8) for it in (one, other)]
    return torch.equal(*bytes)
