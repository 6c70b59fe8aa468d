"""The tier under vLLM's own tiering manager: what it stores comes back, or is computed."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon
from offloading import CHUNK_BYTES, Scheduler, chain, content, workload
from vllm.v1.kv_offload.base import LookupResult

import kvasir
from kvasir.vllm import layout, tier
from kvasir.vllm.stats import COUNTERS


@pytest.fixture
def start() -> Iterator[Callable[..., Scheduler]]:
    """Starts what a vLLM has of it, which is shut down at the end."""
    running: list[Scheduler] = []

    def begin(*arguments: Any, **changes: Any) -> Scheduler:
        running.append(Scheduler(*arguments, **changes))
        return running[-1]

    yield begin
    for scheduler in running:
        scheduler.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the tier has logged."""
    logger = logging.getLogger("vllm.kvasir")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)

    def lines() -> list[str]:
        return [it.getMessage() for it in caplog.records if it.name == logger.name]

    return lines


def possible(prompts: list[list[bytes]]) -> int:
    return sum(len(keys) for keys in prompts)


def key_of(scheduler: Scheduler, name: bytes) -> bytes:
    """What the daemon calls a chunk."""
    names = layout.tier_namespace(scheduler.spec, CHUNK_BYTES, None, "random")
    return names.opaque_key(name)


def stats(scheduler: Scheduler) -> dict[str, float]:
    """As vLLM's log has them."""
    collected = scheduler.tier.get_stats()
    prefix = "vllm:kvasir_tier_"
    values = collected.reduce() if collected else {}
    return {name.removeprefix(prefix): value for name, value in values.items()}


def test_chunks_come_back_as_they_were_to_another_vllm(
    daemon: Daemon, start: Callable, said: Callable
) -> None:
    keys = chain(range(16 * 20))
    first = start(daemon.endpoint)
    assert said()[-1] == "the Kvasir tier is on: a chunk came back as it was stored"
    # The canary leaves nothing behind.
    assert not any(first.view.cast("B"))
    first.store(keys)
    first.settle()
    assert stats(first)["stored"] == 20 + 1
    second = start(daemon.endpoint)
    assert second.found(keys, second.request(keys)) == 20
    assert stats(second) == {"stored": 1, "blocks_loaded": 20}
    # Each chunk is another one, and the workload checks what it loads.
    assert content(keys[0]) != content(keys[1])


def test_a_second_pass_finds_what_is_possible_and_outlives_restarts(
    daemon: Daemon, start: Callable
) -> None:
    prompts = workload(1)
    # Not all of it stays in vLLM's own memory.
    scheduler = start(daemon.endpoint)
    assert possible(prompts) > 5 * scheduler.spec.num_chunks
    scheduler.run(prompts)
    assert scheduler.run(prompts) >= 0.95 * possible(prompts)
    scheduler.settle()
    scheduler.close()

    again = start(daemon.endpoint)
    assert again.run(prompts) >= 0.95 * possible(prompts)
    daemon.stop()
    daemon.start()
    until = time.monotonic() + 30
    while again.run(prompts) < 0.95 * possible(prompts):
        assert time.monotonic() < until, "it does not come back by itself"
