"""Kvasir as an L2 adapter of LMCache's daemon.

    lmcache server … --l2-adapter '{"type": "plugin", "module_path": "kvasir.lmcache",
        "class_name": "KvasirAdapter", "adapter_params": {"endpoint": "127.0.0.1:7420"}}'
"""

from kvasir.lmcache.adapter import KvasirAdapter

__all__ = ["KvasirAdapter"]
