"""Slots of an engine's memory, in a daemon and back."""

import os
import time

import pytest
from conftest import Daemon

from kvasir import Client, Layout, Namespace, SlotCache

SLOT = 3 * 4096
NAMES = [b"first", b"second", b"third"]


def names(slot: int = SLOT, weights: str = "w") -> Namespace:
    return Namespace(Layout.opaque(slot), architecture="a", weights=weights)


def cache(endpoint: str, memory: bytearray, **limits: float) -> SlotCache:
    # What is asked is what is answered, and not how soon.
    patience = {"lookup_timeout": 5.0, "load_timeout": 10.0, "store_timeout": 10.0}
    return SlotCache(endpoint, names(), memory, **(patience | limits))


def ended(slots: SlotCache) -> dict[int, list[bool]]:
    assert slots.drain(30.0)
    return {job: whole for job, whole, _ in slots.finished()}


@pytest.mark.parametrize("size", [1, 7, 4096, 12_288, 40_961, 3 << 20])
def test_opaque_layouts_have_as_many_bytes_as_they_are_asked_for(size: int) -> None:
    layout = Layout.opaque(size)
    assert layout.chunk_bytes == layout.layer_bytes == size and layout.layers == 1
    assert layout == Layout.opaque(size) and layout != Layout.opaque(size + 1)


@pytest.mark.parametrize("size", [0, 1 << 31, (1 << 63) + 1])
def test_opaque_layouts_have_bounds(size: int) -> None:
    with pytest.raises(ValueError):
        Layout.opaque(size)


def test_slots_come_back_where_they_are_wanted(daemon: Daemon) -> None:
    memory = bytearray(os.urandom(5 * SLOT))
    before = bytes(memory)
    slots = cache(daemon.endpoint, memory)
    slots.store(7, NAMES, [4, 0, 2], [None, NAMES[0], NAMES[1]], 16)
    assert ended(slots) == {7: [True] * 3}
    assert slots.find([*NAMES, b"fourth"]) == [True, True, True, False]
    memory[:] = bytes(len(memory))
    slots.load(8, [NAMES[2], b"fourth", NAMES[0]], [1, 2, 3])
    assert ended(slots) == {8: [True, False, True]}

    def slot(of: bytes, number: int) -> bytes:
        return bytes(of[number * SLOT :][:SLOT])

    assert slot(memory, 1) == slot(before, 2) and slot(memory, 3) == slot(before, 4)
    # What did not come was not touched, and neither was anything else.
    assert not any(slot(memory, 0) + slot(memory, 2) + slot(memory, 4))
    counted = slots.stats()
    assert (counted["stored"], counted["loads"], counted["calls_failed"]) == (3, 1, 0)


def test_what_is_stored_can_be_deleted(daemon: Daemon) -> None:
    slots = cache(daemon.endpoint, bytearray(3 * SLOT), lookup_timeout=1.0, cooldown=5.0)
    slots.store(0, NAMES, [0, 1, 2], [None] * 3, None)
    ended(slots)
    assert slots.delete([*NAMES[1:], b"another"]) == 2
    assert slots.find(NAMES) == [True, False, False]
    daemon.freeze()
    begun = time.monotonic()
    assert [slots.delete(NAMES) for _ in range(100)] == [0] * 100
    assert time.monotonic() - begun < 5
    daemon.thaw()


def test_what_is_stored_is_raw_bytes_under_a_name(daemon: Daemon) -> None:
    memory = bytearray(os.urandom(SLOT))
    slots = cache(daemon.endpoint, memory)
    slots.store(0, NAMES[:1], [0], [None], None)
    ended(slots)
    client = Client(daemon.endpoint)
    (chunk,) = client.get([names().opaque_key(NAMES[0])])
    assert chunk.layout == Layout.opaque(SLOT) and bytes(chunk.layers[0]) == memory
    assert client.get([names(weights="x").opaque_key(NAMES[0])]) == []


def test_memory_is_not_let_go_before_a_job_has_ended(daemon: Daemon) -> None:
    memory = bytearray(8 * SLOT)
    slots = cache(daemon.endpoint, memory, store_timeout=1.0)
    daemon.freeze()
    slots.store(0, NAMES, [0, 1, 2], [None] * 3, None)
    slots.close()
    with pytest.raises(BufferError):
        memory.clear()
    # It ends by its own deadline, with nobody's help.
    assert ended(slots) == {0: [False] * 3}
    memory.clear()
    with pytest.raises(RuntimeError, match="closed"):
        slots.load(1, NAMES, [0, 1, 2])
    daemon.thaw()


