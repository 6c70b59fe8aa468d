"""Which weights an engine runs: what its connectors name KV by."""

import functools
import hashlib
from pathlib import Path

# By how torch calls them.
DTYPES = {
    "torch.float32": "f32",
    "torch.float16": "f16",
    "torch.bfloat16": "bf16",
}

# Of each file of weights, this much of its beginning, middle and end is digested.
SAMPLE_BYTES = 1 << 16

# What a model's configuration says of where it was found.
INCIDENTAL = ("_name_or_path", "transformers_version")


class Unsupported(Exception):
    """The cache cannot be used with this model, or this version of the engine."""


def weights(model: str, revision: str | None) -> str:
    """Which weights: name and revision of those of a hub, or a digest of those in a directory.

    The digest is of names, sizes, and three samples of each file, so that it takes no time, and
    is the same wherever they lie.
    """
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}@{revision}"
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*config.json")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def adapter(path: str) -> bytes:
    """Which adapter a path is, or a name of a hub."""
    return hashlib.sha256(weights(path, None).encode()).digest()
