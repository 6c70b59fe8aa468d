"""The client, with a real daemon."""

import asyncio
import gc
import os
import random
import sys
import threading
import time

import coded
import numpy
import pytest
from conftest import Daemon

from kvasir import AsyncClient, Client, Error, Layout, Namespace, Profile

LAYOUT = Layout(layers=3, kv_heads=2, head_dim=8, tokens=16, dtype="bf16")


def namespace(salt: bytes = b"") -> Namespace:
    return Namespace(LAYOUT, architecture="a", weights="w", rope="r", salt=salt)


def chunk(seed: int) -> bytes:
    return random.Random(seed).randbytes(LAYOUT.chunk_bytes)


def test_what_is_put_comes_back(daemon: Daemon) -> None:
    client = Client(daemon.endpoint)
    keys = namespace().prefix_keys(list(range(50)))
    assert len(keys) == 3 and all(len(key) == 32 for key in keys)
    for index, key in enumerate(keys[:2]):
        assert client.put(key, LAYOUT, chunk(index))
        assert not client.put(key, LAYOUT, chunk(index))
    assert client.lookup(keys) == 2
    came = client.get(keys)
    assert len(came) == 2
    for index, it in enumerate(came):
        assert it.layout == LAYOUT
        assert b"".join(bytes(layer) for layer in it.layers) == chunk(index)
    assert client.delete(keys) == 2
    assert client.lookup(keys) == 0 and client.get(keys) == []
    assert {"memory", "disk"} <= set(client.stats())


def test_bytes_are_seen_without_a_copy(daemon: Daemon) -> None:
    client = Client(daemon.endpoint)
    key = namespace().opaque_key(b"a name")
    array = numpy.frombuffer(chunk(1), dtype=numpy.uint16)
    client.put(key, LAYOUT, array)
    (came,) = client.get([key])
    layer = came.layers[1]
    view = memoryview(layer)
    assert view.readonly and len(layer) == LAYOUT.layer_bytes
    seen = numpy.frombuffer(layer, dtype=numpy.uint16)
    assert numpy.shares_memory(seen, numpy.frombuffer(layer, dtype=numpy.uint16))
    # It stays, whatever becomes of what it came from.
    del client, came, layer, view
    gc.collect()
    size = LAYOUT.layer_bytes // 2
    assert (seen == array[size : 2 * size]).all()
    with pytest.raises(ValueError):
        seen[0] = 1


class Tensor:
    """Has DLPack and no buffer, as tensors of torch do; of the version that it is told."""

    def __init__(self, array: numpy.ndarray, version: int, device: int = 1) -> None:
        self._array = array
        self._version = version
        self._device = device

    def __dlpack__(self, **options: object) -> object:
        if self._version == 0 and options:
            raise TypeError("what is a version?")
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0


@pytest.mark.parametrize("version", [0, 1])
def test_tensors_are_seen_without_a_copy(daemon: Daemon, version: int) -> None:
    client = Client(daemon.endpoint)
    key = namespace().opaque_key(b"a tensor")
    array = numpy.frombuffer(bytearray(chunk(2)), dtype=numpy.float32)
    # Behind the beginning of what it is a part of.
    whole = numpy.concatenate([array[:4], array])
    tensor = whole[4:].reshape(2, -1)
    client.put(key, LAYOUT, Tensor(tensor, version))
    assert sys.getrefcount(tensor) == 2
    (came,) = client.get([key])
    assert b"".join(bytes(layer) for layer in came.layers) == chunk(2)

    layer = came.layers[0]
    seen = numpy.from_dlpack(layer)
    assert numpy.shares_memory(seen, numpy.frombuffer(layer, dtype=numpy.uint8))
    del client, came, layer
    gc.collect()
    assert bytes(seen) == chunk(2)[: LAYOUT.layer_bytes] and not seen.flags.writeable


def test_tensors_that_cannot_be_seen_are_refused(daemon: Daemon) -> None:
    client = Client(daemon.endpoint)
    key = namespace().opaque_key(b"a tensor")
    array = numpy.frombuffer(bytearray(chunk(2)), dtype=numpy.float32).reshape(2, -1)
    with pytest.raises(BufferError, match="contiguous"):
        client.put(key, LAYOUT, Tensor(array.T, 1))
    with pytest.raises(BufferError, match="on a device"):
        client.put(key, LAYOUT, Tensor(array, 1, device=2))
    with pytest.raises(ValueError, match="bytes"):
        client.put(key, LAYOUT, Tensor(array[:1], 1))
    client.put(key, LAYOUT, Tensor(array, 1))
    (came,) = client.get([key])
    with pytest.raises(BufferError, match="DLPack 1.0"):
        came.layers[0].__dlpack__()
    # A capsule that nobody takes frees what it holds.
    came.layers[0].__dlpack__(max_version=(1, 0))
    with pytest.raises(BufferError, match="not copied"):
        came.layers[0].__dlpack__(max_version=(1, 0), copy=True)


