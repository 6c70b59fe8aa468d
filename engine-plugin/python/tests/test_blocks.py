"""Blocks of an engine: found, loaded into its memory, and stored."""

import shutil
import time
from pathlib import Path
from typing import Any

import coded
import numpy
import pytest
from conftest import Daemon

from kvasir import BlockCache, Layout, Namespace, Profile, Residency

LAYERS, HEADS, TOKENS, DIM, BLOCKS = 3, 2, 16, 8, 40
LAYOUT = Layout(layers=LAYERS, kv_heads=HEADS, head_dim=DIM, tokens=TOKENS, dtype="bf16")
NAMESPACE = Namespace(LAYOUT, architecture="a", weights="w")

# Orders of axes of engines, and the strides of these, in elements.
ORDERS = ["block head token plane", "plane block token head", "block plane token head"]
SIZES = {"block": BLOCKS, "head": HEADS, "token": TOKENS, "plane": 2}


class Engine:
    """Memory of random bits, and a cache that knows of it."""

    def __init__(self, endpoint: str, order: str = ORDERS[0], **limits: Any) -> None:
        axes = order.split()
        shape = [SIZES[axis] for axis in axes] + [DIM]
        rng = numpy.random.default_rng(1)
        self.layers = [
            rng.integers(0, 1 << 16, shape, dtype=numpy.uint16) for _ in range(LAYERS)
        ]
        self._axes = [axes.index(axis) for axis in ("block", "plane", "head", "token")]
        strides = dict(zip(axes, self.layers[0].strides, strict=False))
        self.cache = BlockCache(endpoint, NAMESPACE, **limits)
        self.cache.register(
            [layer.view(numpy.uint8).reshape(-1) for layer in self.layers],
            blocks=BLOCKS,
            **strides,
        )

    def block(self, block: int) -> bytes:
        """As a chunk has it: `[layer, plane, head, token, dim]`."""
        return b"".join(
            layer.transpose(*self._axes, 4)[block].tobytes() for layer in self.layers
        )


def names(count: int) -> list[bytes]:
    return [f"block {index}".encode() for index in range(count)]


def whole(engine: Engine, count: int, blocks: list[int]) -> int | None:
    return engine.cache.load(names(count), blocks).wait(30)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_come_back_elsewhere(daemon: Daemon, order: str) -> None:
    engine = Engine(daemon.endpoint, order)
    before = [engine.block(block) for block in range(BLOCKS)]
    assert engine.cache.find(names(10)) == 0
    assert engine.cache.store(names(10), list(range(10))) == 10
    assert engine.cache.store(names(10), list(range(10))) == 0
    assert engine.cache.flush(30)
    assert engine.cache.find(names(12)) == 10
    # Another engine, with its axes in another order.
    other = Engine(daemon.endpoint, ORDERS[1])
    load = other.cache.load(names(10), list(range(39, 29, -1)))
    assert all(load.wait_layer(layer) for layer in range(LAYERS))
    assert load.wait(30) == 10 and load.poll() == 10
    assert [other.block(block) for block in range(39, 29, -1)] == before[:10]
    # And nothing else has changed.
    fresh = Engine(daemon.endpoint, ORDERS[1])
    assert all(other.block(block) == fresh.block(block) for block in range(30))


def test_what_is_not_there_does_not_come(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint)
    engine.cache.store(names(4), [0, 1, 2, 3])
    assert engine.cache.flush(30)
    load = engine.cache.load(names(6), [10, 11, 12, 13, 14, 15])
    assert load.wait(30) == 4
    assert not load.wait_layer(0)
    assert [engine.block(10 + index) for index in range(4)] == [
        engine.block(index) for index in range(4)
    ]


def test_a_daemon_that_fails_costs_its_time_once(daemon: Daemon) -> None:
    limits = {"lookup_timeout": 0.2, "load_timeout": 0.5, "cooldown": 5.0}
    engine = Engine(daemon.endpoint, **limits)
    engine.cache.store(names(4), [0, 1, 2, 3])
    assert engine.cache.flush(30)
    daemon.freeze()
    begun = time.monotonic()
    assert engine.cache.find(names(4)) == 0
    assert 0.15 < time.monotonic() - begun < 5
    begun = time.monotonic()
    for _ in range(1000):
        assert engine.cache.find(names(4)) == 0
        assert whole(engine, 4, [5, 6, 7, 8]) == 0
    assert time.monotonic() - begun < 2
    assert engine.cache.stats()["calls_skipped"] == 2000
    daemon.thaw()
    until = time.monotonic() + 30
    while engine.cache.find(names(4)) < 4:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert whole(engine, 4, [5, 6, 7, 8]) == 4


