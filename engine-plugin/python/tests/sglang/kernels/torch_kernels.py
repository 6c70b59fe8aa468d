"""A plugin for SGLang, which loads it in each of its processes: what HiCache does with CUDA, in
torch.

SGLang has these kernels for devices only, and pins host memory with the CUDA runtime. Here the
device is the CPU. They copy between pages of the device pool, `[token, head, dim]` by layer, and
those of the host pool.
"""

import torch

Tensors = list[torch.Tensor]


def transfer_kv_direct(
    *,
    src_layers: Tensors,
    dst_layers: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Both pools have their layers apart."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_all_layer_direct_lf_pf(
    *,
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """All layers into a host pool `[page, layer, token, head, dim]`."""
    layers = len(src_ptrs) // len(dst_ptrs)
    for index, source in enumerate(src_ptrs):
        host = dst_ptrs[index // layers]
        pages, tokens = dst_indices // page_size, dst_indices % page_size
        host[pages, index % layers, tokens] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    *,
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """A layer out of such a pool."""
    for host, target in zip(src_ptrs, dst_ptrs, strict=True):
        pages, tokens = src_indices // page_size, src_indices % page_size
        target[dst_indices] = host[pages, layer_id, tokens]


def install() -> None:
    from sglang.srt.mem_cache.pool_host import base, common, mha

    for kernel in (
        transfer_kv_direct,
        transfer_kv_all_layer_direct_lf_pf,
        transfer_kv_per_layer_direct_pf_lf,
    ):
        setattr(mha, kernel.__name__, kernel)
    common._cuda_host_register = lambda *_: None
    # Pools of tests are small, and so may the machine be.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
