"""What vLLM's KV is, and where it is: taken from its own tensors and configuration.

Nothing is guessed. What is not known here raises `Unsupported`, and the cache stays out of
the way.
"""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvasir import BlockCache, Layout, Namespace
from kvasir._identity import DTYPES, INCIDENTAL, Unsupported, weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadingSpec

# How long a daemon may take for a block when the engine starts.
ROUND_TRIP_SECONDS = 1.0


@dataclass(frozen=True)
class Geometry:
    """Of one worker's KV."""

    layers: tuple[str, ...]
    layout: Layout
    head_dim: int


def geometry(config: "KVCacheConfig") -> Geometry:
    """Of the one group of layers that all attend to everything."""
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
    layers = tuple(groups[0].layer_names)
    layout = Layout(
        layers=len(layers),
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        tokens=spec.block_size,
        dtype=dtype,
    )
    return Geometry(layers, layout, spec.head_size)


def register(
    cache: BlockCache, geometry: Geometry, tensors: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Tells the cache where KV is, if it is where it is said to be; returns the layers."""
    layout, dim = geometry.layout, geometry.head_dim
    missing = [name for name in geometry.layers if name not in tensors]
    if missing:
        raise Unsupported(f"there are no tensors for layers {missing}")
    views = [tensors[name] for name in geometry.layers]
    first = views[0]
    shape = (layout.kv_heads, layout.tokens, 2 * dim)
    for view in views:
        if view.device.type != "cpu":
            raise Unsupported(f"KV on {view.device} is not known")
        if view.dim() != 4 or tuple(view.shape[1:]) != shape:
            raise Unsupported(
                f"KV is of shape {tuple(view.shape)}, not [blocks, {shape[0]}, {shape[1]}, {shape[2]}]"
            )
        if view.stride() != first.stride() or view.shape != first.shape:
            raise Unsupported("layers differ in shape")
        if DTYPES.get(str(view.dtype)) != layout.dtype or view.stride(3) != 1:
            raise Unsupported(f"elements of {view.dtype} do not adjoin")
    size, blocks = first.element_size(), first.shape[0]
    starts = {view.storage_offset() * size for view in views}
    buffers = [_bytes(view, 0 if len(starts) > 1 else None) for view in views]
    cache.register(
        buffers,
        blocks=blocks,
        block=first.stride(0) * size,
        plane=dim * size,
        head=first.stride(1) * size,
        token=first.stride(2) * size,
        start=starts.pop() if len(starts) == 1 else 0,
    )
    canary(cache, geometry, views)
    return views


def _bytes(view: torch.Tensor, offset: int | None):
    """The memory of a tensor, from its beginning on or from that of its storage."""
    storage = view.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)
    if offset is None:
        return raw.numpy()
    return raw[view.storage_offset() * view.element_size() :].numpy()


def canary(cache: BlockCache, geometry: Geometry, views: list[torch.Tensor]) -> None:
    """Moves a block through the cache's own hands, and compares it in the engine's tensors.

    Block 0 belongs to nobody: vLLM pads its tables with it.
    """
    before = [view[0].clone() for view in views]
    try:
        _fill(views)
        if cache.read(0) != _chunk(geometry, views):
            raise Unsupported("KV is not read as it is: its layout is another one")
        expected = _chunk(geometry, views)
        _fill(views)
        cache.write(0, expected)
        if _chunk(geometry, views) != expected:
            raise Unsupported("KV is not written as it is: its layout is another one")
    finally:
        for view, values in zip(views, before, strict=True):
            view[0] = values


def round_trip(cache: BlockCache, geometry: Geometry, views: list[torch.Tensor]) -> bool:
    """The same by way of the daemon. False where there is none."""
    before = [view[0].clone() for view in views]
    name = b"canary" + os.urandom(16)
    try:
        _fill(views)
        expected = _chunk(geometry, views)
        cache.store([name], [0])
        if not cache.flush(ROUND_TRIP_SECONDS) or cache.find([name]) == 0:
            return False
        _fill(views)
        load = cache.load([name], [0])
        while (came := load.wait(ROUND_TRIP_SECONDS)) is None:
            # The block is the load's until it has ended, which its own deadlines see to.
            pass
        if came == 1 and _chunk(geometry, views) != expected:
            raise Unsupported("KV does not come back as it was stored")
        return came == 1
    finally:
        cache.delete([name])
        for view, values in zip(views, before, strict=True):
            view[0] = values


def _fill(views: list[torch.Tensor]) -> None:
    """Any bits in block 0, also those that are no numbers."""
    for view in views:
        size = view[0].numel() * view.element_size()
        bits = torch.randint(0, 256, (size,), dtype=torch.uint8)
        view[0] = bits.view(view.dtype).view(view[0].shape)


def _chunk(geometry: Geometry, views: list[torch.Tensor]) -> bytes:
    """Block 0 as the cache should see it: `[layer, plane, head, token, dim]`."""
    layers = []
    for view in views:
        keys, values = view[0].split(geometry.head_dim, dim=-1)
        planes = torch.stack([keys, values]).contiguous()
        layers.append(planes.view(torch.uint8).numpy().tobytes())
    return b"".join(layers)


def namespace(config: "VllmConfig", geometry: Geometry, rank: int) -> Namespace:
    """What makes KV of this engine what it is, beside what is in the names of blocks: tokens,
    adapter and salt, by the hash that vLLM is told to use.
    """
    model, parallel = config.model_config, config.parallel_config
    computed = _computed(config) | {
        # Each rank stores the heads, and the layers, that are its own.
        "tensor_parallel": [rank, parallel.tensor_parallel_size],
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "layers": list(geometry.layers),
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