def test_storing_can_be_waited_for(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint, lookup_timeout=1.0, store_timeout=1.0, cooldown=5.0)
    assert engine.cache.put(names(3), [0, 1, 2]) == [True] * 3
    # What is there is not stored again, whatever is between.
    assert engine.cache.put(names(6), list(range(6)), parent=b"before") == [True] * 6
    assert engine.cache.stats()["stored"] == 6
    assert engine.cache.find(names(7)) == 6
    with pytest.raises(ValueError, match="beyond"):
        engine.cache.put([b"another"], [BLOCKS])
    daemon.freeze()
    begun = time.monotonic()
    assert engine.cache.put([b"new"] * 9, [7] * 9) == [False] * 9
    for _ in range(100):
        assert engine.cache.put([b"new"], [7]) == [False]
    assert time.monotonic() - begun < 4
    daemon.thaw()


def test_blocks_can_be_deleted(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint, lookup_timeout=1.0, cooldown=5.0)
    assert engine.cache.store(names(3), [0, 1, 2]) == 3 and engine.cache.flush(30)
    assert engine.cache.delete([b"another", *names(3)[1:]]) == 2
    # What is gone can be stored again.
    assert engine.cache.store(names(3), [0, 1, 2]) == 2 and engine.cache.flush(30)
    assert engine.cache.find(names(3)) == 3
    assert engine.cache.delete(names(3)[1:]) == 2 and engine.cache.delete([]) == 0
    assert engine.cache.find(names(3)) == 1
    daemon.freeze()
    begun = time.monotonic()
    assert [engine.cache.delete(names(3)) for _ in range(100)] == [0] * 100
    assert time.monotonic() - begun < 5
    daemon.thaw()


