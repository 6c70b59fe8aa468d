"""What engines call never raises."""

import logging
from typing import Any

from kvasir._hooks import harmless


class Hooks:
    def __init__(self) -> None:
        self.why: Exception | None = None

    def _disable(self, why: Exception) -> None:
        self.why = why

    @harmless(logging.getLogger("test"), default="nothing")
    def hook(self, argument: int, **named: Any) -> str:
        return f"{10 // argument} {named}"


def test_a_hook_that_fails_says_why_and_returns_its_default() -> None:
    hooks = Hooks()
    assert hooks.hook(5, layer=1) == "2 {'layer': 1}" and hooks.why is None
    assert hooks.hook(argument=0, layer=1) == "nothing"
    assert isinstance(hooks.why, ZeroDivisionError)
