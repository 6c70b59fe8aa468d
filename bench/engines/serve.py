"""vLLM in a process of its own, which times what it answers: run by `compare.py`.

    python serve.py MODEL TRANSFER_JSON

Reads orders from standard input, one of JSON a line: `{"prompts": [[id, …], …], "tokens": N,
"alone": true}`. Answers with a line: `seconds` of each prompt where they were
answered one by one, of all where they were not; `cached`, tokens that were not computed; `cpu`,
seconds of processor time of this process; `outputs`.
"""

import json
import os
import sys
import time
from collections.abc import Mapping

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
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


def main(model: str, transfer: str) -> None:
    # What is said to the one who started this is kept apart from what vLLM prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=4,
        block_size=32,
        enable_prefix_caching=True,
        kv_transfer_config=json.loads(transfer),
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        sampling = SamplingParams(
            temperature=0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [TokensPrompt(prompt_token_ids=it) for it in order["prompts"]]
        seconds, outputs = [], []
        cpu = time.process_time()
        for batch in [[it] for it in prompts] if order["alone"] else [prompts]:
            begun = time.perf_counter()
            outputs += llm.generate(batch, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - begun)
        answer = {
            "seconds": seconds,
            "cached": [it.num_cached_tokens for it in outputs],
            "cpu": time.process_time() - cpu,
            "outputs": [list(it.outputs[0].token_ids) for it in outputs],
        }
        print(json.dumps(answer), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()
    # vLLM leaves threads behind that do not end.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
