"""Speed of torch at prefill on this CPU: the yardstick of the engine.

Loads a Llama checkpoint with transformers in f32, runs one prompt with the
KV cache kept and logits for the last token only, as a server does, and
prints one JSON object as the last line of stdout:

    {"tokens_per_s": median, "all": [...], "attn": "sdpa", ...}

`attn` is the faster of the attention implementations tried; `by_attn` has
the speeds of each.

Usage: python prefill.py --model DIR [--tokens 512] [--threads 2] [--repeat 7]
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

WARM_UP = 2


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument(
        "--attn", nargs="+", default=["sdpa", "eager"], choices=["sdpa", "eager"]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompt")
    return parser.parse_args()


def seconds(model, prompt):
    """One prefill, cache allocation included."""
    start = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    elapsed = time.perf_counter() - start
    assert out.logits.shape[1] == 1
    assert out.past_key_values.get_seq_length() == prompt.shape[1]
    return elapsed


@torch.inference_mode()
def measure(args):
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=args.attn[0]
    ).eval()
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(
        3, model.config.vocab_size, (1, args.tokens), generator=generator
    )
    times = {attn: [] for attn in args.attn}
    # Alternating, so that a busy moment of the machine falls on all alike.
    for turn in range(-WARM_UP, args.repeat):
        for attn in args.attn:
            model.set_attn_implementation(attn)
            elapsed = seconds(model, prompt)
            if turn >= 0:
                times[attn].append(elapsed)
    return model, {
        attn: [round(args.tokens / elapsed, 1) for elapsed in values]
        for attn, values in times.items()
    }


def main():
    args = parse()
    disable_progress_bar()
    load_before = os.getloadavg()[0]
    model, speeds = measure(args)
    best = max(speeds, key=lambda attn: statistics.median(speeds[attn]))
    print(json.dumps(dict(
        tokens_per_s=statistics.median(speeds[best]),
        all=speeds[best],
        attn=best,
        by_attn=speeds,
        tokens=args.tokens,
        threads=torch.get_num_threads(),
        repeat=args.repeat,
        dtype="float32",
        parameters=model.num_parameters(),
        load_average=round(load_before, 2),
        torch=torch.__version__,
        transformers=transformers.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )))


if __name__ == "__main__":
    main()
