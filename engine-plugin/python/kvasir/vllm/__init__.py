"""Kvasir as vLLM's external KV cache.

    --kv-transfer-config '{"kv_connector": "KvasirConnector",
        "kv_connector_module_path": "kvasir.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute"}'
"""

from kvasir.vllm.connector import KvasirConnector

__all__ = ["KvasirConnector"]
