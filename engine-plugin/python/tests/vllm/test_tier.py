"""The tier under vLLM's own tiering manager: what it stores comes back, or is computed."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Daemon
from offloading import (
    CHUNK_BYTES,
    PATIENCE_SECONDS,
    Scheduler,
    chain,
    content,
    workload,
)
from vllm.v1.kv_offload.base import Locality, LookupResult, Medium

import kvasir
from kvasir.vllm import layout, tier
from kvasir.vllm.stats import COUNTERS


@pytest.fixture
def start() -> Iterator[Callable[..., Scheduler]]:
    """Starts what a vLLM has of it, which is shut down at the end."""
    running: list[Scheduler] = []

    def begin(*arguments: Any, **changes: Any) -> Scheduler:
        running.append(Scheduler(*arguments, **changes))
        return running[-1]

    yield begin
    for scheduler in running:
        scheduler.close()


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """What the tier has logged."""
    name = "vllm.kvasir"
    caplog.set_level(logging.INFO, name)
    # Wherever vLLM has its own lines go.
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", True)

    def lines() -> list[str]:
        return [it.getMessage() for it in caplog.records if it.name == name]

    return lines


def possible(prompts: list[list[bytes]]) -> int:
    return sum(len(keys) for keys in prompts)


def key_of(scheduler: Scheduler, name: bytes) -> bytes:
    """What the daemon calls a chunk."""
    names = layout.tier_namespace(scheduler.spec, CHUNK_BYTES, None, "random")
    return names.opaque_key(name)


def stats(scheduler: Scheduler) -> dict[str, float]:
    """As vLLM's log has them."""
    collected = scheduler.tier.get_stats()
    prefix = "vllm:kvasir_tier_"
    values = collected.reduce() if collected else {}
    return {name.removeprefix(prefix): value for name, value in values.items()}


