"""Kvasir as SGLang's storage behind HiCache.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvasir",
        "module_path": "kvasir.sglang", "class_name": "KvasirStorage", "interface_v1": 1}'
"""

from kvasir.sglang.storage import KvasirStorage

__all__ = ["KvasirStorage"]
