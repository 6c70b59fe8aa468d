"""Pages of SGLang's own host pools, by way of a real daemon."""

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from conftest import Daemon
from pools import LAYOUTS, LATENT_LAYOUTS, PAGE, PAGES, content, keys, pool, storage, tokens
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from kvasir import Client
from kvasir.sglang import pages as kvasir_pages

KINDS = [(layout, False) for layout in LAYOUTS] + [(layout, True) for layout in LATENT_LAYOUTS]


@pytest.fixture(autouse=True)
def engine() -> None:
    pools.configure()


@pytest.mark.parametrize(("layout", "latent"), KINDS)
def test_pages_come_back_in_any_layout(daemon: Daemon, layout: str, latent: bool) -> None:
    host = pool(layout, latent=latent)
    backend = storage(daemon.endpoint, host)
    # The canary gives its page back.
    assert host.available_size() == host.size
    before = [content(host, page) for page in range(PAGES)]
    assert backend.batch_exists(keys(6)) == 0
    taken = [3, 1, 20, 7]
    assert backend.batch_set_v1(keys(4), tokens(taken)) == [True] * 4
    assert backend.batch_exists(keys(6)) == 4
    for other in LATENT_LAYOUTS if latent else LAYOUTS:
        elsewhere = pool(other, latent=latent, seed=2)
        there = storage(daemon.endpoint, elsewhere)
        untouched = [content(elsewhere, page) for page in range(PAGES)]
        assert there.batch_exists(keys(6)) == 4
        wanted = [10, 2, 5, 21]
        assert there.batch_get_v1(keys(4), tokens(wanted)) == [True] * 4
        for page in range(PAGES):
            is_wanted = page in wanted
            expected = before[taken[wanted.index(page)]] if is_wanted else untouched[page]
            assert content(elsewhere, page) == expected, (other, page)
    assert [content(host, page) for page in range(PAGES)] == before


@pytest.mark.parametrize(("layout", "latent"), KINDS)
def test_pages_as_tensors_are_the_same_pages(daemon: Daemon, layout: str, latent: bool) -> None:
    host = pool(layout, latent=latent)
    backend = storage(daemon.endpoint, host, interface_v1=0)
    flat = [host.get_data_page(page * PAGE).clone() for page in range(4)]
    assert backend.batch_set(keys(3), flat)
    assert backend.set(keys(4)[3], flat[3]) and backend.exists(keys(4)[3])
    targets = [torch.zeros_like(flat[0]) for _ in range(5)]
    came = backend.batch_get(keys(5), targets)
    assert came[4] is None
    for got, target, expected in zip(came, targets, flat, strict=False):
        assert got is target and kvasir_pages.same(got, expected)
    assert kvasir_pages.same(backend.get(keys(1)[0]), flat[0])
    # What came as tensors is found as pages.
    assert backend.batch_get_v1(keys(4), tokens([9, 8, 7, 6])) == [True] * 4
    assert [content(host, page) for page in (9, 8, 7, 6)] == [
        content(host, page) for page in range(4)
    ]


def test_what_is_missing_ends_the_prefix(daemon: Daemon) -> None:
    backend = storage(daemon.endpoint, pool("page_first"))
    some = keys(5)
    assert backend.batch_set_v1(some[:2] + some[3:], tokens([0, 1, 3, 4])) == [True] * 4
    assert backend.batch_exists(some) == 2
    assert backend.batch_get_v1(some, tokens([5, 6, 7, 8, 9])) == [True, True, False, False, False]


def test_a_page_is_there_when_all_shares_of_it_are(daemon: Daemon) -> None:
    host = pool("page_first")
    backend = storage(daemon.endpoint, host, tp_lcm_size=2)
    for share in range(2):
        assert all(backend.batch_set_v1(keys(2), tokens([0, 1])))
        assert backend.batch_exists(keys(2)) == 2
        lost = backend._pools["kv"].chunk_keys(keys(2))[1 + 2 * share]
        assert Client(daemon.endpoint).delete([lost]) == 1
        assert backend.batch_exists(keys(2)) == 1
        assert backend.batch_get_v1(keys(2), tokens([4, 5])) == [True, False]