def test_chunks_come_back_as_they_were_to_another_vllm(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    keys = chain(range(16 * 20))
    first = start(daemon.endpoint)
    assert said()[-1] == "the Kvasir tier is on: a chunk came back as it was stored"
    # The canary leaves nothing behind.
    assert not any(first.view.cast("B"))
    assert not any(it["chunks"] for it in kvasir.Client(daemon.endpoint).stats().values())
    first.store(keys)
    first.settle()
    assert stats(first)["stored"] == 20 + 1
    second = start(daemon.endpoint)
    assert second.found(keys, second.request(keys)) == 20
    assert stats(second) == {"stored": 1, "blocks_loaded": 20}
    # Each chunk is another one, and the workload checks what it loads.
    assert content(keys[0]) != content(keys[1])


def test_groups_of_layers_are_kept_apart(daemon: Daemon, start: Callable) -> None:
    """Their chunks have the same hash, and another number behind it."""
    one, two = chain(range(16 * 6)), chain(range(16 * 6), group=1)
    first = start(daemon.endpoint, groups=2)
    first.store(one)
    first.store(two[:3])
    first.settle()
    second = start(daemon.endpoint, groups=2)
    assert second.found(one, second.request(one)) == 6
    assert second.found(two, second.request(two)) == 3


def test_a_second_pass_finds_what_is_possible_and_outlives_restarts(
    daemon: Daemon, start: Callable
) -> None:
    prompts = workload(1)
    # Not all of it stays in vLLM's own memory.
    scheduler = start(daemon.endpoint)
    assert possible(prompts) > 5 * scheduler.spec.num_chunks
    scheduler.run(prompts)
    assert scheduler.run(prompts) >= 0.95 * possible(prompts)
    scheduler.settle()
    scheduler.close()

    again = start(daemon.endpoint)
    assert again.run(prompts) >= 0.95 * possible(prompts)
    daemon.stop()
    daemon.start()
    until = time.monotonic() + 30
    while again.run(prompts) < 0.95 * possible(prompts):
        assert time.monotonic() < until, "it does not come back by itself"


@pytest.mark.parametrize("fault", ["kill", "freeze", "slow"])
def test_a_daemon_that_fails_costs_hits_and_nothing_else(
    daemon: Daemon, start: Callable, fault: str
) -> None:
    prompts = workload(2)
    scheduler = start(
        daemon.endpoint,
        lookup_timeout=0.1,
        load_timeout=0.5,
        store_timeout=0.5,
        cooldown=0.1,
    )
    scheduler.run(prompts)
    had: list[int] = []
    over = threading.Event()

    def harm() -> None:
        for _ in range(30 if fault == "slow" else 5):
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
        # Each run checks every byte that it is given.
        while not over.is_set():
            had.append(scheduler.run(prompts))
    finally:
        over.set()
        thread.join()
    # Between the faults it was of use.
    assert len(had) > 5 and any(had)
    scheduler.settle()
    assert not scheduler.tier._jobs
    assert scheduler.tier._is_on
    # When all is well again, so is the tier.
    until = time.monotonic() + PATIENCE_SECONDS
    while scheduler.run(prompts) < 0.95 * possible(prompts):
        assert time.monotonic() < until, "it does not come back by itself"


def test_a_daemon_that_hangs_costs_its_timeouts_once(
    daemon: Daemon, start: Callable
) -> None:
    keys = chain(range(16 * 20))
    scheduler = start(
        daemon.endpoint, lookup_timeout=0.5, store_timeout=0.5, cooldown=300.0
    )
    scheduler.store(keys[:10])
    scheduler.settle()
    stats(scheduler)
    daemon.freeze()
    scheduler.store(keys[10:])
    scheduler.settle()
    counted = stats(scheduler)
    # Those failed that were begun together, and the others were not begun.
    assert 1 <= counted["calls_failed"] <= 4 and counted["stores_failed"] == 10
    # Nobody waits for it any more, not even for a step.
    other = chain(range(7, 16 * 20))
    context = scheduler.request(other)
    for key in other:
        assert scheduler.manager.lookup(key, context) is LookupResult.MISS
    scheduler.store(other[:4])
    assert len(scheduler.tier._jobs) == 1
    scheduler.settle()
    assert stats(scheduler)["stores_failed"] == 4
    daemon.thaw()


def test_calls_of_the_scheduler_do_not_wait_for_a_daemon(
    daemon: Daemon, start: Callable
) -> None:
    prompts = workload(3)
    scheduler = start(
        daemon.endpoint, lookup_timeout=3.0, load_timeout=3.0, store_timeout=3.0
    )
    scheduler.run(prompts)
    scheduler.settle()
    daemon.freeze()
    try:
        scheduler.longest = 0.0
        keys = prompts[0] + chain(range(16 * 8))
        context = scheduler.request(keys)
        waiting = scheduler.manager.lookup(keys[0], context)
        scheduler.step()
        again = scheduler.manager.lookup(keys[0], context)
        assert waiting is again is LookupResult.RETRY
        scheduler.store(chain(range(1, 16 * 8)))
        # All of this took less than one timeout.
        assert scheduler.longest < 1.5
    finally:
        daemon.thaw()
    scheduler.settle()


def test_without_a_daemon_nothing_is_found_until_there_is_one(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    daemon.stop()
    prompts = workload(4)
    scheduler = start(daemon.endpoint, cooldown=0.05)
    assert said()[-1] == "no Kvasir daemon answers: going on without until one does"
    scheduler.run(prompts)
    scheduler.settle()
    assert "stored" not in stats(scheduler)
    daemon.start()
    until = time.monotonic() + PATIENCE_SECONDS
    while scheduler.run(prompts) < 0.95 * possible(prompts):
        assert time.monotonic() < until, "it does not begin by itself"


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "others"},
        {"dtype": "float16"},
        {"layers": 3},
        {"groups": 2},
        {"tensor_parallel": 2},
        {"blocks_per_chunk": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_model_or_layout_finds_nothing(
    daemon: Daemon, start: Callable, changes: dict[str, Any]
) -> None:
    keys = chain(range(16 * 12))
    scheduler = start(daemon.endpoint)
    scheduler.store(keys)
    scheduler.settle()
    other = start(daemon.endpoint, **changes)
    assert other.found(keys, other.request(keys)) == 0
    same = start(daemon.endpoint)
    assert same.found(keys, same.request(keys)) == 12


def computing(**changes: Any) -> SimpleNamespace:
    """As much of vLLM's configuration as says what is computed."""
    model = SimpleNamespace(
        model="nobody/nothing",
        revision="first",
        hf_config=SimpleNamespace(to_dict=lambda: {"rope": changes.get("rope", 1e4)}),
        dtype="bfloat16",
        quantization=None,
    )
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False),
        attention_config=SimpleNamespace(backend=None),
        lora_config=None,
        speculative_config=None,
        use_v2_model_runner=False,
    )
    for part in (model, config.cache_config, config.attention_config, config):
        vars(part).update({name: it for name, it in changes.items() if name in vars(part)})
    return config


