"""vLLM in a process of its own, told what to do by lines of JSON.

Run by the tests as `python engine.py MODEL [PORT]`, with the interpreter that has vLLM and LMCache:
the port of an `lmcache server`, if there is to be one.
"""

import json
import os
import sys
from collections.abc import Mapping

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402
from vllm.triton_utils import dispatcher  # noqa: E402


def dictionary(value: object) -> Mapping[str, object]:
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


# vLLM 0.32 does not start beside llvmlite, which LMCache imports and whose library claims to have
# every attribute: what `vars` finds there is no dictionary.
dispatcher.vars = dictionary


def transfer(port: str) -> dict[str, object]:
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmcache.mp.port": int(port)},
    }


def main(model: str, port: str | None = None) -> None:
    # What is said to the one who started this is kept apart from what vLLM prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        # Sums in another order change no answer.
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=8,
        block_size=32,
        # All that is not computed comes from LMCache.
        enable_prefix_caching=False,
        kv_transfer_config=transfer(port) if port else None,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        prompts = [TokensPrompt(prompt_token_ids=it) for it in order["prompts"]]
        sampling = SamplingParams(
            temperature=0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False
        )
        outputs = []
        for batch in [[it] for it in prompts] if order["alone"] else [prompts]:
            outputs += llm.generate(batch, sampling, use_tqdm=False)
        answer = {
            "outputs": [list(it.outputs[0].token_ids) for it in outputs],
            "cached": [it.num_cached_tokens for it in outputs],
        }
        print(json.dumps(answer), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()
    # vLLM leaves threads behind that do not end.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