def test_many_pages_come_in_several_loads(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvasir_pages, "LOAD_BYTES", 1)
    monkeypatch.setattr(kvasir_pages, "FIND_NAMES", 3)
    host = pool("layer_first", heads=2)
    backend = storage(daemon.endpoint, host, tp_lcm_size=2)
    assert all(backend.batch_set_v1(keys(8), tokens(list(range(8)))))
    assert backend.batch_exists(keys(11)) == 8
    came = backend.batch_get_v1(keys(10), tokens(list(range(10, 20))))
    assert came == [True] * 8 + [False] * 2
    assert [content(host, 10 + page) for page in range(8)] == [
        content(host, page) for page in range(8)
    ]


def test_ranks_of_any_number_share_pages_that_are_cut_alike(daemon: Daemon) -> None:
    whole = pool("page_first", heads=4)
    one = storage(daemon.endpoint, whole, tp_lcm_size=4)
    assert all(one.batch_set_v1(keys(2), tokens([3, 4])))
    for rank in range(2):
        part = pool("layer_first", heads=2, seed=2)
        backend = storage(daemon.endpoint, part, tp_rank=rank, tp_size=2, tp_lcm_size=4)
        assert backend.batch_get_v1(keys(2), tokens([8, 9])) == [True, True]
        for of_part, of_whole in ((8, 3), (9, 4)):
            mine = part.kv_buffer[:, :, of_part * PAGE : (of_part + 1) * PAGE]
            theirs = whole.kv_buffer[:, of_whole * PAGE : (of_whole + 1) * PAGE]
            expected = theirs.transpose(1, 2)[:, :, :, 2 * rank : 2 * rank + 2]
            assert kvasir_pages.same(mine, expected)
    # Cut otherwise, they are others; so are those of the other rank.
    ranks = [
        storage(daemon.endpoint, pool("page_first", heads=2), tp_rank=rank, tp_size=2)
        for rank in range(2)
    ]
    assert [it.batch_exists(keys(2)) for it in ranks] == [0, 0]
    assert ranks[0].batch_set_v1(keys(1), tokens([0])) == [True]
    assert [it.batch_exists(keys(1)) for it in ranks] == [1, 0]


def test_what_all_ranks_have_is_stored_by_one(daemon: Daemon) -> None:
    hosts = [pool("page_first", latent=True, seed=rank) for rank in range(2)]
    ranks = [
        storage(daemon.endpoint, host, tp_rank=rank, tp_size=2) for rank, host in enumerate(hosts)
    ]
    assert ranks[1].batch_set_v1(keys(1), tokens([4])) == [True]
    assert [it.batch_exists(keys(1)) for it in ranks] == [0, 0]
    assert ranks[0].batch_set_v1(keys(1), tokens([4])) == [True]
    assert ranks[1].batch_get_v1(keys(1), tokens([7])) == [True]
    assert content(hosts[1], 7) == content(hosts[0], 4)


