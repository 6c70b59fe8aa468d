"""Blocks by way of staging memory, with a real daemon. The device is the host here: what is shown
is what becomes of blocks and of parts, and not that streams keep their order.
"""

from collections.abc import Callable

import pytest
import torch
from conftest import Daemon
from test_layout import DIM, HEADS, NAMES, TOKENS, attention, config, spec

from kvasir import BlockCache, Client, Namespace
from kvasir._identity import Unsupported
from kvasir.vllm import layout
from kvasir.vllm.memory import PARTS, Direct, Memory, Staged

LAYERS, BLOCKS = len(NAMES), 64
GEOMETRY = layout.geometry(config(spec()))

Make = Callable[[list[torch.Tensor]], Memory]


def cache(daemon: Daemon, of: layout.Geometry = GEOMETRY, encoding: str = "raw") -> BlockCache:
    names = Namespace(of.layout, architecture="a", weights="w")
    return BlockCache(daemon.endpoint, names, lookup_timeout=1.0, encoding=encoding)


def staged(daemon: Daemon, views: list[torch.Tensor], blocks: int) -> Staged:
    """With so many blocks in a part."""
    return Staged(cache(daemon), GEOMETRY, views, blocks * PARTS * GEOMETRY.layout.chunk_bytes)


class Encoded:
    """Memory whose blocks are stored as keys and values, and written for some instructions."""

    def __init__(
        self, daemon: Daemon, views: list[torch.Tensor], isa: str, encoding: str, blocks: int = 2
    ) -> None:
        geometry = layout.geometry(config(spec()), as_it_is=False)
        self.form = layout.form(geometry, views, attention(isa), encoding)
        self.cache = cache(daemon, geometry, encoding)
        size = blocks * PARTS * geometry.layout.chunk_bytes
        self.memory = Staged(self.cache, geometry, views, size, self.form.places)


@pytest.fixture(params=["direct", "staged", "lossless"])
def make(request: pytest.FixtureRequest, daemon: Daemon) -> Make:
    if request.param == "direct":
        return lambda views: Direct(cache(daemon), views)
    if request.param == "staged":
        return lambda views: staged(daemon, views, 2)
    return lambda views: Encoded(daemon, views, "vec", request.param).memory


def tensors() -> list[torch.Tensor]:
    shape = (BLOCKS, HEADS, TOKENS, GEOMETRY.content)
    return [torch.randn(shape).to(torch.bfloat16) for _ in NAMES]


def names(count: int) -> list[bytes]:
    return [bytes([it]) * 32 for it in range(count)]


def bring(memory: Memory, blocks: list[int], by_layer: bool) -> int:
    begin = memory.load_layers if by_layer else memory.load
    load = begin(names(len(blocks)), blocks)
    for layer in range(LAYERS if by_layer else 0):
        load.wait_layer(layer)
    while (came := load.wait(1.0)) is None:
        pass
    return came


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_blocks_come_back_where_they_are_wanted(
    make: Make, count: int, by_layer: bool
) -> None:
    views = tensors()
    memory, blocks = make(views), [5, 1, 40, 2, 63][:count]
    before = [view[blocks] for view in views]
    saving = memory.save(names(count), blocks, None)
    for layer in range(LAYERS if by_layer else 0):
        saving.layer(layer)
        # It is the next step's now.
        views[layer].zero_()
    saving.end()
    for view in views:
        view.zero_()
    assert memory.flush(10.0)
    elsewhere = [7, 8, 50, 9, 10][:count]
    assert bring(memory, elsewhere, by_layer) == count
    for view, expected in zip(views, before, strict=True):
        assert torch.equal(view[elsewhere], expected)
        untouched = [it for it in range(BLOCKS) if it not in elsewhere]
        assert not view[untouched].any()


@pytest.mark.parametrize("by_layer", [False, True])
def test_what_lacks_in_the_middle_ends_a_load(make: Make, by_layer: bool) -> None:
    memory = make(tensors())
    for name, block in [(0, 0), (1, 1), (2, 2), (4, 4)]:
        memory.save([names(5)[name]], [block], None).end()
    assert memory.flush(10.0)
    # A part that came short does not count where its layers are brought as they come.
    assert bring(memory, [11, 12, 13, 14, 15], by_layer) in ([2, 3] if by_layer else [3])


def test_what_is_dropped_is_not_stored(make: Make) -> None:
    memory = make(tensors())
    saving = memory.save(names(2), [1, 2], None)
    saving.layer(0)
    saving.drop()
    saving.end()
    assert memory.flush(10.0)
    assert memory.stats()["stored"] == 0


