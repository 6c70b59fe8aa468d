"""Tensors of other libraries, as DLPack describes them: those that no library at hand makes."""

import ctypes
import gc

import numpy
import pytest
from conftest import Daemon
from test_client import LAYOUT, chunk, namespace, resident

from kvasir import Chunk, Client, Layout

ON_CPU, ON_GPU, PINNED = 1, 2, 3
FLOAT = 2


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Unversioned(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
in_capsule = ctypes.pythonapi.PyCapsule_GetPointer
in_capsule.restype = ctypes.c_void_p
in_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Made:
    """A tensor of bytes, of which all is as one says."""

    def __init__(
        self,
        data: bytes,
        shape: list[int],
        strides: list[int] | None = None,
        *,
        bits: int = 8,
        offset: int = 0,
        device: int = ON_CPU,
        version: int | None = None,
        name: bytes | None = None,
    ) -> None:
        self._data = ctypes.create_string_buffer(data, len(data))
        numbers = ctypes.c_int64 * len(shape)
        self._shape = numbers(*shape)
        self._strides = numbers(*strides) if strides else None
        tensor = Tensor(
            ctypes.addressof(self._data),
            device,
            0,
            len(shape),
            FLOAT,
            bits,
            1,
            self._shape,
            self._strides,
            offset,
        )
        self._device = device
        self._made: Unversioned | Versioned
        if version is None:
            self._made = Unversioned(tensor, None, None)
            self._name = name or b"dltensor"
        else:
            self._made = Versioned(version, 0, None, None, 0, tensor)
            self._name = name or b"dltensor_versioned"

    def __dlpack__(self, **options: object) -> object:
        return new_capsule(ctypes.addressof(self._made), self._name, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0


def joined(came: Chunk) -> bytes:
    return b"".join(bytes(layer) for layer in came.layers)


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("device", [ON_CPU, PINNED])
def test_tensors_are_where_they_say(
    daemon: Daemon, version: int | None, device: int
) -> None:
    client, size = Client(daemon.endpoint), LAYOUT.chunk_bytes
    data = b"before" + chunk(1)
    kinds = {
        "no strides": Made(data, [size], offset=6, version=version, device=device),
        "strides": Made(data, [2, size // 2], [size // 2, 1], offset=6, version=version),
        # Of one row, however far the next one would be.
        "one row": Made(data, [1, size], [12345, 1], offset=6, version=version),
        "wide": Made(data, [size // 4], bits=32, offset=6, version=version),
    }
    for name, tensor in kinds.items():
        key = namespace().opaque_key(name.encode())
        client.put(key, LAYOUT, tensor)
        assert joined(client.get([key])[0]) == chunk(1), name


@pytest.mark.parametrize("version", [None, 1])
def test_tensors_that_are_not_what_they_say_are_refused(
    daemon: Daemon, version: int | None
) -> None:
    client, size = Client(daemon.endpoint), LAYOUT.chunk_bytes
    key, data = namespace().opaque_key(b"k"), chunk(1)
    for why, tensor in {
        "contiguous": Made(data, [size // 2], [2], version=version),
        "a device": Made(data, [size], device=ON_GPU, version=version),
        "given away": Made(data, [size], version=version, name=b"used_dltensor"),
        # Of half a byte each, and an odd number of them.
        "has gaps": Made(data, [size - 1], bits=4, version=version),
    }.items():
        with pytest.raises(BufferError, match=why):
            client.put(key, LAYOUT, tensor)
    with pytest.raises(BufferError, match="another version"):
        client.put(key, LAYOUT, Made(data, [size], version=2))
    for empty in (Made(data, [0], version=version), Made(data, [4, 0], version=version)):
        with pytest.raises(ValueError, match="the data 0"):
            client.put(key, LAYOUT, empty)
    assert client.lookup([key]) == 0


def test_what_is_given_says_what_it_is(daemon: Daemon) -> None:
    client, key = Client(daemon.endpoint), namespace().opaque_key(b"k")
    client.put(key, LAYOUT, chunk(1))
    layer = client.get([key])[0].layers[0]
    assert layer.__dlpack_device__() == (ON_CPU, 0)
    capsule = layer.__dlpack__(max_version=(1, 0))
    made = Versioned.from_address(in_capsule(capsule, b"dltensor_versioned"))
    of = made.tensor
    assert (made.major, made.minor, made.flags) == (1, 0, 1)
    assert (of.device_type, of.device_id, of.dimensions, of.byte_offset) == (ON_CPU, 0, 1, 0)
    assert (of.type_code, of.type_bits, of.type_lanes) == (1, 8, 1)
    assert (of.shape[0], of.strides[0]) == (LAYOUT.layer_bytes, 1)
    assert ctypes.string_at(of.data, LAYOUT.layer_bytes) == chunk(1)[: LAYOUT.layer_bytes]
    for wanted in ((ON_GPU, 0), (ON_CPU, 1)):
        with pytest.raises(BufferError, match="on the CPU"):
            layer.__dlpack__(max_version=(1, 0), dl_device=wanted)


def test_what_was_given_is_freed(daemon: Daemon) -> None:
    """By whoever took it, or with the capsule that nobody took."""
    layout = Layout(layers=1, kv_heads=1, head_dim=64, tokens=1 << 15, dtype="f32")
    client, key = Client(daemon.endpoint), namespace().opaque_key(b"k")
    ones = numpy.ones(layout.chunk_bytes, dtype=numpy.uint8)
    # Decoded, it is in memory of its own, and not in the daemon's.
    client.put(key, layout, ones, encoding="lossless", durable=False)
    assert client.get([key])[0].level == "lossless"

    def give() -> None:
        layer = client.get([key])[0].layers[0]
        layer.__dlpack__(max_version=(1, 0))
        seen = numpy.from_dlpack(layer)
        del layer
        assert seen[-1] == 1

    give()
    before = resident()
    for _ in range(20):
        give()
    gc.collect()
    # Of the sixteen megabytes that each would leave.
    assert resident() - before < 100 << 20