def test_other_models_and_geometries_have_other_pages(daemon: Daemon, tmp_path: Path) -> None:
    here = storage(daemon.endpoint, pool("page_first"))
    assert all(here.batch_set_v1(keys(2), tokens([0, 1])))

    def found(host: Any = None) -> int:
        return storage(daemon.endpoint, host or pool("page_first")).batch_exists(keys(2))

    assert found() == 2
    assert found(pool("page_first", dtype=torch.float16)) == 0
    assert found(pool("page_first", page=32)) == 0
    assert found(pool("page_first", heads=2)) == 0
    assert found(pool("page_first", latent=True)) == 0
    copy = shutil.copytree(pools.MODEL, tmp_path / "elsewhere")
    pools.configure(str(copy))
    assert found() == 2
    pools.configure(str(copy), weight_version="tuned")
    assert found() == 0
    pools.configure(str(copy), json_model_override_args='{"rope_theta": 5e5}')
    assert found() == 0
    weights = next(copy.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    pools.configure(str(copy))
    assert found() == 0


def assert_off(backend: Any, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """It says so once, and does nothing from then on."""
    assert backend.batch_exists(keys(2)) == 0 and not backend.exists(keys(1)[0])
    assert backend.batch_get_v1(keys(2), tokens([0, 1])) == [False, False]
    assert backend.batch_set_v1(keys(2), tokens([0, 1])) == [False, False]
    assert backend.get(keys(1)[0]) is None and not backend.set(keys(1)[0], torch.zeros(1))
    assert backend.batch_get(keys(2)) == [None, None] and not backend.batch_set(keys(1), [None])
    transfer = PoolTransfer(PoolName.KV, tokens([0]), keys=keys(1))
    assert backend.batch_exists_v2(keys(2), [transfer]).kv_hit_pages == 0
    assert backend.batch_get_v2([transfer]) == {"kv": [False]}
    assert backend.batch_set_v2([transfer]) == {"kv": [False]}
    assert not backend.clear()
    said = [it.getMessage() for it in caplog.records if it.levelno >= logging.ERROR]
    assert len(said) == 1 and why in said[0], said


def test_what_is_not_known_turns_it_off(
    daemon: Daemon, caplog: pytest.LogCaptureFixture, subtests: pytest.Subtests
) -> None:
    class Other(MHATokenToKVPoolHost):
        """A kind with more in its pages, such as scales."""

    def layout(host: Any) -> None:
        host.layout = "page_unified"

    def kind(host: Any) -> None:
        host.__class__ = Other

    def shape(host: Any) -> None:
        host.kv_buffer = host.kv_buffer[:, :-1]

    def dtype(host: Any) -> None:
        host.dtype = torch.uint8

    def format(host: Any) -> None:
        host.stores_page_envelope = True

    def full(host: Any) -> None:
        host.alloc(host.available_size())

    for change, why in [
        (layout, "layout page_unified"),
        (kind, "pools of Other"),
        (shape, "shape"),
        (dtype, "elements of torch.uint8"),
        (format, "not where their numbers say"),
        (full, "no page left"),
    ]:
        with subtests.test(change.__name__):
            host = pool("page_first")
            change(host)
            caplog.clear()
            assert_off(storage(daemon.endpoint, host), caplog, why)
    with subtests.test("heads that cannot be cut"):
        caplog.clear()
        assert_off(storage(daemon.endpoint, pool("page_first"), tp_lcm_size=3), caplog, "3 parts")
    with subtests.test("a pool beside it"):
        backend = storage(daemon.endpoint, pool("page_first"))
        caplog.clear()
        host = pool("page_first")
        kind(host)
        backend.register_mem_host_pool_v2(host, PoolName.SWA)
        assert_off(backend, caplog, "swa: pools of Other")
    with subtests.test("no weights"):
        pools.configure(load_format="dummy")
        caplog.clear()
        assert_off(storage(daemon.endpoint, pool("page_first")), caplog, "no weights")
    with subtests.test("a malformed option"):
        caplog.clear()
        backend = storage(daemon.endpoint, pool("page_first"), load_timeout="soon")
        assert_off(backend, caplog, "soon")


@pytest.mark.parametrize("order", ["plane token layer dim head", "plane token head layer dim"])
def test_a_layout_that_is_not_what_it_seems_is_found_out(
    daemon: Daemon,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
) -> None:
    """Axes of one size cannot be told apart by their shape."""
    monkeypatch.setitem(kvasir_pages.ORDERS, "layer_first", "layer plane token head dim")
    monkeypatch.setattr(pools, "LAYERS", 2)
    host = pool("layer_first")
    assert_off(storage(daemon.endpoint, host), caplog, "another one")


@pytest.mark.parametrize("call", ["read", "write"])
def test_copies_that_are_not_exact_are_found_out(
    daemon: Daemon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    class Wrong:
        def __init__(self, cache: Any) -> None:
            self._cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cache, name)

        def read(self, page: int) -> bytes:
            chunk = self._cache.read(page)
            return chunk[::-1] if call == "read" else chunk

        def write(self, page: int, chunk: bytes) -> None:
            self._cache.write(page, chunk[::-1] if call == "write" else chunk)

    right = kvasir_pages.register

    def register(caches: list[Any], *arguments: Any) -> torch.Tensor:
        view = right(caches, *arguments)
        caches[:] = map(Wrong, caches)
        return view

    monkeypatch.setattr(kvasir_pages, "register", register)
    backend = storage(daemon.endpoint, pool("page_first"))
    assert_off(backend, caplog, f"not {'read' if call == 'read' else 'written'} as they are")


def test_weights_that_are_replaced_turn_it_off(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    backend = storage(daemon.endpoint, pool("page_first"))
    assert all(backend.batch_set_v1(keys(2), tokens([0, 1])))
    pools.runtime_context.get_context().override("test", weight_version="next")
    assert_off(backend, caplog, "weights were replaced")


def test_a_daemon_that_fails_costs_its_time_once(daemon: Daemon) -> None:
    limits = {"lookup_timeout": 0.3, "load_timeout": 0.5, "store_timeout": 0.5, "cooldown": 5.0}
    host = pool("page_first")
    backend = storage(daemon.endpoint, host, **limits)
    assert all(backend.batch_set_v1(keys(4), tokens([0, 1, 2, 3])))
    daemon.freeze()
    begun = time.monotonic()
    for _ in range(100):
        assert backend.batch_get_v1(keys(4), tokens([4, 5, 6, 7])) == [False] * 4
        assert backend.batch_set_v1(keys(4, 10), tokens([0, 1, 2, 3])) == [False] * 4
        assert backend.batch_exists(keys(4)) == 0
    assert time.monotonic() - begun < 4
    daemon.thaw()
    wait_for(lambda: backend.batch_exists(keys(4)) == 4)
    assert backend.batch_get_v1(keys(4), tokens([4, 5, 6, 7])) == [True] * 4
    assert content(host, 7) == content(host, 3)
    daemon.kill()
    assert backend.batch_exists(keys(4)) == 0
    assert backend.batch_set_v1(keys(4, 10), tokens([0, 1, 2, 3])) == [False] * 4
    daemon.start()
    wait_for(lambda: backend.batch_exists(keys(4)) == 4)


def test_it_begins_without_a_daemon(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    daemon.kill()
    backend = storage(daemon.endpoint, pool("page_first"), cooldown=0.1)
    assert "no Kvasir daemon answers" in caplog.text
    assert backend.batch_set_v1(keys(1), tokens([0])) == [False]
    daemon.start()
    wait_for(lambda: backend.batch_set_v1(keys(1), tokens([0])) == [True])


def wait_for(is_so: Any) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_no_page_is_said_to_have_come_that_did_not(daemon: Daemon, fault: str) -> None:
    """Under a daemon that comes and goes, what is reported whole is whole."""
    limits = {"lookup_timeout": 0.2, "load_timeout": 0.2, "store_timeout": 0.2, "cooldown": 0.05}
    host, fresh = pool("layer_first"), pool("page_first_direct", seed=2)
    writer = storage(daemon.endpoint, host, **limits)
    reader = storage(daemon.endpoint, fresh, **limits)
    expected = [content(host, page) for page in range(8)]
    over = threading.Event()

    def harm() -> None:
        while not over.wait(0.1):
            if fault == "kill":
                daemon.kill()
                daemon.start()
            else:
                daemon.freeze()
                over.wait(0.15)
                daemon.thaw()

    thread = threading.Thread(target=harm)
    thread.start()
    came = stored = 0
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until or not came:
            assert time.monotonic() < until + 60
            stored += sum(writer.batch_set_v1(keys(8), tokens(list(range(8)))))
            pages = list(range(8, 16))
            for page in pages:
                kvasir_pages.fill(reader._pools["kv"]._view[page])
            whole = reader.batch_get_v1(keys(8), tokens(pages))
            for at, is_whole in enumerate(whole):
                if is_whole:
                    came += 1
                    assert content(fresh, pages[at]) == expected[at]
    finally:
        over.set()
        thread.join()
    assert stored and came


def test_sglangs_own_faults_harm_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.002")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    host = pool("page_first")
    backend = storage(daemon.endpoint, host)
    assert isinstance(backend, HiCacheStorageFailureInjector)
    seen = set()
    for turn in range(60):
        is_stored = backend.batch_set_v1(keys(4), tokens([0, 1, 2, 3]))
        found = backend.batch_exists(keys(4))
        kvasir_pages.fill(backend._backend._pools["kv"]._view[4:8])
        came = backend.batch_get_v1(keys(4), tokens([4, 5, 6, 7]))
        for page, is_whole in enumerate(came):
            assert not is_whole or content(host, 4 + page) == content(host, page)
        seen |= {("set", all(is_stored)), ("get", all(came)), ("found", found)}
    assert seen >= {("set", True), ("set", False), ("get", True), ("get", False)}
    assert seen >= {("found", 0), ("found", 4)}


def test_pools_beside_have_pages_of_their_own(daemon: Daemon) -> None:
    """A draft model's, as SGLang registers them."""
    host, draft = pool("page_first"), pool("page_first", heads=2, seed=2)
    backend = storage(daemon.endpoint, host)
    backend.register_mem_host_pool_v2(draft, PoolName.DRAFT)
    of_draft = PoolTransfer(PoolName.DRAFT, tokens([0, 1]), keys=keys(2))
    assert backend.batch_set_v2([of_draft], HiCacheStorageExtraInfo(prefix_keys=keys(1, 9))) == {
        "draft": [True, True]
    }
    assert backend.batch_exists_v2(keys(3), [of_draft]).kv_hit_pages == 0
    assert all(backend.batch_set_v1(keys(3), tokens([0, 1, 2])))
    found = backend.batch_exists_v2(keys(3), [of_draft])
    assert found.kv_hit_pages == 2 and found.restorable_prefix_pages == [1, 2]
    assert found.extra_pool_hit_pages == {"kv": 3, "draft": 2}
    wanted = [
        PoolTransfer(PoolName.KV, tokens([5, 6]), keys=keys(2)),
        PoolTransfer(PoolName.DRAFT, tokens([7, 8, 9]), keys=keys(3)),
    ]
    assert backend.batch_get_v2(wanted) == {"kv": [True] * 2, "draft": [True, True, False]}
    assert content(host, 6) == content(host, 1) and content(draft, 8) == content(draft, 1)
    # What holds something of the last pages alone is not known.
    of_draft.hit_policy = PoolHitPolicy.TRAILING_PAGES
    assert backend.batch_exists_v2(keys(3), [of_draft]).kv_hit_pages == 0


def test_what_was_stored_can_be_cleared(daemon: Daemon) -> None:
    backend = storage(daemon.endpoint, pool("page_first"), tp_lcm_size=2)
    other = storage(daemon.endpoint, pool("page_first"), tp_lcm_size=2)
    assert all(backend.batch_set_v1(keys(3), tokens([0, 1, 2])))
    assert all(other.batch_set_v1(keys(1, 3), tokens([3])))
    assert backend.clear()
    assert backend.batch_exists(keys(1)) == 0 and other.batch_exists(keys(1, 3)) == 1
    assert all(backend.batch_set_v1(keys(3), tokens([0, 1, 2])))
    assert backend.batch_exists(keys(4)) == 4
    daemon.kill()
    assert not backend.clear()
    daemon.start()
    wait_for(lambda: backend.batch_exists(keys(4)) == 4)
    assert backend.clear() and other.batch_exists(keys(1, 3)) == 0


def test_places_that_are_no_pages_are_refused(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    backend = storage(daemon.endpoint, pool("page_first"))
    caplog.clear()
    assert backend.batch_get_v1(keys(1), tokens([1]) + 1) == [False]
    assert "batch_get_v1 failed" in caplog.text and "the Kvasir cache is off" in caplog.text


def test_what_was_moved_is_told(daemon: Daemon) -> None:
    backend = storage(daemon.endpoint, pool("page_first"))
    assert all(backend.batch_set_v1(keys(3), tokens([0, 1, 2])))
    assert backend.batch_get_v1(keys(3), tokens([5, 6, 7])) == [True] * 3
    stats = backend.get_stats()
    assert stats.backup_pgs == [3] and stats.prefetch_pgs == [3]
    assert stats.backup_bandwidth[0] > 0 and stats.prefetch_bandwidth[0] > 0
    assert backend.get_stats().backup_pgs == []
