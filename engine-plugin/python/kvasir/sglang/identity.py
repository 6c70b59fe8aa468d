"""What makes KV of this engine what it is, beside what is in SGLang's hashes of pages: tokens,
`cache_salt`, and which adapter.
"""

import json

from kvasir import Layout, Namespace
from kvasir._identity import INCIDENTAL, Unsupported, adapter, weights


def namespace(layout: Layout, pool: str) -> Namespace:
    """Of the pages of one of the engine's pools, whichever rank has them."""
    from sglang.srt.runtime_context import get_lora, get_model, get_spec, process_model_config

    model, flags, draft = process_model_config(), get_model(), get_spec()
    if flags.load_format == "dummy":
        raise Unsupported("the model has no weights")
    # A revision that is not named is whatever the hub had.
    revision = model.revision or getattr(model.hf_config, "_commit_hash", None)
    computed = {
        "config": {
            name: value
            for name, value in model.hf_config.to_dict().items()
            if name not in INCIDENTAL
        },
        "dtype": str(model.dtype),
        "kv_dtype": str(flags.kv_cache_dtype),
        "quantization": model.quantization,
        "version": loaded()[0],
        "pool": pool,
        # Adapters that are named at the start keep their names when their files change.
        "adapters": {
            it.lora_name: adapter(it.lora_path).hex() for it in get_lora().lora_paths or ()
        },
    }
    if draft.speculative_algorithm is not None:
        path = draft.speculative_draft_model_path
        computed["draft"] = [
            draft.speculative_algorithm,
            path and weights(path, draft.speculative_draft_model_revision),
        ]
    return Namespace(
        layout,
        architecture="sglang " + json.dumps(computed, sort_keys=True, default=str),
        weights=weights(flags.model_path, revision),
    )


def loaded() -> tuple[str, str]:
    """Version and place of the engine's weights: both change when it loads others."""
    from sglang.srt.runtime_context import get_model, get_serving

    return str(get_serving().weight_version), str(get_model().model_path)