def test_all_that_changes_what_is_computed_is_in_the_namespace(
    daemon: Daemon, start: Callable
) -> None:
    draft = SimpleNamespace(model="nobody/smaller", revision="first")
    changes = [
        {},
        {"revision": "second"},
        {"rope": 1e6},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"cache_dtype": "fp8_e5m2"},
        {"backend": "FLASHINFER"},
        {"use_v2_model_runner": True},
        {"speculative_config": SimpleNamespace(method="eagle", draft_model_config=draft)},
        {"speculative_config": SimpleNamespace(method="ngram", draft_model_config=None)},
    ]
    spec = start(daemon.endpoint).spec
    names = [
        layout.tier_namespace(spec, CHUNK_BYTES, computing(**it), None).digest
        for it in changes
    ]
    assert len(set(names)) == len(changes)
    again = layout.tier_namespace(spec, CHUNK_BYTES, computing(), None)
    assert again.digest == names[0]
    for unknown in ({"lora_config": object()}, {"calculate_kv_scales": True}):
        with pytest.raises(layout.Unsupported):
            layout.tier_namespace(spec, CHUNK_BYTES, computing(**unknown), None)


def test_what_comes_is_told_from_what_does_not(daemon: Daemon, start: Callable) -> None:
    """Of a job, some chunks are gone between the answer and the load."""
    keys = chain(range(16 * 12))
    first = start(daemon.endpoint)
    first.store(keys)
    first.settle()
    scheduler = start(daemon.endpoint)
    context = scheduler.request(keys)
    manager = scheduler.manager
    assert {manager.lookup(it, context) for it in keys} == {LookupResult.RETRY}
    scheduler.step()
    until = time.monotonic() + PATIENCE_SECONDS
    while manager.lookup(keys[0], context) is LookupResult.RETRY:
        assert time.monotonic() < until
        scheduler.step()
    gone = [keys[3], keys[4], keys[9]]
    client = kvasir.Client(daemon.endpoint)
    assert client.delete([key_of(scheduler, it) for it in gone]) == 3
    for key in keys[1:]:
        assert manager.lookup(key, context) is LookupResult.HIT_PENDING
    results = []
    collect = scheduler.tier.get_finished_jobs

    def finished() -> list[Any]:
        results.extend(ended := list(collect()))
        return ended

    scheduler.tier.get_finished_jobs = finished
    scheduler.settle()
    (result,) = results
    assert not result.success
    assert list(result.successful_keys) == [it for it in keys if it not in gone]
    # Those are not asked for again, and all others are there.
    assert manager.lookup(gone[0], context) is LookupResult.MISS
    assert scheduler.found(keys[:3], context) == 3
    assert scheduler.found(keys[5:9], context) == 4
    assert stats(scheduler)["blocks_failed"] == 3


def test_bytes_that_went_bad_are_computed(daemon: Daemon, start: Callable) -> None:
    keys = chain(range(16 * 20))
    scheduler = start(daemon.endpoint)
    scheduler.store(keys)
    scheduler.settle()
    daemon.stop()
    payload = [content(it)[100:164] for it in keys[::3]]
    spoilt = 0
    for path in daemon.data.rglob("*"):
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        for part in payload:
            if (at := data.find(part)) >= 0:
                data[at] ^= 1
                spoilt += 1
        if spoilt:
            path.write_bytes(data)
    assert spoilt == len(payload)
    daemon.start()
    other = start(daemon.endpoint)
    # The first one is bad; what is loaded behind it is checked.
    assert other.found(keys, other.request(keys)) == 0
    assert other.found(keys[1:3], other.request(keys)) == 2
    counted = stats(other)
    assert counted["blocks_failed"] >= 1


def test_stores_hold_no_more_memory_than_they_may(
    daemon: Daemon, start: Callable
) -> None:
    keys = chain(range(16 * 12))
    scheduler = start(daemon.endpoint, store_buffer=5 * CHUNK_BYTES)
    stats(scheduler)
    scheduler.store(keys)
    scheduler.settle()
    assert stats(scheduler) == {"stored": 5, "stores_dropped": 7}
    # What they held is free again.
    scheduler.store(chain(range(5, 16 * 12))[:5])
    scheduler.settle()
    assert stats(scheduler) == {"stored": 5}
    # The first ones of a prompt are those that are worth something.
    other = start(daemon.endpoint)
    assert other.found(keys, other.request(keys)) == 5