def test_what_is_written_after_a_store_has_failed_is_not_stored(daemon: Daemon) -> None:
    """More than connections hold, so that most of it is still to be read when the store fails."""
    size = 24 << 20
    memory = bytearray(os.urandom(size))
    before = bytes(memory)
    limits = {"load_timeout": 30.0, "cooldown": 0.01, "store_buffer": size}
    slots = SlotCache(
        daemon.endpoint, names(size), memory, lookup_timeout=5.0, store_timeout=0.5, **limits
    )
    daemon.freeze()
    slots.store(0, NAMES[:1], [0], [None], None)
    assert ended(slots) == {0: [False]}
    memory[:] = os.urandom(size)
    daemon.thaw()
    # What goes over the same connection comes after whatever is left of the first.
    client = Client(daemon.endpoint)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        slots.find(NAMES)
        time.sleep(0.05)
    if client.get([names(size).opaque_key(NAMES[0])]):
        slots.load(1, NAMES[:1], [0])
        assert ended(slots) == {1: [True]}
        assert memory == before


def test_a_job_ends_when_its_memory_is_free(daemon: Daemon) -> None:
    """And not when its store has failed, while a connection has bytes of it still to send."""
    daemon.freeze()
    size = 8 << 20
    for number in range(40):
        memory = bytearray(size)
        slots = SlotCache(
            daemon.endpoint, names(size), memory, store_timeout=0.05, cooldown=0.001
        )
        slots.store(number, NAMES[:1], [0], [None], None)
        slots.close()
        while not slots.finished():
            pass
        # Nothing has it any more.
        memory.clear()
    daemon.thaw()


def test_nothing_is_stored_behind_what_failed(daemon: Daemon) -> None:
    """Even if the daemon is well again: a prompt has no gaps."""
    memory = bytearray(os.urandom(12 * SLOT))
    slots = cache(daemon.endpoint, memory, store_timeout=0.5, cooldown=0.0)
    many = [b"%d" % it for it in range(12)]
    assert slots.find(many) == [False] * 12
    daemon.freeze()
    slots.store(0, many, list(range(12)), [None] * 12, None)
    while slots.stats()["calls_failed"] == 0:
        time.sleep(0.001)
    daemon.thaw()
    ((_, whole),) = ended(slots).items()
    stored = whole.count(True)
    assert stored < 4 and whole == [True] * stored + [False] * (12 - stored)
    # Only what had begun can be there.
    assert not any(slots.find(many)[4:])


def test_jobs_that_are_cut_end_where_they_are(daemon: Daemon) -> None:
    memory = bytearray(400 * SLOT)
    slots = cache(daemon.endpoint, memory)
    many = [b"%d" % it for it in range(400)]
    slots.store(0, many, list(range(400)), [None] * 400, None)
    assert slots.drain(30.0, cut=True)
    ((_, whole, _),) = slots.finished()
    # In order, so that there is a beginning and no gaps.
    stored = whole.count(True)
    assert stored < 400 and whole == [True] * stored + [False] * (400 - stored)
    assert slots.find(many) == whole
    slots.store(1, many, list(range(400)), [None] * 400, None)
    assert ended(slots) == {1: [True] * 400}


def test_a_daemon_that_failed_is_left_alone(daemon: Daemon) -> None:
    memory = bytearray(os.urandom(3 * SLOT))
    slots = cache(daemon.endpoint, memory, cooldown=0.3)
    slots.store(0, NAMES, [0, 1, 2], [None] * 3, None)
    ended(slots)
    daemon.kill()
    assert slots.find(NAMES) == [False] * 3
    assert slots.rests
    slots.load(1, NAMES, [0, 1, 2])
    assert ended(slots) == {1: [False] * 3}
    assert slots.stats()["calls_skipped"] >= 1
    daemon.start()
    until = time.monotonic() + 30
    while slots.find(NAMES) != [True] * 3:
        assert time.monotonic() < until, "it does not come back by itself"
        time.sleep(0.05)
    assert not slots.rests


def test_what_cannot_be_is_refused() -> None:
    memory = bytearray(2 * SLOT)
    with pytest.raises(ValueError, match="no number of slots"):
        SlotCache("127.0.0.1:9", names(), bytearray(2 * SLOT + 1))
    with pytest.raises(BufferError):
        SlotCache("127.0.0.1:9", names(), bytes(2 * SLOT))
    layers = Layout(layers=2, kv_heads=1, head_dim=16, tokens=96, dtype="f16")
    with pytest.raises(ValueError, match="in one layer"):
        SlotCache("127.0.0.1:9", Namespace(layers, architecture="a", weights="w"), memory)
    slots = SlotCache("127.0.0.1:9", names(), memory)
    with pytest.raises(ValueError, match="no slot 2"):
        slots.load(0, NAMES[:1], [2])
    with pytest.raises(ValueError, match="no slot 2"):
        slots.store(0, NAMES[:1], [2], [None], None)
    with pytest.raises(ValueError, match="a slot for each name"):
        slots.load(0, NAMES, [0])
    with pytest.raises(ValueError, match="a parent"):
        slots.store(0, NAMES[:1], [0], [], None)
    with pytest.raises(ValueError, match="a slot has"):
        slots.write(0, b"short")
    # No job was begun by any of it.
    assert slots.drain(0.0) and slots.finished() == []