def test_names_are_those_of_the_namespace() -> None:
    one, other = namespace(b"one"), namespace(b"other")
    assert one == namespace(b"one") and one != other
    assert one.prefix_keys([1] * 16) != other.prefix_keys([1] * 16)
    assert one.opaque_key(b"x") != one.content_key([1] * 16)
    assert len(one.digest) == 32


def test_what_is_malformed_is_refused(daemon: Daemon) -> None:
    client = Client(daemon.endpoint)
    key = namespace().opaque_key(b"k")
    with pytest.raises(ValueError, match="3072 bytes, the data 3"):
        client.put(key, LAYOUT, b"abc")
    with pytest.raises(ValueError):
        client.lookup([b"short"])
    with pytest.raises(ValueError, match="bf17"):
        Layout(layers=1, kv_heads=1, head_dim=8, tokens=16, dtype="bf17")
    with pytest.raises(ValueError, match="zero"):
        Layout(layers=0, kv_heads=1, head_dim=8, tokens=16, dtype="bf16")
    with pytest.raises(ValueError):
        Client("no endpoint")
    with pytest.raises(ValueError):
        client.get([key], timeout=-1)
    gaps = numpy.zeros((2 * LAYOUT.chunk_bytes,), dtype=numpy.uint8)[::2]
    with pytest.raises(BufferError):
        client.put(key, LAYOUT, gaps)


def test_a_daemon_that_is_not_there_is_an_error_in_time(daemon: Daemon) -> None:
    client = Client(daemon.endpoint, call_timeout=0.3, transfer_timeout=0.3)
    key = namespace().opaque_key(b"k")
    client.put(key, LAYOUT, chunk(0))
    daemon.freeze()
    before = time.monotonic()
    with pytest.raises(TimeoutError):
        client.lookup([key])
    assert time.monotonic() - before < 10
    daemon.thaw()
    daemon.kill()
    with pytest.raises((ConnectionError, TimeoutError)):
        client.lookup([key])
    daemon.start()
    until = time.monotonic() + 30
    while True:
        try:
            assert client.lookup([key]) == 1
            break
        except (ConnectionError, TimeoutError):
            assert time.monotonic() < until
    assert bytes(client.get([key])[0].layers[0]) == chunk(0)[: LAYOUT.layer_bytes]


def test_other_threads_go_on_while_one_waits(daemon: Daemon) -> None:
    client = Client(daemon.endpoint, call_timeout=1.0)
    daemon.freeze()
    count = 0
    over = threading.Event()

    def wait() -> None:
        with pytest.raises(TimeoutError):
            client.lookup([namespace().opaque_key(b"k")])
        over.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not over.is_set():
        count += 1
    thread.join()
    daemon.thaw()
    # With the GIL held, there would be hardly any.
    assert count > 10_000


def test_a_thousand_calls_at_once(daemon: Daemon) -> None:
    """Mixed calls, some of them cancelled: none hangs, none gets another's bytes, nothing leaks."""
    tokens = LAYOUT.tokens
    of_model = coded.layout(tokens)
    chunks = [coded.values(seed, tokens) for seed in range(64)]
    profile = Profile.calibrate(of_model, chunks)
    levels = ["raw", "lossless", "int8", "l1", "l2"]

    async def one(client: AsyncClient, number: int) -> None:
        rng = random.Random(number)
        seed = rng.randrange(64)
        key = namespace().opaque_key(seed.to_bytes(2, "big"))
        match rng.randrange(5):
            case 0 | 1:
                level = rng.choice(levels)
                await client.put(
                    key,
                    of_model,
                    chunks[seed],
                    encoding=level,
                    profile=profile if level == "l2" else None,
                    start=tokens,
                    durable=rng.random() < 0.5,
                )
            case 2:
                for came in await client.get([key]):
                    after = coded.of(b"".join(bytes(it) for it in came.layers), tokens)
                    by = 64 if came.level == "l2" else 1
                    coded.check(came.level, chunks[seed], after, first=False, by=by)
            case 3:
                assert await client.lookup([key]) in (0, 1)
            case 4 if rng.random() < 0.5:
                await client.delete([key])
            case _:
                task = asyncio.ensure_future(client.get([key]))
                await asyncio.sleep(rng.random() / 1000)
                task.cancel()

    async def until_there_is_room(client: AsyncClient, number: int) -> None:
        while True:
            try:
                return await one(client, number)
            except Error as error:
                # So many at once are more than a daemon takes when it has little time.
                if "come back" not in str(error):
                    raise
                await asyncio.sleep(0.05)

    async def all_of_them() -> None:
        client = AsyncClient(daemon.endpoint)
        async with asyncio.timeout(60):
            calls = (until_there_is_room(client, number) for number in range(1000))
            await asyncio.gather(*calls)

    asyncio.run(all_of_them())
    before = resident()
    for _ in range(4):
        asyncio.run(all_of_them())
    gc.collect()
    assert resident() - before < 64 << 20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
