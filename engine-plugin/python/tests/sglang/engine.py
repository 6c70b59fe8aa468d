"""SGLang in a process of its own, told what to do by lines of JSON.

Run by `test_sglang.py` as `python engine.py MODEL LAYOUT [ENDPOINT]`, with the interpreter that
has SGLang.
"""

import json
import os
import sys
import time

import on_cpu  # noqa: F401, before SGLang
import sglang

PAGE = 32


def cache(layout: str, endpoint: str) -> dict[str, object]:
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_mem_layout": layout,
        "hicache_io_backend": "direct",
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(
            {
                "backend_name": "kvasir",
                "module_path": "kvasir.sglang",
                "class_name": "KvasirStorage",
                "interface_v1": 1,
                "prefetch_threshold": PAGE,
                "endpoint": endpoint,
                "lookup_timeout": 0.5,
                "load_timeout": 1.0,
                "store_timeout": 1.0,
                "cooldown": 0.5,
            }
        ),
    }


def main(model: str, layout: str, endpoint: str | None) -> None:
    # What is said to the one who started this is kept apart from what SGLang prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        device="cpu",
        attention_backend="torch_native",
        # Sums in another order change no answer.
        dtype="float32",
        context_length=2048,
        max_total_tokens=16384,
        max_running_requests=4,
        page_size=PAGE,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        mem_fraction_static=0.2,
        random_seed=1,
        log_level="info",
        **(cache(layout, endpoint) if endpoint else {}),
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("reset"):
            # What SGLang has on the device and the host; the daemon is not touched.
            engine.flush_cache()
        sampling = {"temperature": 0, "max_new_tokens": order["tokens"], "ignore_eos": True}
        begun = time.monotonic()
        outputs = [
            engine.generate(input_ids=prompt, sampling_params=sampling)
            for prompt in order["prompts"]
        ]
        answer = {
            "outputs": [it["output_ids"] for it in outputs],
            "cached": [it["meta_info"]["cached_tokens"] for it in outputs],
            "seconds": time.monotonic() - begun,
            "latencies": [it["meta_info"]["e2e_latency"] for it in outputs],
        }
        print(json.dumps(answer), file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
