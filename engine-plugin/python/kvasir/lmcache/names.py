"""What objects of LMCache are called."""

import dataclasses
import math
from collections.abc import Iterable

import lmcache
import torch
from lmcache.v1.distributed.api import ObjectKey

from kvasir import Layout, Namespace

# Shape and type of each tensor of an object.
Geometry = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def geometry(shapes: Iterable[torch.Size], dtypes: Iterable[torch.dtype]) -> Geometry:
    tensors = zip(shapes, dtypes, strict=True)
    return tuple((tuple(shape), dtype) for shape, dtype in tensors)


class Names:
    """Of objects that look alike: opaque chunks of a namespace of their own.

    What the bytes of a tensor mean, such as the order of its axes, is LMCache's affair, so its
    version is in the namespace. The memory format that its objects have is that of their
    allocator's default, says nothing of their content, and is not told with a lookup.
    """

    def __init__(self, geometry: Geometry, weights: str) -> None:
        self.bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in geometry)
        self.layout = Layout.opaque(self.bytes)
        self.namespace = Namespace(
            self.layout,
            architecture=f"lmcache {lmcache.__version__} {geometry}",
            weights=weights,
        )

    @staticmethod
    def name(key: ObjectKey) -> bytes:
        """All that LMCache has in its keys: hash, model, rank, group and salt."""
        return ascii(dataclasses.astuple(key)).encode()

    def key(self, key: ObjectKey) -> bytes:
        return self.namespace.opaque_key(self.name(key))