def test_after_a_reset_nothing_is_found_of_before(
    daemon: Daemon, start: Callable
) -> None:
    """vLLM resets its caches when its weights have changed, which it does not tell."""
    keys = chain(range(16 * 12))
    scheduler, keeper = start(daemon.endpoint), start(daemon.endpoint, keep_after_reset=True)
    scheduler.store(keys)
    scheduler.reset()
    assert scheduler.found(keys, scheduler.request(keys)) == 0
    scheduler.store(keys)
    scheduler.settle()
    assert stats(scheduler)["stored"] > 12
    keeper.store(keys)
    keeper.settle()
    keeper.reset()
    assert keeper.found(keys, keeper.request(keys)) == 12


def test_what_the_daemon_has_is_told_to_vllm(daemon: Daemon, start: Callable) -> None:
    def told(count: int) -> list[tuple[bytes, bool]]:
        """So many changes: a key, and whether it is there."""
        changes: list[tuple[bytes, bool]] = []
        until = time.monotonic() + PATIENCE_SECONDS
        while len(changes) < count:
            assert time.monotonic() < until, changes
            for event in scheduler.tier.take_events():
                assert (event.medium, event.ownership) == (Medium.STORAGE, "kvasir")
                assert event.locality is Locality.REMOTE and event.removal_expected
                changes += [(key, not event.removed) for key in event.keys]
            time.sleep(0.01)
        assert not list(scheduler.tier.take_events())
        return sorted(changes)

    def all_of(keys: list[bytes], is_there: bool) -> list[tuple[bytes, bool]]:
        return sorted((key, is_there) for key in keys)

    keys, others = chain(range(16 * 6)), chain(range(7, 16 * 6 + 7), group=1)
    options = {"groups": 2, "enable_kv_events": True, "locality": "REMOTE"}
    scheduler = start(daemon.endpoint, events=True, **options)
    scheduler.store(keys)
    scheduler.store(others)
    scheduler.settle()
    assert told(12) == all_of([*keys, *others], True)
    # One that has stored nothing tells of what it finds.
    scheduler = start(daemon.endpoint, events=True, **options)
    assert scheduler.found(keys[:4], scheduler.request(keys)) == 4
    assert told(4) == all_of(keys[:4], True)
    names = layout.tier_namespace(scheduler.spec, CHUNK_BYTES, None, "random")
    kvasir.Client(daemon.endpoint).delete([names.opaque_key(bytes(keys[1]))])
    assert told(1) == all_of(keys[1:2], False)
    scheduler.reset()
    assert told(3) == all_of([keys[0], *keys[2:4]], False)
    # It has other names since.
    scheduler.store(keys[:2])
    scheduler.settle()
    assert told(2) == all_of(keys[:2], True)

    for events, options in [(True, {}), (False, {"enable_kv_events": True})]:
        scheduler = start(daemon.endpoint, events=events, **options)
        scheduler.store(keys)
        scheduler.settle()
        time.sleep(0.5)
        assert not list(scheduler.tier.take_events())


class Bent:
    """A cache in which a bit is turned over on the way back."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._cache = kvasir.SlotCache(*arguments, **options)

    def load(self, job: int, names: list[bytes], slots: list[int]) -> None:
        self._cache.load(job, names, slots)
        self._cache.drain(PATIENCE_SECONDS)
        chunk = bytearray(self._cache.read(slots[0]))
        chunk[7] ^= 1
        self._cache.write(slots[0], bytes(chunk))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Elsewhere(Bent):
    """A cache that sees other memory than vLLM."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        endpoint, names, memory = arguments
        super().__init__(endpoint, names, bytearray(memory.nbytes), **options)


@pytest.mark.parametrize(
    "cache, why",
    [
        (Bent, "a chunk does not come back as it was stored"),
        (Elsewhere, "vLLM's CPU memory is not where it is said to be"),
    ],
)
def test_a_canary_that_dies_turns_the_tier_off(
    daemon: Daemon,
    start: Callable,
    said: Callable,
    monkeypatch: pytest.MonkeyPatch,
    cache: type,
    why: str,
) -> None:
    monkeypatch.setattr(tier, "SlotCache", cache)
    _is_off(start(daemon.endpoint), said, why)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"weights": None}, "vLLM does not tell its tiers what it computes"),
        ({"enpoint": "localhost"}, "there is no option enpoint"),
        ({"load_timeout": -1}, "load_timeout of -1 seconds is no time"),
        ({"endpoint": "no:endpoint:"}, ""),
    ],
    ids=["nameless", "misspelt", "negative", "nowhere"],
)
def test_what_is_not_known_turns_the_tier_off(
    daemon: Daemon, start: Callable, said: Callable, options: dict[str, Any], why: str
) -> None:
    _is_off(start(**({"endpoint": daemon.endpoint} | options)), said, why)


