"""What vLLM's KV is, and where it is: taken from its own tensors and configuration.

Nothing is guessed. What is not known here raises `Unsupported`, and the cache stays out of
the way.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvasir import BlockCache, Layout, Namespace
from kvasir._identity import DTYPES, INCIDENTAL, Unsupported, weights
from kvasir.vllm.memory import Memory, ended

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadingSpec

# How long a daemon may take for a block when the engine starts.
ROUND_TRIP_SECONDS = 1.0


@dataclass(frozen=True)
class Geometry:
    """Of one worker's KV, which vLLM shows as `[block, head, token, content]`.

    What it calls content is a key and a value in most backends. On CPUs it is not: what is where in
    a block depends on the instructions that the CPU has. So it is stored as it is, and `arrangement`
    says which one it is; or, for the codec, as keys and values, by `places`.
    """

    layers: tuple[str, ...]
    layout: Layout
    content: int


def geometry(config: "KVCacheConfig", *, as_it_is: bool = True) -> Geometry:
    """Of the one group of layers that all attend to everything. A chunk has blocks as they are, or
    `[key or value, head, token, dim]`.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = config.kv_cache_groups
    if len(groups) != 1:
        raise Unsupported(f"the model has {len(groups)} groups of KV, not one")
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        raise Unsupported(f"KV of {type(spec).__name__} is not known")
    if spec.head_size != getattr(spec, "head_size_v", spec.head_size):
        raise Unsupported("keys and values differ in width")
    if getattr(spec, "sliding_window", None) or getattr(
        spec, "attention_chunk_size", None
    ):
        raise Unsupported("the model attends to a window")
    dtype = DTYPES.get(str(spec.dtype))
    if dtype is None:
        raise Unsupported(f"elements of {spec.dtype} are not known")
    layers, content = tuple(groups[0].layer_names), 2 * spec.head_size
    layout = Layout(
        layers=len(layers),
        planes=1 if as_it_is else 2,
        kv_heads=spec.num_kv_heads,
        head_dim=content if as_it_is else spec.head_size,
        tokens=spec.block_size,
        dtype=dtype,
    )
    return Geometry(layers, layout, content)


