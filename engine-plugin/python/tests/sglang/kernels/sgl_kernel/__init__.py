"""Stands in for SGLang's kernels, of which no registry has a build for CPUs.

SGLang imports names from it and, on this CPU, calls none of them: it has plain torch for all
that a Llama needs.
"""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"there is no kernel {name} for a CPU")

    return missing