def _is_off(scheduler: Scheduler, said: Callable, why: str) -> None:
    """It said so once, and vLLM goes on without."""
    (line,) = said()
    assert line.startswith(f"the Kvasir tier is off: {why}")
    assert not any(scheduler.view.cast("B"))
    prompts = workload(5)
    scheduler.run(prompts)
    scheduler.settle()
    scheduler.reset()
    assert scheduler.run(prompts[:1]) == 0
    assert len(said()) == 1


def test_a_hook_that_fails_turns_the_tier_off(
    daemon: Daemon, start: Callable, said: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start(daemon.endpoint)
    keys = chain(range(16 * 8))
    scheduler.store(keys[:4])

    def fail(*_: Any) -> None:
        raise RuntimeError("another version of vLLM")

    monkeypatch.setattr(scheduler.tier, "_parents", fail)
    scheduler.store(keys[4:])
    scheduler.settle()
    assert said()[-1] == "the Kvasir tier is off: another version of vLLM"
    assert not scheduler.tier._jobs
    context = scheduler.request(keys)
    assert scheduler.tier.lookup(keys[0], context) is LookupResult.MISS


def test_chunks_of_a_prompt_follow_each_other(daemon: Daemon, start: Callable) -> None:
    scheduler, calls = start(daemon.endpoint), []
    cache = scheduler.tier._cache

    class Noting(Bent):
        def __init__(self) -> None:
            self._cache = cache

        def store(self, *arguments: Any) -> None:
            calls.append(arguments[1:])
            cache.store(*arguments)

        load = property(lambda self: cache.load)

    scheduler.tier._cache = Noting()
    keys = chain(range(16 * 8))
    context = scheduler.request(keys)
    scheduler.store(keys[:3], context)
    scheduler.store(keys[3:5], context)
    # A gap.
    scheduler.store(keys[6:], context)
    parents = [parent for call in calls for parent in call[2]]
    assert parents == [None, *keys[:4], None, keys[6]]
    assert {call[3] for call in calls} == {16}
    scheduler.settle()
    scheduler.manager.on_request_finished(context)
    assert not scheduler.tier._tails


def test_what_is_counted_is_what_is_declared(daemon: Daemon, start: Callable) -> None:
    scheduler = start(daemon.endpoint)
    scheduler.store(chain(range(16 * 4)))
    scheduler.settle()
    declared = scheduler.spec.build_metric_definitions(scheduler.spec.extra_config)
    counted = scheduler.manager.get_stats().reduce()
    assert counted["vllm:kvasir_tier_stored"] == 4 + 1
    ours = {f"vllm:kvasir_tier_{it}" for it in COUNTERS}
    assert ours <= declared.keys()
    assert {it for it in counted if "kvasir" in it} <= ours


def test_shutdown_gives_the_memory_back(daemon: Daemon) -> None:
    scheduler = Scheduler(daemon.endpoint)
    path = Path(scheduler.spec._scheduler_mmap.mmap_path)
    assert path.exists()
    scheduler.store(chain(range(16 * 12)))
    # Jobs are under way.
    scheduler.close()
    assert not path.exists()
    assert path.name not in Path("/proc/self/maps").read_text()
    # They had a moment to end.
    other = Scheduler(daemon.endpoint)
    keys = chain(range(16 * 12))
    assert other.found(keys, other.request(keys)) == 12
    other.close()


def test_shutdown_does_not_wait_for_a_daemon_that_hangs(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs are left behind, and the memory with them, until they have ended."""
    monkeypatch.setattr(tier, "SHUTDOWN_SECONDS", 0.0)
    scheduler = Scheduler(daemon.endpoint, store_timeout=5.0)
    path = Path(scheduler.spec._scheduler_mmap.mmap_path)
    cache = scheduler.tier._cache
    daemon.freeze()
    scheduler.store(chain(range(16 * 12)))
    scheduler.close()
    assert not cache.drain(0.0)
    assert path.name in Path("/proc/self/maps").read_text()
    assert cache.drain(PATIENCE_SECONDS)
    assert path.name not in Path("/proc/self/maps").read_text()
    daemon.thaw()
