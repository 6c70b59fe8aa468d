"""KV of a made-up model, and how far off it may be when it comes back."""

import json
import os
import subprocess
from pathlib import Path

import numpy
from numpy.typing import NDArray

from kvasir import Layout

BIN = Path(os.environ.get("KVASIRD", "kvasird")).parent

LAYERS, HEADS, DIM = 3, 2, 32
EXACT = ["raw", "lossless"]
NESTED = ["l0", "l1", "l2"]
LEVELS = [*EXACT, "int8", "int4", "cachegen", *NESTED]

# Of keys and of values, in deviations.
STEPS = numpy.array([1.35, 4.5])
EXACT_TOKENS = 4

Values = NDArray[numpy.float16]


def layout(tokens: int) -> Layout:
    return Layout(layers=LAYERS, kv_heads=HEADS, head_dim=DIM, tokens=tokens, dtype="f16")


def values(seed: int, tokens: int) -> Values:
    """`[layer, plane, head, token, dim]`: channels have means, and much in common."""
    model, rng = numpy.random.default_rng(1), numpy.random.default_rng(seed)
    mixing = model.standard_normal((LAYERS, 2, HEADS, 6, DIM))
    means = model.standard_normal((LAYERS, 2, HEADS, 1, DIM))
    sources = rng.standard_normal((LAYERS, 2, HEADS, tokens, 6))
    return (means + sources @ mixing).astype(numpy.float16)


def of(chunk: bytes, tokens: int) -> Values:
    shape = (LAYERS, 2, HEADS, tokens, DIM)
    return numpy.frombuffer(chunk, dtype=numpy.float16).reshape(shape)


def rounding(before: Values) -> NDArray[numpy.float32]:
    """What it costs to be of 16 bits."""
    return numpy.abs(before.astype(numpy.float32)) / 1024 + 1e-6


def check(level: str, before: Values, after: Values, first: bool, by: int = 1) -> None:
    """Whether values are as exact as the level says; `by` is how many of them share a step."""
    wide, errors = before.astype(numpy.float32), before.astype(numpy.float32) - after
    if level in EXACT:
        assert before.tobytes() == after.tobytes()
        return
    assert errors.any()
    if level == "int8":
        scales = numpy.abs(wide).max(axis=-1, keepdims=True) / 127
        assert (numpy.abs(errors) <= scales * 0.51 + rounding(before)).all()
    elif level == "int4":
        lengths = [numpy.linalg.norm(it, axis=-1) for it in (errors, wide)]
        assert (lengths[0] <= lengths[1] * DIM**0.5 / 14 * 1.02).all()
    elif level == "cachegen":
        assert numpy.square(errors).mean() < 0.3 * wide.var()
    else:
        assert errors[:, :, :, :EXACT_TOKENS].any() != first
        exact = EXACT_TOKENS if first else 0
        counted = wide[:, :, :, exact:]
        deviations = numpy.sqrt(counted.var(axis=3).mean(axis=(2, 3)))
        steps = deviations * STEPS / 3 ** NESTED.index(level)
        bound = steps[:, :, None, None, None] * 0.51 * by**0.5 + rounding(before)
        assert (numpy.abs(errors) <= bound).all()


def command(name: str, endpoint: str, *arguments: str) -> str:
    """Of the programs that are built beside the daemon."""
    called = [BIN / name, "--endpoint", endpoint, "--json", *arguments]
    return subprocess.run(called, check=True, capture_output=True, text=True).stdout


def stored(endpoint: str) -> dict[bytes, int]:
    """Bytes of each chunk that a daemon has."""
    listed = json.loads(command("kvasir", endpoint, "ls"))
    return {bytes.fromhex(it["key"]): it["bytes"] for it in listed["chunks"]}
