"""The adapter under LMCache's own controllers: what they store comes back, or does not come."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Daemon
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from storage import LAYOUT, OBJECT_BYTES, Server, chain, content, until

import kvasir
from kvasir.lmcache import adapter
from kvasir.lmcache.names import Names, geometry

ON = "the Kvasir adapter is on: an object came back as it was stored"
ABSENT = "no Kvasir daemon answers: going on without until one does"


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts LMCache's side, which is shut down at the end."""
    running: list[Server] = []

    def begin(*arguments: Any, **changes: Any) -> Server:
        running.append(Server(*arguments, **changes))
        return running[-1]

    yield begin
    for server in running:
        server.close()


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """What the adapter has logged, without what a defect adds."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    adapter.logger.addHandler(handler)
    yield lambda: lines
    adapter.logger.removeHandler(handler)


def names(layout: MemoryLayoutDesc = LAYOUT, weights: str = "") -> Names:
    return Names(geometry(layout.shapes, layout.dtypes), weights)


def held(daemon: Daemon) -> int:
    """How many chunks the daemon has."""
    return max(tier["chunks"] for tier in kvasir.Client(daemon.endpoint).stats().values())


def prompts(count: int = 6) -> list[list[ObjectKey]]:
    return [chain(5, seed) for seed in range(100, 100 + count)]


def possible(prompts: list[list[ObjectKey]]) -> int:
    return sum(map(len, prompts))


def test_objects_come_back_as_they_were_to_another_lmcache(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    keys = chain(20)
    first = start(daemon.endpoint)
    assert said() == [ON]
    assert held(daemon) == 0, "the canary is left behind"
    assert first.load(keys) == 0
    assert all(first.store(keys))
    first.forget()
    assert first.load(keys) == 20
    first.close()

    second = start(daemon.endpoint)
    assert second.load(keys) == 20
    assert held(daemon) == 20
    # The daemon has stayed beside both of them; now it ends too.
    daemon.stop()
    daemon.start()
    until(lambda: second.load(keys) == 20, "it does not come back by itself")
    assert second.load(keys + chain(7, seed=1)) == 20


def test_a_load_of_many_gets_is_put_together(
    daemon: Daemon, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "GET_BYTES", 3 * OBJECT_BYTES + 1)
    server, keys = start(daemon.endpoint), chain(20)
    server.store(keys)
    server.forget()
    assert server.load(keys) == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_salt": "another tenant"},
        {"model_name": "nobody/else"},
        {"kv_rank": 0x2010201},
        {"object_group_id": 1},
        {"seed": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_key_finds_nothing(daemon: Daemon, start: Callable, changes: dict) -> None:
    keys = chain(4, cache_salt="a tenant")
    server = start(daemon.endpoint)
    server.store(keys)
    server.forget()
    assert server.load(chain(4, **({"cache_salt": "a tenant"} | changes))) == 0
    assert server.load(keys) == 4
    server.store(chain(4))
    server.forget()
    assert server.load(keys) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": MemoryLayoutDesc([torch.Size([2, 2, 64, 64])], [torch.float16])},
        {"layout": MemoryLayoutDesc([torch.Size([2, 4, 32, 64])], [torch.bfloat16])},
        {"layout": MemoryLayoutDesc([torch.Size([2, 2, 64, 32])], [torch.bfloat16])},
        {"layout": MemoryLayoutDesc(LAYOUT.shapes * 2, LAYOUT.dtypes * 2)},
        {"weights": "others"},
    ],
    ids=["dtype", "shape", "size", "tensors", "weights"],
)
def test_another_layout_finds_nothing(daemon: Daemon, start: Callable, changes: dict) -> None:
    keys = chain(4)
    start(daemon.endpoint).store(keys)
    assert start(daemon.endpoint, **changes).load(keys) == 0
    assert start(daemon.endpoint).load(keys) == 4


def test_another_lmcache_is_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    (key,) = chain(1)
    ours = names().key(key)
    assert names().key(key) == ours
    monkeypatch.setattr("lmcache.__version__", "0.5.7")
    assert names().key(key) != ours


def test_each_object_is_told_from_the_others(daemon: Daemon, start: Callable) -> None:
    """Some are gone, at any place; of groups with windows, LMCache does not need all."""
    server = start(daemon.endpoint)
    layers, window = chain(10), chain(10, object_group_id=1)
    server.store(layers)
    server.store(window[7:])
    server.forget()
    assert server.load(layers, window, windows={1: 2}) == 12
    server.forget()
    gone = [names().key(layers[at]) for at in (2, 3, 8)]
    assert kvasir.Client(daemon.endpoint).delete(gone) == 3
    task = server.adapter.submit_lookup_and_lock_task(layers, {0: LAYOUT})
    found: list[Any] = []
    until(
        lambda: found.append(server.adapter.query_lookup_and_lock_result(task)) or found[-1],
        "a lookup does not end",
    )
    assert found[-1].get_indices_list() == [0, 1, 4, 5, 6, 7, 9]
    # Each result is given once.
    assert server.adapter.query_lookup_and_lock_result(task) is None
    assert server.load(layers) == 2


def test_what_is_found_and_does_not_come_is_not_loaded(daemon: Daemon, start: Callable) -> None:
    """Gone, or of another size, between the answer and the load."""
    server, keys = start(daemon.endpoint), chain(9)
    server.store(keys)
    server.forget()
    client = kvasir.Client(daemon.endpoint)
    load = server.adapter.submit_load_task
    came: list[Any] = []
    lost = (3, 7, 8)

    def submit(keys: list[ObjectKey], objects: list[Any]) -> int:
        client.delete([names().key(keys[at]) for at in lost])
        half = OBJECT_BYTES // 2
        client.put(names().key(keys[8]), kvasir.Layout.opaque(half), bytes(half))
        for it in objects:
            it.byte_array.cast("B")[:] = b"\xa5" * OBJECT_BYTES
        came.extend([keys, objects])
        return load(keys, objects)

    server.adapter.submit_load_task = submit
    assert server.load(keys) == 3
    wanted, objects = came
    for at, (key, it) in enumerate(zip(wanted, objects, strict=True)):
        # What did not come was not written to.
        expected = b"\xa5" * OBJECT_BYTES if at in lost else content(key)
        assert bytes(it.byte_array) == expected
    assert server.noted.accessed == [key for at, key in enumerate(keys) if at not in lost]
    server.adapter.submit_load_task = load
    # LMCache has kept nothing of what did not come, and stores it again.
    server.forget()
    assert server.load(keys) == 3
    assert server.store(keys[3:]) == [True] * 6


def test_damaged_objects_are_not_loaded(daemon: Daemon, start: Callable) -> None:
    server, keys = start(daemon.endpoint), [chain(1, seed) for seed in range(40)]
    for key in keys:
        server.store(key)
    server.close()
    daemon.damage(every=3 * OBJECT_BYTES)

    server = start(daemon.endpoint)
    # Each byte that comes is checked.
    came = sum(map(server.load, keys))
    assert 0 < came < 40
    server.forget()
    for _ in range(3):
        if server.run(keys) == 40:
            break
    assert server.run(keys) == 40, "what is damaged is not stored again"


@pytest.mark.parametrize("fault", ["kill", "freeze", "slow"])
def test_a_daemon_that_fails_costs_hits_and_nothing_else(
    daemon: Daemon, start: Callable, fault: str
) -> None:
    server, asked = (
        start(
            daemon.endpoint,
            lookup_timeout=0.2,
            load_timeout=0.3,
            store_timeout=0.3,
            cooldown=0.1,
        ),
        prompts(),
    )
    server.run(asked)
    had: list[int] = []
    over = threading.Event()

    def harm() -> None:
        for _ in range(20 if fault == "slow" else 5):
            over.wait(0.05 if fault == "slow" else 0.4)
            if fault == "kill":
                daemon.kill()
                time.sleep(0.2)
                daemon.start()
            else:
                daemon.freeze()
                time.sleep(0.03 if fault == "slow" else 0.7)
                daemon.thaw()
        over.set()

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        # Each task has to end, and each byte that is loaded is checked.
        while not over.is_set():
            had.append(server.run(asked))
    finally:
        over.set()
        thread.join()
    assert any(had)
    assert server.adapter.report_status()["why_off"] is None
    # When all is well again, so is the adapter.
    until(lambda: server.run(asked) == possible(asked), "it does not come back by itself")
    until(lambda: server.adapter._held == 0, "memory stays held")


class Counted:
    """A client whose calls are counted."""

    def __init__(self, client: kvasir.Client) -> None:
        self._client = client
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self._client, name)


def test_a_daemon_that_hangs_costs_its_timeouts_once(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    server, keys = start(daemon.endpoint, store_timeout=0.5, cooldown=300.0), chain(40)
    server.store(keys[:20])
    server.forget()
    client = server.adapter._client = Counted(server.adapter._client)
    daemon.freeze()
    assert not any(server.store(keys[20:]))
    # Those failed that were begun together, and the others were not begun.
    assert 1 <= len(client.calls) <= adapter.STORE_THREADS
    assert sum(line.startswith("the Kvasir daemon fails") for line in said()) == 1
    client.calls.clear()
    # Nobody asks it any more.
    server.forget()
    assert server.load(keys) == 0
    assert not any(server.store(keys))
    server.adapter.delete(keys)
    assert not client.calls
    status = server.manager.report_status()
    assert status["is_healthy"] and status["l2_adapters"][0]["rests"]
    daemon.thaw()


def test_a_daemon_that_hangs_does_not_answer_lookups_twice(
    daemon: Daemon, start: Callable
) -> None:
    server, keys = start(daemon.endpoint, lookup_timeout=0.3, cooldown=300.0), chain(4)
    server.store(keys)
    server.forget()
    assert server.load(keys) == 4
    finder = Counted(next(iter(server.adapter._finders.values())))
    server.adapter._finders = dict.fromkeys(server.adapter._finders, finder)
    daemon.freeze()
    for _ in range(5):
        server.forget()
        assert server.load(keys) == 0
    assert finder.calls.count("find") == 1
    # Nor does it get anything to store.
    server.forget()
    client = server.adapter._client = Counted(server.adapter._client)
    assert not any(server.store(keys)) and not client.calls
    daemon.thaw()


def test_the_time_between_attempts_doubles() -> None:
    breaker = adapter.Breaker(0.2)
    assert not breaker.rests
    assert breaker.failed(time.monotonic())
    assert breaker.rests
    # One that was under way is the same failure.
    assert not breaker.failed(0.0) and breaker._failures == 1
    until(lambda: not breaker.rests, "it rests for good")
    begun = time.monotonic()
    assert not breaker.failed(begun)
    until(lambda: not breaker.rests, "it rests for good")
    assert time.monotonic() - begun >= 0.4
    assert breaker.succeeded() and not breaker.succeeded()
    assert breaker.failed(time.monotonic())


def test_without_a_daemon_nothing_is_found_until_there_is_one(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    daemon.stop()
    server, asked = start(daemon.endpoint, cooldown=0.05), prompts(2)
    assert said() == [ABSENT]
    assert server.run(asked) == 0
    daemon.start()
    until(lambda: server.run(asked) == possible(asked), "it does not begin by itself")
    assert said()[-1] == "the Kvasir daemon answers again"


def test_bytes_that_wait_to_be_stored_are_bounded(daemon: Daemon, start: Callable) -> None:
    server, keys = start(daemon.endpoint, store_buffer=6 * OBJECT_BYTES), chain(10)
    # LMCache hears of tasks, and not of keys.
    assert not any(server.store(keys))
    assert [key for key, _ in server.noted.stored] == keys[:6]
    assert server.adapter._held == 0
    server.forget()
    assert server.load(keys) == 6
    assert all(server.store(keys[6:]))


def test_what_is_counted_deleted_and_told(daemon: Daemon, start: Callable) -> None:
    server, keys = start(daemon.endpoint), chain(5) + chain(2, cache_salt="a tenant")
    sizes: list[int] = []
    pop = server.adapter.pop_completed_store_tasks

    def noting() -> dict[int, Any]:
        popped = pop()
        sizes.extend(it.bytes_transferred() for it in popped.values())
        return popped

    server.adapter.pop_completed_store_tasks = noting
    server.store(keys)
    assert sorted(server.noted.stored, key=repr) == sorted(
        [(key, OBJECT_BYTES) for key in keys], key=repr
    )
    # What is there already is not moved again, nor counted.
    server.forget()
    assert all(server.store(keys))
    assert sum(sizes) == 7 * OBJECT_BYTES
    usage = server.adapter.get_usage()
    assert usage.total_bytes_used == 7 * OBJECT_BYTES and usage.usage_fraction < 0
    assert usage.bytes_by_cache_salt == {"": 5 * OBJECT_BYTES, "a tenant": 2 * OBJECT_BYTES}
    server.adapter.delete([*keys[3:], *chain(2, seed=9), *chain(1, model_name="unknown")])
    assert server.noted.deleted == keys[3:]
    assert server.adapter.get_usage().total_bytes_used == 3 * OBJECT_BYTES
    assert held(daemon) == 3
    server.forget()
    assert server.load(chain(5)) == 3
    fds = [
        server.adapter.get_store_event_fd(),
        server.adapter.get_lookup_and_lock_event_fd(),
        server.adapter.get_load_event_fd(),
    ]
    assert len(set(fds)) == 3


class Bent:
    """A client of a daemon in which a bit is turned over."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._client = kvasir.Client(*arguments, **options)

    def put(self, key: bytes, layout: kvasir.Layout, data: Any, **options: Any) -> bool:
        bent = bytearray(data)
        bent[7] ^= 1
        return self._client.put(key, layout, bent, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def test_a_canary_that_dies_turns_the_adapter_off(
    daemon: Daemon, start: Callable, said: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "Client", Bent)
    _is_off(start(daemon.endpoint), said, "an object does not come back as it was stored")


@pytest.mark.parametrize(
    "options, why",
    [
        ({"enpoint": "localhost"}, "there is no option enpoint"),
        ({"load_timeout": -1}, "load_timeout of -1.0 is less than nothing"),
        ({"cooldown": "long"}, ""),
        ({"endpoint": "no:endpoint:"}, ""),
    ],
    ids=["misspelt", "negative", "word", "nowhere"],
)
def test_what_is_not_known_turns_the_adapter_off(
    daemon: Daemon, start: Callable, said: Callable, options: dict, why: str
) -> None:
    _is_off(start(**({"endpoint": daemon.endpoint} | options)), said, why)


def _is_off(server: Server, said: Callable, why: str) -> None:
    """It said so once, and LMCache goes on without."""
    (line,) = said()
    assert line.startswith(f"the Kvasir adapter is off: {why}")
    assert server.run(prompts(2)) == 0
    assert server.run(prompts(2)) == 0
    server.adapter.delete(chain(2))
    assert server.manager.report_status()["is_healthy"]
    assert len(said()) == 1


@pytest.mark.parametrize("call", ["_look_up", "_load", "_store", "_settle_load", "_settle_store"])
def test_a_defect_turns_the_adapter_off(
    daemon: Daemon, start: Callable, said: Callable, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("another version of LMCache")

    start(daemon.endpoint).run(prompts(2))
    monkeypatch.setattr(adapter.KvasirAdapter, call, fail)
    server = start(daemon.endpoint)
    server.run(prompts(2) + [chain(3, seed=7)])
    assert "the Kvasir adapter is off: another version of LMCache" in said()
    assert server.run(prompts(2)) == 0
    assert sum("is off" in line for line in said()) == 1


@pytest.mark.parametrize("call", ["_wanted", "_gets", "_lend"])
def test_a_defect_before_a_task_harms_no_task(
    daemon: Daemon, start: Callable, said: Callable, call: str
) -> None:
    start(daemon.endpoint).run(prompts(2))
    server = start(daemon.endpoint)
    # What LMCache hands over is not what it was.
    strange = {"_wanted": ("get", 3), "_gets": ([3],), "_lend": ([3],)}[call]
    assert not getattr(server.adapter, call)(*strange) or call == "_lend"
    assert server.run(prompts(2)) == 0
    assert sum("is off" in line for line in said()) == 1


def test_objects_that_serde_has_changed_are_not_stored(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    """They could not be found: a lookup has the layout from before."""
    server = start(daemon.endpoint, adapter={"serde": {"type": "fp8"}})
    server.run(prompts(3))
    assert server.run(prompts(3)) == 0
    assert sum("take no serde" in line for line in said()) == 1
    assert held(daemon) == 0


class Memory:
    """As much of an object in L1 as the adapter sees."""

    def __init__(self) -> None:
        self.byte_array = memoryview(bytearray(OBJECT_BYTES))

    get_size = staticmethod(lambda: OBJECT_BYTES)
    get_shapes = staticmethod(lambda: LAYOUT.shapes)
    get_dtypes = staticmethod(lambda: LAYOUT.dtypes)


def test_closing_gives_l1_back(daemon: Daemon) -> None:
    """Whatever is under way: no thread touches memory that LMCache unmaps."""
    closing = adapter.KvasirAdapter({"endpoint": daemon.endpoint, "load_timeout": 5.0})
    keys, objects = chain(3), [Memory() for _ in range(3)]
    begun, ended = threading.Event(), threading.Event()
    client = closing._client
    get = client.get

    def slow(keys: list[bytes], **options: Any) -> list[kvasir.Chunk]:
        begun.set()
        time.sleep(1)
        ended.set()
        return get(keys, **options)

    closing._client = Counted(client)
    closing._client.get = slow
    closing.submit_load_task(keys, objects)
    assert begun.wait(10)
    closing.close()
    assert ended.is_set()
    # Nothing is begun afterwards, and nothing raised.
    task = closing.submit_load_task(keys, objects)
    assert not closing.query_load_result(task).popcount()


def test_closing_does_not_wait_for_a_daemon_that_hangs(daemon: Daemon) -> None:
    server = Server(daemon.endpoint, store_timeout=0.5)
    daemon.freeze()
    objects = server.manager.reserve_write(chain(30), LAYOUT)
    server.manager.finish_write(list(objects))
    closing = threading.Thread(target=server.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    daemon.thaw()