def views(geometry: Geometry, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The layers, if they are what they are said to be."""
    layout = geometry.layout
    missing = [name for name in geometry.layers if name not in tensors]
    if missing:
        raise Unsupported(f"there are no tensors for layers {missing}")
    views = [tensors[name] for name in geometry.layers]
    first = views[0]
    if first.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"KV on {first.device} is not known")
    shape = (layout.kv_heads, layout.tokens, geometry.content)
    for view in views:
        if view.dim() != 4 or tuple(view.shape[1:]) != shape:
            raise Unsupported(
                f"KV is of shape {tuple(view.shape)}, not [blocks, {shape[0]}, {shape[1]}, {shape[2]}]"
            )
        if view.stride() != first.stride() or view.shape != first.shape:
            raise Unsupported("layers differ in shape")
        if view.device != first.device:
            raise Unsupported("layers are on different devices")
        if DTYPES.get(str(view.dtype)) != layout.dtype or view.stride(3) != 1:
            raise Unsupported(f"elements of {view.dtype} do not adjoin")
    return views


Writer = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes keys and values, each `[token, head, dim]`, into block 0 of a layer."""

# Of numbers by which places are told: bfloat16 is exact up to 256.
DIGITS = 128


def writers(
    geometry: Geometry, views: list[torch.Tensor], attention: Mapping[str, Any]
) -> list[Writer]:
    """What vLLM's own attention does, by layer. Block 0 belongs to nobody: vLLM pads its tables with
    it.
    """

    def writer(name: str, view: torch.Tensor) -> Writer:
        layer = attention.get(name)
        write = getattr(getattr(layer, "impl", None), "do_kv_cache_update", None)
        if write is None:
            raise Unsupported(f"there is no way to see how {name} writes KV")
        slots = torch.arange(view.shape[2], dtype=torch.int64, device=view.device)
        return lambda key, value: write(layer, key, value, view, slots)

    return [writer(name, view) for name, view in zip(geometry.layers, views, strict=True)]


@contextmanager
def _kept(views: list[torch.Tensor]) -> Iterator[None]:
    """Block 0 is behind this as it was before."""
    before = [view[0].clone() for view in views]
    try:
        yield
    finally:
        for view, values in zip(views, before, strict=True):
            view[0] = values


def arrangement(views: list[torch.Tensor], writers: list[Writer]) -> str:
    """Which element of a key or value is where in a block: a digest of a block that vLLM's own
    attention, by layer, has written known ones into.

    Engines on different hosts, which may differ in this and in nothing else, share KV where it is
    the same.
    """
    digest = hashlib.sha256()
    for view, write in zip(views, writers, strict=True):
        heads, tokens, content = view[0].shape
        key, value = (
            _known(plane, (tokens, heads, content // 2), view) for plane in (b"key", b"value")
        )
        with _kept([view]):
            view[0] = 0
            write(key, value)
            digest.update(_block(view))
    return digest.hexdigest()


def places(views: list[torch.Tensor], writers: list[Writer]) -> list[torch.Tensor]:
    """Of each layer, where in a block each element of `[key or value, head, token, dim]` is."""
    found: list[torch.Tensor] = []
    for view, write in zip(views, writers, strict=True):
        heads, tokens, content = view[0].shape
        count = heads * tokens * content
        numbers = torch.arange(count).view(2, heads, tokens, content // 2)
        # Which element is at each place; in digits that any type of elements holds exactly, and
        # none of which is 0, as what is not written.
        elements, weight = torch.zeros(count, dtype=torch.int64), 1
        with _kept([view]):
            while weight < count:
                digits = (numbers // weight % DIGITS + 1).to(view.dtype).to(view.device)
                view[0] = 0
                write(*(plane.transpose(0, 1).contiguous() for plane in digits))
                elements += (view[0].flatten().cpu().to(torch.int64) - 1) * weight
                weight *= DIGITS
        order = elements.argsort()
        if not torch.equal(elements[order], torch.arange(count)):
            raise Unsupported("vLLM does not keep each key and value in a place of its own")
        # Layers are alike, as a rule.
        if found and torch.equal(found[0], order):
            order = found[0]
        found.append(order)
    return found


def _known(name: bytes, shape: tuple[int, ...], view: torch.Tensor) -> torch.Tensor:
    """The same numbers everywhere."""
    bits = bytearray(hashlib.shake_256(name).digest(math.prod(shape) * view.element_size()))
    # Without the highest bit of the exponent, none is infinite, or not a number.
    for at in range(view.element_size() - 1, len(bits), view.element_size()):
        bits[at] &= 0b1011_1111
    return torch.frombuffer(bits, dtype=view.dtype).reshape(shape).to(view.device)


@dataclass(frozen=True)
class Form:
    """What a chunk has of a block."""

    # Beside the layout, tells it from other forms.
    name: str
    # Fills block 0 of all layers, and returns it as a chunk has it.
    fill: Callable[[], bytes]
    # By layer, where keys and values are; `None` where a chunk has the block as it is.
    places: list[torch.Tensor] | None = None
    # Whether it comes back as it was.
    is_exact: bool = True


def form(
    geometry: Geometry,
    views: list[torch.Tensor],
    attention: Mapping[str, Any],
    encoding: str | None,
) -> Form:
    """Blocks as they are, or keys and values in an encoding."""
    writing = writers(geometry, views, attention)
    if encoding is None:
        return Form(arrangement(views, writing), lambda: any_bits(views))
    is_exact = encoding in EXACT
    return Form(
        "keys and values" if is_exact else f"keys and values at {encoding}",
        lambda: _any_values(views, writing),
        places(views, writing),
        is_exact,
    )


# Levels at which chunks come back as they were.
EXACT = ("raw", "lossless")

# By how much a block may be off that does not: as the norm of the errors over that of its values.
# `l0` leaves .75 of normal numbers. A block of zeros is off by 1, another block by 1.4.
ERROR = 0.9


def canary(memory: Memory, views: list[torch.Tensor], form: Form) -> None:
    """Moves a block through the cache's own hands, and compares it in the engine's tensors."""
    with _kept(views):
        expected = form.fill()
        if memory.read(0) != expected:
            raise Unsupported("KV is not read as it is: its layout is another one")
        block = _blocks(views)
        any_bits(views)
        memory.write(0, expected)
        if _blocks(views) != block:
            raise Unsupported("KV is not written as it is: its layout is another one")


def round_trip(
    memory: Memory, cache: BlockCache, views: list[torch.Tensor], form: Form
) -> bool:
    """The same by way of the daemon. False where there is none."""
    name = b"canary" + os.urandom(16)
    with _kept(views):
        try:
            expected = form.fill()
            memory.save([name], [0], None).end()
            if not memory.flush(ROUND_TRIP_SECONDS) or cache.find([name]) == 0:
                return False
            any_bits(views)
            came = ended(memory.load([name], [0]))
            if came == 1 and not _is_same(memory.read(0), expected, views[0].dtype, form):
                raise Unsupported("KV does not come back as it was stored")
            return came == 1
        finally:
            cache.delete([name])


def _is_same(block: bytes, expected: bytes, dtype: torch.dtype, form: Form) -> bool:
    if form.is_exact:
        return block == expected
    came, was = (
        torch.frombuffer(bytearray(it), dtype=dtype).to(torch.float32) for it in (block, expected)
    )
    return bool((came - was).norm() <= ERROR * was.norm())


def any_bits(views: list[torch.Tensor]) -> bytes:
    """Also those that are no numbers."""
    for view in views:
        size = view[0].numel() * view.element_size()
        bits = torch.randint(0, 256, (size,), dtype=torch.uint8)
        view[0] = bits.view(view.dtype).view(view[0].shape).to(view.device)
    return _blocks(views)


def _any_values(views: list[torch.Tensor], writers: list[Writer]) -> bytes:
    """Written by vLLM itself, keys and values being known apart from that."""
    chunk = b""
    for view, write in zip(views, writers, strict=True):
        heads, tokens, content = view[0].shape
        planes = torch.randn(2, heads, tokens, content // 2).to(view.dtype)
        write(*(plane.transpose(0, 1).contiguous().to(view.device) for plane in planes))
        chunk += planes.view(torch.uint8).numpy().tobytes()
    return chunk


def _blocks(views: list[torch.Tensor]) -> bytes:
    """Block 0 as it is."""
    return b"".join(_block(view) for view in views)


def _block(view: torch.Tensor) -> bytes:
    return view[0].contiguous().cpu().view(torch.uint8).numpy().tobytes()


def namespace(
    config: "VllmConfig", geometry: Geometry, rank: int, arrangement: str
) -> Namespace:
    """What makes KV of this engine what it is, beside what is in the names of blocks: tokens,
    adapter and salt, by the hash that vLLM is told to use.
    """
    model, parallel = config.model_config, config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise Unsupported("tokens of a block are on several ranks")
    computed = _computed(config) | {
        # Each rank stores the heads, and the layers, that are its own.
        "tensor_parallel": [rank, parallel.tensor_parallel_size],
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "layers": list(geometry.layers),
        "arrangement": arrangement,
    }
    return Namespace(
        geometry.layout,
        architecture="vllm " + json.dumps(computed, sort_keys=True, default=str),
        weights=weights(model.model, model.revision),
    )


def _computed(config: "VllmConfig") -> dict[str, Any]:
    """How the model computes, beside its weights."""
    model, cache = config.model_config, config.cache_config
    return {
        "config": {
            name: value
            for name, value in model.hf_config.to_dict().items()
            if name not in INCIDENTAL
        },
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "quantization": model.quantization,
    }


def tier_namespace(
    spec: "OffloadingSpec",
    chunk_bytes: int,
    config: "VllmConfig | None",
    named: str | None,
) -> Namespace:
    """The same for a tier of vLLM's offloading, where a chunk holds whatever all workers of a
    replica wrote there: their number, the order of layers, the version of vLLM decide on it.

    vLLM tells its tiers the name of the model, and nothing else of what it computes. Where there
    is no `config`, whoever runs it has `named` that.
    """
    import vllm

    offloading = spec.config
    parallel = offloading.parallel
    stored: dict[str, Any] = {
        "vllm": vllm.__version__,
        "stored_dtype": offloading.model.dtype,
        "groups": [
            [it.group_id, it.tokens_per_block, list(it.layer_names)]
            for it in offloading.groups
        ],
        "hash_tokens": offloading.cache.tokens_per_hash,
        "chunk_blocks": offloading.cache.blocks_per_chunk,
        "worker_block_bytes": offloading.worker_kv_bytes_per_block,
        "workers": [
            parallel.world_size,
            parallel.tp_size,
            parallel.pp_size,
            parallel.pcp_size,
            parallel.dcp_size,
        ],
        "replicated": offloading.replicated_layout,
        "canonical": offloading.canonical_layout,
        "layout": offloading.kv_cache_layout,
    }
    if config is not None:
        if config.lora_config is not None:
            raise Unsupported("vLLM names adapters, and does not tell which ones have those names")
        if getattr(config.cache_config, "calculate_kv_scales", False):
            raise Unsupported("the scales of quantised KV differ from run to run")
        stored |= _computed(config) | {
            "attention": str(config.attention_config.backend),
            "model_runner": bool(config.use_v2_model_runner),
            "draft": _draft(config),
        }
        model, revision = config.model_config.model, config.model_config.revision
    elif named is not None:
        model, revision = offloading.model.name, None
    else:
        raise Unsupported(
            "vLLM does not tell its tiers what it computes: have it use the connector "
            'KvasirOffloadingConnector of kvasir.vllm.tier, or name all of it in "weights"'
        )
    return Namespace(
        Layout.opaque(chunk_bytes),
        architecture="vllm tier " + json.dumps(stored, sort_keys=True, default=str),
        weights=weights(model, revision),
        salt=(named or "").encode(),
    )


def _draft(config: "VllmConfig") -> list[str] | None:
    """Which model guesses tokens: its KV lies beside that of the other."""
    speculative = config.speculative_config
    if speculative is None:
        return None
    draft = speculative.draft_model_config
    return [str(speculative.method)] + (
        [weights(draft.model, draft.revision)] if draft is not None else []
    )
