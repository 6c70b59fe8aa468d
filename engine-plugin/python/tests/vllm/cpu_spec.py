"""vLLM's tiering on a CPU: its own spec, but for the worker, which copies from tensor to tensor
where vLLM's needs a device. vLLM takes it by `spec_module_path`.
"""

from collections.abc import Iterator

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1 and len(kv_caches.group_data_refs) == 1
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CpuWorker(kv_caches, region)


class CpuWorker(OffloadingWorker):
    """Jobs end where they begin."""

    def __init__(
        self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion
    ) -> None:
        self._region = region
        self._blocks = [it.tensor for it in kv_caches.tensors]
        self._chunks = [
            region.create_next_worker_view(it.page_size_bytes)
            for it in kv_caches.tensors
        ]
        self._ended: list[TransferResult] = []

    def _pairs(
        self, blocks: LoadStoreSpec, chunks: LoadStoreSpec
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        assert isinstance(blocks, GPULoadStoreSpec)
        assert isinstance(chunks, CPULoadStoreSpec)
        for block, chunk in zip(blocks.block_ids, chunks.chunk_ids, strict=True):
            for theirs, ours in zip(self._blocks, self._chunks, strict=True):
                yield theirs[int(block)], ours[int(chunk)]

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        for block, chunk in self._pairs(src_spec, dst_spec):
            chunk.copy_(block.view(torch.int8).view(-1))
        self._ended.append(TransferResult(job_id, success=True))
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        for block, chunk in self._pairs(dst_spec, src_spec):
            block.view(torch.int8).view(-1).copy_(chunk)
        self._ended.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """They have all ended."""

    def shutdown(self) -> None:
        self._chunks.clear()
        self._region.cleanup()
