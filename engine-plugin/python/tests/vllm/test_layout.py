"""What is not known turns the cache off; nothing is guessed. With vLLM's own classes."""

import pytest
import torch
from conftest import Daemon
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from kvasir import BlockCache, Client, Namespace
from kvasir._identity import Unsupported
from kvasir.vllm import layout
from kvasir.vllm.memory import PARTS, Direct, Staged

current_platform.import_kernels()

BLOCKS, HEADS, TOKENS, DIM = 6, 2, 32, 32
NAMES = ["first", "second"]


def spec(kind: type = FullAttentionSpec, **changes: object) -> object:
    values = {
        "block_size": TOKENS,
        "num_kv_heads": HEADS,
        "head_size": DIM,
        "dtype": torch.bfloat16,
    }
    return kind(**(values | changes))


def config(*specs: object) -> KVCacheConfig:
    groups = [KVCacheGroupSpec(NAMES, it) for it in specs]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


def cache() -> BlockCache:
    geometry = layout.geometry(config(spec()))
    names = Namespace(geometry.layout, architecture="a", weights="w")
    return BlockCache("127.0.0.1:9", names)


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    shape = (BLOCKS, HEADS, TOKENS, 2 * DIM)
    return {name: torch.randn(shape).to(dtype) for name in NAMES}


def as_it_is(views: list[torch.Tensor]) -> layout.Form:
    return layout.Form("a name", lambda: layout.any_bits(views))


class Attention:
    """A layer whose KV is written as vLLM's kernels for these instructions do."""

    def __init__(self, isa: str) -> None:
        self.impl = self
        self._isa = isa

    def do_kv_cache_update(
        self,
        layer: object,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        assert layer is self
        blocks, heads, tokens, _ = kv_cache.shape
        planes = kv_cache.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            *planes,
            slots,
            self._isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )


def attention(*isas: str) -> dict[str, Attention]:
    """Of each layer, by the instructions it is for; the last ones are for the layers left."""
    layers = [*isas, *[isas[-1]] * len(NAMES)]
    return {name: Attention(isa) for name, isa in zip(NAMES, layers, strict=False)}


def test_geometry_is_that_of_the_one_group() -> None:
    geometry = layout.geometry(config(spec()))
    assert geometry.layers == tuple(NAMES)
    assert geometry.layout.layers == 2 and geometry.layout.kv_heads == HEADS
    assert geometry.layout.tokens == TOKENS and geometry.layout.dtype == "bf16"


@pytest.mark.parametrize(
    "specs",
    [
        [spec(), spec()],
        [spec(SlidingWindowSpec, sliding_window=64)],
        [spec(sliding_window=64)],
        [spec(dtype=torch.uint8)],
    ],
    ids=["two groups", "window spec", "window", "bytes"],
)
def test_other_kinds_of_kv_are_not_known(specs: list[object]) -> None:
    with pytest.raises(Unsupported):
        layout.geometry(config(*specs))


def test_tensors_of_any_strides_are_reached() -> None:
    geometry = layout.geometry(config(spec()))
    plain = tensors()
    # Tokens before heads in memory; all layers in one storage.
    turned = {
        name: view.transpose(1, 2).contiguous().transpose(1, 2)
        for name, view in plain.items()
    }
    both = torch.stack(list(plain.values()))
    shared = dict(zip(NAMES, both, strict=True))
    for kv in (plain, turned, shared):
        before = {name: view.clone() for name, view in kv.items()}
        views = layout.views(geometry, kv)
        assert [view.data_ptr() for view in views] == [
            kv[name].data_ptr() for name in NAMES
        ]
        form = as_it_is(views)
        layout.canary(Direct(cache(), views), views, form)
        staged = Staged(cache(), geometry, views, PARTS * geometry.layout.chunk_bytes)
        layout.canary(staged, views, form)
        # The canary leaves nothing behind.
        assert all(torch.equal(kv[name], before[name]) for name in NAMES)


@pytest.mark.parametrize("staging", [None, 1 << 20])
def test_a_round_trip_leaves_nothing_behind(daemon: Daemon, staging: int | None) -> None:
    geometry = layout.geometry(config(spec()))
    names = Namespace(geometry.layout, architecture="a", weights="w")
    cache = BlockCache(daemon.endpoint, names, lookup_timeout=5.0)
    kv = tensors()
    before = {name: view.clone() for name, view in kv.items()}
    views = layout.views(geometry, kv)
    memory = Direct(cache, views) if staging is None else Staged(cache, geometry, views, staging)
    form = as_it_is(views)
    assert layout.round_trip(memory, cache, views, form)
    assert all(torch.equal(kv[name], before[name]) for name in NAMES)
    assert not any(it["chunks"] for it in Client(daemon.endpoint).stats().values())


