"""What is not known turns the cache off; nothing is guessed. With vLLM's own classes."""

import pytest
import torch
from conftest import Daemon
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from kvasir import BlockCache, Client, Namespace
from kvasir._identity import Unsupported
from kvasir.vllm import layout

BLOCKS, HEADS, TOKENS, DIM = 6, 2, 32, 16
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
        views = layout.register(cache(), geometry, kv)
        assert [view.data_ptr() for view in views] == [
            kv[name].data_ptr() for name in NAMES
        ]
        # The canary leaves nothing behind.
        assert all(torch.equal(kv[name], before[name]) for name in NAMES)


def test_a_round_trip_leaves_nothing_behind(daemon: Daemon) -> None:
    geometry = layout.geometry(config(spec()))
    names = Namespace(geometry.layout, architecture="a", weights="w")
    cache = BlockCache(daemon.endpoint, names, lookup_timeout=5.0)
    kv = tensors()
    before = {name: view.clone() for name, view in kv.items()}
    views = layout.register(cache, geometry, kv)
    assert layout.round_trip(cache, geometry, views)
    assert all(torch.equal(kv[name], before[name]) for name in NAMES)
    assert not any(it["chunks"] for it in Client(daemon.endpoint).stats().values())


def test_tensors_of_another_shape_are_not_known() -> None:
    geometry = layout.geometry(config(spec()))
    wide = torch.zeros(BLOCKS, HEADS, TOKENS, 3 * DIM, dtype=torch.bfloat16)
    planes = torch.zeros(2, BLOCKS, HEADS, TOKENS, DIM, dtype=torch.bfloat16)
    gaps = torch.zeros(BLOCKS, HEADS, TOKENS, 4 * DIM, dtype=torch.bfloat16)[..., ::2]
    for wrong in (wide, planes, gaps, tensors(torch.float16)[NAMES[0]]):
        with pytest.raises(Unsupported):
            layout.register(cache(), geometry, {NAMES[0]: wrong, NAMES[1]: wrong})
    with pytest.raises(Unsupported, match="second"):
        layout.register(cache(), geometry, {NAMES[0]: tensors()[NAMES[0]]})
    short = tensors()
    short[NAMES[1]] = short[NAMES[1]][:-1]
    with pytest.raises(Unsupported):
        layout.register(cache(), geometry, short)


def test_a_layout_that_is_not_what_it_seems_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values the other way round than the canary expects."""
    geometry = layout.geometry(config(spec()))
    right = layout._chunk

    def wrong(geometry: layout.Geometry, views: list[torch.Tensor]) -> bytes:
        swapped = [torch.cat(view.chunk(2, dim=-1)[::-1], dim=-1) for view in views]
        return right(geometry, swapped)

    monkeypatch.setattr(layout, "_chunk", wrong)
    with pytest.raises(Unsupported, match="layout is another one"):
        layout.register(cache(), geometry, tensors())
