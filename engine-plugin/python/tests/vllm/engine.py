"""vLLM in a process of its own, told what to do by lines of JSON.

Run by the tests as `python engine.py MODEL ENDPOINT OPTIONS`, with the interpreter that has
vLLM. An empty endpoint is none; options are JSON, for vLLM.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402


def transfer(endpoint: str) -> dict[str, object]:
    return {
        "kv_connector": "KvasirConnector",
        "kv_connector_module_path": "kvasir.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "endpoint": endpoint,
            "load_timeout": 1.0,
            "cooldown": 0.5,
        },
    }


def main(model: str, endpoint: str, options: dict[str, object]) -> None:
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
        enable_prefix_caching=True,
        kv_transfer_config=transfer(endpoint) if endpoint else None,
        **options,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("reset"):
            # What vLLM itself has cached; the connector's is not touched.
            assert llm.reset_prefix_cache()
        prompts = [TokensPrompt(prompt_token_ids=it) for it in order["prompts"]]
        sampling = SamplingParams(
            temperature=0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False
        )
        begun = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answer = {
            "outputs": [list(it.outputs[0].token_ids) for it in outputs],
            "cached": [it.num_cached_tokens for it in outputs],
            "seconds": time.monotonic() - begun,
        }
        print(json.dumps(answer), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()
    # vLLM leaves threads behind that do not end.
    os._exit(0)


if __name__ == "__main__":
    model, endpoint, options = sys.argv[1:]
    main(model, endpoint, json.loads(options))