def test_a_daemon_that_refuses_a_block_is_asked_on(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--memory", "1MiB", "--no-disk")
    layout = Layout(layers=1, kv_heads=1, head_dim=64, tokens=1 << 15, dtype="f32")
    assert layout.chunk_bytes > 8 << 20
    cache = BlockCache(daemon.endpoint, Namespace(layout, architecture="a", weights="w"))
    memory = numpy.zeros(layout.chunk_bytes, dtype=numpy.uint8)
    half = layout.chunk_bytes // 2
    cache.register([memory], blocks=1, block=2 * half, plane=half, head=half, token=256)
    assert cache.put(names(2), [0, 0]) == [False, False]
    assert cache.find(names(2)) == 0
    stats = cache.stats()
    assert stats["stores_failed"] == 2 and stats["calls_skipped"] == 0
    daemon.kill()


def test_one_cache_may_be_of_several_memories(daemon: Daemon) -> None:
    engine, other = Engine(daemon.endpoint), Engine(daemon.endpoint, ORDERS[1])
    beside = engine.cache.beside()
    with pytest.raises(RuntimeError, match="register"):
        beside.put(names(1), [0])
    axes = dict(zip(ORDERS[1].split(), other.layers[0].strides, strict=False))
    memory = [layer.view(numpy.uint8).reshape(-1) for layer in other.layers]
    beside.register(memory, blocks=BLOCKS, **axes)
    assert engine.cache.put(names(2), [3, 4]) == [True] * 2
    assert beside.load(names(2), [8, 9]).wait(30) == 2
    assert [other.block(8), other.block(9)] == [engine.block(3), engine.block(4)]


def test_latent_attention_has_one_plane(daemon: Daemon) -> None:
    shape = {"layers": LAYERS, "kv_heads": 1, "head_dim": DIM, "tokens": TOKENS, "dtype": "f32"}
    layout = Layout(planes=1, **shape)
    assert layout.chunk_bytes == LAYERS * TOKENS * DIM * 4 == Layout(**shape).chunk_bytes // 2
    with pytest.raises(ValueError, match="not 3"):
        Layout(planes=3, **shape)
    names = Namespace(layout, architecture="a", weights="w")
    cache = BlockCache(daemon.endpoint, names)
    # Layers between the tokens of a block.
    memory = numpy.random.default_rng(1).random((4, TOKENS, LAYERS, DIM), dtype=numpy.float32)
    steps = dict(zip(("block", "token"), memory.strides, strict=False))
    raw = memory.view(numpy.uint8).reshape(-1)
    cache.register(
        [raw[layer * DIM * 4 :] for layer in range(LAYERS)], blocks=4, plane=0, head=0, **steps
    )
    assert cache.read(2) == memory[2].transpose(1, 0, 2).tobytes()
    assert cache.put([b"a"], [2]) == [True] and cache.load([b"a"], [1]).wait(30) == 1
    assert (memory[1] == memory[2]).all() and (memory[0] != memory[3]).all()


def test_what_waits_to_be_stored_is_bounded(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint, store_buffer=3 * LAYOUT.chunk_bytes)
    daemon.freeze()
    assert engine.cache.store(names(10), list(range(10))) == 3
    daemon.thaw()
    assert engine.cache.flush(30)
    assert engine.cache.stats()["stored"] == 3
    # What was not taken can be stored later.
    assert engine.cache.store(names(5), list(range(5))) == 2


def test_what_is_malformed_is_refused(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint)
    with pytest.raises(ValueError):
        engine.cache.load(names(2), [1])
    with pytest.raises(ValueError, match="beyond"):
        engine.cache.store(names(1), [BLOCKS])
    assert whole(engine, 1, [BLOCKS]) == 0
    strides = {"block": 1, "plane": 1, "head": 1, "token": 1}
    with pytest.raises(RuntimeError, match="before"):
        engine.cache.register(
            [numpy.zeros(1 << 16, dtype=numpy.uint8)] * LAYERS, blocks=1, **strides
        )
    unregistered = BlockCache(daemon.endpoint, NAMESPACE)
    with pytest.raises(RuntimeError, match="register"):
        unregistered.load(names(1), [0])
    small = [numpy.zeros(8, dtype=numpy.uint8)] * LAYERS
    with pytest.raises(ValueError, match="blocks take"):
        unregistered.register(small, blocks=BLOCKS, **strides)
    constant = numpy.zeros(1 << 20, dtype=numpy.uint8)
    constant.flags.writeable = False
    with pytest.raises(BufferError):
        unregistered.register([constant] * LAYERS, blocks=1, **strides)


class Coded:
    """Memory of KV of a model, and a cache that stores it at some level."""

    def __init__(self, endpoint: str, seed: int, level: str, **options: Any) -> None:
        layout = coded.layout(TOKENS)
        names = Namespace(layout, architecture="a", weights="w")
        self.layers = coded.values(seed, BLOCKS * TOKENS).reshape(
            coded.LAYERS, 2, coded.HEADS, BLOCKS, TOKENS, coded.DIM
        )
        axes = ("plane", "head", "block", "token")
        steps = dict(zip(axes, self.layers[0].strides, strict=False))
        self.cache = BlockCache(endpoint, names, encoding=level, **options)
        raw = [layer.view(numpy.uint8).reshape(-1) for layer in self.layers]
        self.cache.register(raw, blocks=BLOCKS, **steps)

    def block(self, block: int) -> coded.Values:
        return self.layers[:, :, :, block].copy()


@pytest.mark.parametrize("level", coded.LEVELS)
def test_blocks_are_stored_encoded_and_loaded_decoded(daemon: Daemon, level: str) -> None:
    engine, other = Coded(daemon.endpoint, 1, level), Coded(daemon.endpoint, 2, "raw")
    assert engine.cache.store(names(3), [0, 1, 2]) == 3
    assert engine.cache.flush(30)
    behind = [f"block {index}".encode() for index in range(3, 6)]
    assert engine.cache.put(behind, [3, 4, 5], parent=names(3)[2]) == [True] * 3
    assert other.cache.load(names(6), [10, 11, 12, 13, 14, 15]).wait(30) == 6
    for index in range(6):
        # Without a parent there is the first block of a prompt.
        before, after = engine.block(index), other.block(10 + index)
        coded.check(level, before, after, first=index == 0)
    if level not in coded.EXACT:
        sizes = coded.stored(daemon.endpoint).values()
        assert len(sizes) == 6 and max(sizes) < 0.99 * engine.block(0).nbytes


def test_blocks_wait_for_the_profile_that_they_name(daemon: Daemon) -> None:
    samples = [coded.values(seed, 64) for seed in range(8)]
    profile = Profile.calibrate(coded.layout(64), samples)
    engine = Coded(daemon.endpoint, 1, "l1", profile=profile)
    without = Coded(daemon.endpoint, 1, "l1")
    assert engine.cache.put(names(4), [0, 1, 2, 3]) == [True] * 4
    assert without.cache.put([b"other", b"another"], [0, 1]) == [True] * 2
    sizes = sorted(coded.stored(daemon.endpoint).values())
    assert 2 * sizes[0] < sizes[-1]
    # The daemon is given it in the background, and so are those who lack it.
    other, until = Coded(daemon.endpoint, 2, "raw"), time.monotonic() + 30
    while other.cache.load(names(4), [10, 11, 12, 13]).wait(30) != 4:
        assert time.monotonic() < until
        time.sleep(0.05)
    for index in range(4):
        before, after = engine.block(index), other.block(10 + index)
        coded.check("l1", before, after, first=index == 0, by=64)


def test_what_is_computed_over_coarser_blocks_is_not_to_be_stored(daemon: Daemon) -> None:
    l1, l2, raw = (Coded(daemon.endpoint, 1, level) for level in ("l1", "l2", "raw"))
    assert l1.cache.put([b"coarse"], [0]) == [True]
    assert raw.cache.put([b"exact"], [0], parent=b"coarse") == [True]
    for engine, may_store in ((l1, True), (l2, False), (raw, False)):
        load = engine.cache.load([b"coarse", b"exact"], [1, 2])
        assert load.wait(30) == 2 and load.may_store() == may_store
        load = engine.cache.load([b"exact", b"nothing"], [1, 2])
        assert load.wait(30) == 1 and load.may_store()


def test_any_bits_come_back_from_nested_levels(daemon: Daemon) -> None:
    """What engines try their memory with."""
    for level in ["lossless", "cachegen", *coded.NESTED]:
        engine = Engine(daemon.endpoint, encoding=level)
        block = [f"{level} {index}".encode() for index in range(4)]
        engine.cache.put(block, [0, 1, 2, 3])
        assert engine.cache.load(block, [10, 11, 12, 13]).wait(30) == 4
        assert [engine.block(it) for it in range(10, 14)] == [
            engine.block(it) for it in range(4)
        ]


def test_levels_that_cannot_be_are_refused(daemon: Daemon) -> None:
    with pytest.raises(ValueError, match="not a level"):
        BlockCache(daemon.endpoint, NAMESPACE, encoding="fine")
    profile = Profile.calibrate(coded.layout(64), [coded.values(1, 64)])
    with pytest.raises(ValueError, match="profile"):
        BlockCache(daemon.endpoint, NAMESPACE, encoding="l1", profile=profile)
    quantised = Layout(layers=1, kv_heads=1, head_dim=8, tokens=16, dtype="f8e4m3")
    with pytest.raises(ValueError, match="quantised already"):
        BlockCache(
            daemon.endpoint, Namespace(quantised, architecture="a", weights="w"), encoding="l1"
        )


def told(residency: Residency, count: int) -> dict[bytes, bool]:
    """What has become of so many blocks, once that is known."""
    changes: dict[bytes, bool] = {}
    until = time.monotonic() + 30
    while len(changes) < count:
        assert time.monotonic() < until, changes
        for name, is_there in residency.take():
            assert changes.setdefault(name, is_there) == is_there
        time.sleep(0.01)
    return changes


def test_what_the_daemon_has_is_told(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint)
    first, second = engine.cache.follow(), engine.cache.follow(limit=4)
    engine.cache.store(names(2), [0, 1])
    assert engine.cache.flush(30)
    # Some are there, others come.
    first.expect(names(6))
    assert told(first, 2) == dict.fromkeys(names(2), True)
    second.expect(names(6)[2:])
    engine.cache.store(names(6), list(range(6)))
    assert told(first, 4) == dict.fromkeys(names(6)[2:], True)
    assert told(second, 4) == dict.fromkeys(names(6)[2:], True)
    # Those that were asked for first are given up.
    second.expect([b"another", b"and another"])
    assert told(second, 2) == dict.fromkeys(names(6)[2:4], False)
    assert engine.cache.delete(names(3)) == 3
    assert told(first, 3) == dict.fromkeys(names(3), False)
    # They are not followed any more, before somebody asks again.
    assert engine.cache.put(names(1), [0]) == [True]
    time.sleep(0.5)
    assert first.take() == []
    first.expect(names(1))
    assert told(first, 1) == {names(1)[0]: True}
    second.clear()
    assert told(second, 2) == dict.fromkeys(names(6)[4:], False)


def test_a_daemon_that_comes_back_tells_what_it_has_lost(daemon: Daemon) -> None:
    engine = Engine(daemon.endpoint)
    residency = engine.cache.follow()
    residency.expect(names(3))
    assert engine.cache.put(names(2), [0, 1]) == [True, True]
    assert told(residency, 2) == dict.fromkeys(names(2), True)
    daemon.stop()
    time.sleep(1.5)
    assert residency.take() == [], "it may come back with all it had"
    daemon.start()
    time.sleep(3)
    assert residency.take() == [], "it has"
    daemon.stop()
    shutil.rmtree(daemon.data)
    daemon.start()
    assert told(residency, 2) == dict.fromkeys(names(2), False)
    until = time.monotonic() + 30
    while not all(engine.cache.put([names(3)[2]], [2])):
        assert time.monotonic() < until
    assert told(residency, 1) == {names(3)[2]: True}