def test_tensors_of_another_shape_are_not_known() -> None:
    geometry = layout.geometry(config(spec()))
    wide = torch.zeros(BLOCKS, HEADS, TOKENS, 3 * DIM, dtype=torch.bfloat16)
    planes = torch.zeros(2, BLOCKS, HEADS, TOKENS, DIM, dtype=torch.bfloat16)
    gaps = torch.zeros(BLOCKS, HEADS, TOKENS, 4 * DIM, dtype=torch.bfloat16)[..., ::2]
    elsewhere = tensors()[NAMES[0]].to("meta")
    for wrong in (wide, planes, gaps, elsewhere, tensors(torch.float16)[NAMES[0]]):
        with pytest.raises(Unsupported):
            layout.views(geometry, {NAMES[0]: wrong, NAMES[1]: wrong})
    with pytest.raises(Unsupported, match="second"):
        layout.views(geometry, {NAMES[0]: tensors()[NAMES[0]]})
    short = tensors()
    short[NAMES[1]] = short[NAMES[1]][:-1]
    with pytest.raises(Unsupported):
        layout.views(geometry, short)


@pytest.mark.parametrize("call", ["read", "write"])
def test_memory_that_is_not_where_it_seems_is_found_out(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    geometry = layout.geometry(config(spec()))
    views = layout.views(geometry, tensors())
    memory = Direct(cache(), views)
    form = as_it_is(views)
    right = getattr(memory, call)
    # Of another block.
    monkeypatch.setattr(memory, call, lambda block, *chunk: right(1, *chunk))
    with pytest.raises(Unsupported, match="layout is another one"):
        layout.canary(memory, views, form)


def test_blocks_that_are_arranged_in_another_way_have_other_names() -> None:
    """CPUs with and without matrix instructions, which one daemon may serve."""
    geometry, kv = layout.geometry(config(spec())), tensors()
    views, before = layout.views(geometry, kv), {it: kv[it].clone() for it in kv}

    def name(*isas: str, encoding: str | None = None) -> str:
        return layout.form(geometry, views, attention(*isas), encoding).name

    plain = name("vec")
    assert all(torch.equal(kv[it], before[it]) for it in kv)
    # What was there before does not count.
    for view in views:
        view.zero_()
    assert name("vec") == plain
    others = {plain, name("amx"), name("vec", "amx"), name("amx", "vec")}
    assert len(others) == 4
    with pytest.raises(Unsupported, match="second"):
        layout.form(geometry, views, {NAMES[0]: Attention("vec")}, None)
    # Keys and values have the same ones, if they come back as they are.
    exact = {name(isa, encoding=level) for isa in ("vec", "amx") for level in ("raw", "lossless")}
    assert len(exact) == 1 and not exact & others
    assert len({name("vec", encoding=level) for level in ("raw", "int8", "int4", "l0", "l2")}) == 5

    # Where a part of a block is never written, what lies there does not count.
    class Sparse(Attention):
        def do_kv_cache_update(self, layer: object, key: object, value: object, *kv: object) -> None:
            kv[0][0, 0] = 1.0

    sparse = dict.fromkeys(NAMES, Sparse("vec"))
    before = layout.form(geometry, views, sparse, None).name
    for view in views:
        view.fill_(2.0)
    assert layout.form(geometry, views, sparse, None).name == before
    with pytest.raises(Unsupported, match="a place of its own"):
        layout.form(geometry, views, sparse, "raw")


@pytest.mark.parametrize(
    ("isas", "dtype"),
    [
        (["vec"], torch.float32),
        (["vec"], torch.float16),
        (["vec"], torch.bfloat16),
        (["vec16"], torch.bfloat16),
        (["amx"], torch.bfloat16),
        # Of each layer its own.
        (["vec", "amx"], torch.bfloat16),
    ],
    ids=str,
)
def test_places_are_those_of_keys_and_values(isas: list[str], dtype: torch.dtype) -> None:
    geometry, kv = layout.geometry(config(spec(dtype=dtype)), as_it_is=False), tensors(dtype)
    views, before = layout.views(geometry, kv), {it: kv[it].clone() for it in kv}
    places = layout.form(geometry, views, attention(*isas), "raw").places
    assert all(torch.equal(kv[it], before[it]) for it in kv)
    key, value = torch.randn(2, TOKENS, HEADS, DIM).to(dtype)
    for view, order, layer in zip(views, places, attention(*isas).values(), strict=True):
        layer.do_kv_cache_update(layer, key, value, view, 3 * TOKENS + torch.arange(TOKENS))
        planes = view[3].flatten()[order].view(2, HEADS, TOKENS, DIM)
        assert torch.equal(planes[0], key.transpose(0, 1))
        assert torch.equal(planes[1], value.transpose(0, 1))