def test_parts_are_freed(daemon: Daemon) -> None:
    views = tensors()
    memory = staged(daemon, views, 1)
    for step in range(3 * PARTS):
        # Some are stored, some dropped; some are loaded by the step, and some do not come.
        saving = memory.save(names(3), [1, 2, 3], None)
        saving.layer(0)
        saving.drop() if step % 2 else saving.end()
        assert memory.flush(10.0)
        assert bring(memory, [4, 5, 6, 7], by_layer=step % 3 == 0) == 3
    assert memory.flush(10.0)
    assert memory.free.qsize() == PARTS


def test_stores_that_find_no_part_are_left_out_and_loads_wait(daemon: Daemon) -> None:
    views = tensors()
    memory = staged(daemon, views, 1)
    held = memory.save(names(PARTS - 1), list(range(PARTS - 1)), None)
    more = memory.save(names(PARTS)[-1:] + [b"another" * 4], [PARTS, PARTS + 1], None)
    assert memory.stats()["stores_dropped"] == 1
    load = memory.load(names(2), [20, 21])
    assert load.wait(0.3) is None
    # Without a part to bring them into, nothing comes to a step, which does not wait.
    assert bring(memory, [30], by_layer=True) == 0
    held.end()
    more.end()
    assert memory.flush(10.0)
    while load.wait(1.0) is None:
        pass
    assert memory.stats()["stored"] == PARTS
    assert bring(memory, list(range(20, 20 + PARTS)), by_layer=False) == PARTS
    for view in views:
        assert torch.equal(view[20 : 20 + PARTS - 1], view[: PARTS - 1])


def test_staging_memory_that_is_too_small_says_so(daemon: Daemon) -> None:
    with pytest.raises(Unsupported, match="too small"):
        Staged(cache(daemon), GEOMETRY, tensors(), PARTS * GEOMETRY.layout.chunk_bytes - 1)


def written(views: list[torch.Tensor], isa: str, block: int) -> torch.Tensor:
    """Keys and values `[layer, key or value, token, head, dim]` that vLLM's kernel wrote there."""
    planes = torch.randn(len(views), 2, TOKENS, HEADS, DIM).to(torch.bfloat16)
    slots = block * TOKENS + torch.arange(TOKENS)
    for layer, view, (key, value) in zip(attention(isa).values(), views, planes, strict=True):
        layer.do_kv_cache_update(layer, key, value, view, slots)
    return planes


@pytest.mark.parametrize("isas", [("vec", "amx"), ("amx", "vec")])
def test_hosts_that_arrange_blocks_differently_share_keys_and_values(
    daemon: Daemon, isas: tuple[str, str]
) -> None:
    one, other = tensors(), tensors()
    first = Encoded(daemon, one, isas[0], "lossless").memory
    second = Encoded(daemon, other, isas[1], "lossless").memory
    blocks = [3, 9, 4]
    planes = [written(one, isas[0], block) for block in blocks]
    first.save(names(3), blocks, None).end()
    assert first.flush(10.0)
    assert bring(second, [20, 30, 10], by_layer=False) == 3
    # What they would be had this host computed them.
    came = [[view[block].clone() for view in other] for block in [20, 30, 10]]
    for values, block in zip(planes, came, strict=True):
        for layer, (key, value) in enumerate(values):
            by_layer = list(attention(isas[1]).values())[layer]
            by_layer.do_kv_cache_update(by_layer, key, value, other[layer], torch.arange(TOKENS))
            assert torch.equal(other[layer][0], block[layer])


@pytest.mark.parametrize("level", ["raw", "lossless", "int8", "int4", "l0", "l1", "l2"])
def test_the_canary_knows_what_an_encoding_leaves(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    views = tensors()
    before = [view.clone() for view in views]
    it = Encoded(daemon, views, "vec", level)
    layout.canary(it.memory, views, it.form)
    assert layout.round_trip(it.memory, it.cache, views, it.form)
    assert it.form.is_exact == (level in ("raw", "lossless"))
    assert all(torch.equal(*pair) for pair in zip(views, before, strict=True))
    assert not any(it["chunks"] for it in Client(daemon.endpoint).stats().values())
    if not it.form.is_exact:
        # What is not as near as that is something else.
        monkeypatch.setattr(layout, "ERROR", 1e-4)
        with pytest.raises(Unsupported, match="come back"):
            layout.round_trip(it.memory, it.cache, views, it.form)
    # Keys where values are.
    it.form.places[1][:] = it.form.places[1].roll(len(it.form.places[1]) // 2)
    wrong = Staged(
        it.cache.beside(),
        layout.geometry(config(spec()), as_it_is=False),
        views,
        2 * PARTS * GEOMETRY.layout.chunk_bytes,
        it.form.places,
    )
    with pytest.raises(Unsupported, match="not read as it is"):
        layout.canary(wrong, views, it.form)
