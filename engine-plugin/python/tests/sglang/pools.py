"""SGLang's own pools, and its factory's storage backends over them."""

import os
from typing import Any

import on_cpu  # noqa: F401, before SGLang
import torch
from sglang.srt import runtime_context
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.server_args import ServerArgs

# Pools are small, and so may the machine be.
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0

MODEL = os.environ["KVASIR_TEST_MODEL"]
LAYERS, HEADS, DIM, PAGE, PAGES = 3, 4, 8, 16, 24
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
LATENT_LAYOUTS = LAYOUTS[:3]


def configure(model: str = MODEL, **flags: Any) -> None:
    """What an engine that is started with this knows of itself."""
    arguments = ServerArgs(model_path=model, device="cpu", page_size=PAGE, **flags)
    runtime_context.get_context().set_server_args(arguments)


def pool(
    layout: str,
    heads: int = HEADS,
    latent: bool = False,
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    page: int = PAGE,
) -> Any:
    """A host pool of random bits."""
    shared = {
        "size": PAGES * page,
        "page_size": page,
        "dtype": dtype,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if latent:
        device = MLATokenToKVPool(kv_lora_rank=2 * DIM, qk_rope_head_dim=DIM, **shared)
        kind, more = MLATokenToKVPoolHost, {"target_layer_num": LAYERS}
    else:
        device = MHATokenToKVPool(head_num=heads, head_dim=DIM, **shared)
        kind, more = MHATokenToKVPoolHost, {}
    host = kind(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        page,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=device.start_layer,
        end_layer=device.end_layer,
        **more,
    )
    bits = torch.Generator().manual_seed(seed)
    raw = host.kv_buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=bits))
    return host


def storage(
    endpoint: str,
    host: Any,
    tp_rank: int = 0,
    tp_size: int = 1,
    tp_lcm_size: int | None = None,
    name: str = "kvasir",
    **options: Any,
) -> HiCacheStorage:
    """As SGLang's controller attaches one."""
    limits = {"lookup_timeout": 1.0, "load_timeout": 5.0, "store_timeout": 5.0}
    config = HiCacheStorageConfig(
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=isinstance(host, MLATokenToKVPoolHost),
        enable_storage_metrics=True,
        is_page_first_layout=host.layout == "page_first",
        model_name="a",
        tp_lcm_size=tp_lcm_size,
        extra_config={
            "backend_name": name,
            "module_path": "kvasir.sglang",
            "class_name": "KvasirStorage",
            "interface_v1": 1,
            "endpoint": endpoint,
        }
        | limits
        | options,
    )
    backend = StorageBackendFactory.create_backend("dynamic", config, host)
    backend.register_mem_pool_host(host)
    backend.register_mem_host_pool_v2(host, "kv")
    backend.on_host_pools_registered()
    return backend


def keys(count: int, first: int = 0) -> list[str]:
    return [f"{index:064x}" for index in range(first, first + count)]


def tokens(pages: list[int], page: int = PAGE) -> torch.Tensor:
    """The tokens of pages, as SGLang names places in a pool."""
    return (torch.tensor(pages)[:, None] * page + torch.arange(page)).flatten()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def content(host: Any, page: int) -> list[bytes]:
    """Keys and values of a page, by layer, token by token, as SGLang's kernels address them."""
    if isinstance(host, MLATokenToKVPoolHost):
        refs = host.data_refs
        if host.layout == "page_first_direct":
            # SGLang has no views of layers for these two.
            refs = [host.kv_buffer[:, layer] for layer in range(LAYERS)]
    elif host.layout == "page_head":
        refs = [
            plane[:, :, :, layer].transpose(1, 2)
            for plane in host.kv_buffer
            for layer in range(LAYERS)
        ]
    else:
        refs = host.k_data_refs + host.v_data_refs
    size = host.page_size
    return [
        bits(it[page] if it.shape[0] == host.page_num else it[page * size : (page + 1) * size])
        for it in refs
    ]
