"""Hooks that an engine calls: a defect of ours turns the cache off, and not the engine down."""

import functools
import logging
from collections.abc import Callable
from typing import Any


def harmless(
    logger: logging.Logger, default: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of an object with `_disable`: what a hook that fails returns instead."""

    def guard(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def guarded(self: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return hook(self, *arguments, **named)
            except Exception as error:
                logger.exception("%s failed", hook.__name__)
                self._disable(error)
                return default

        return guarded

    return guard
