"""Hooks that vLLM calls, and where what they have to say goes."""

import functools
import logging

from kvasir import _hooks

# Below the logger that vLLM configures.
logger = logging.getLogger("vllm.kvasir")

harmless = functools.partial(_hooks.harmless, logger)
