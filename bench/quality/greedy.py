"""Greedy answers of a checkpoint by Hugging Face transformers, in f32."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

LIMIT = 9


def load(directory):
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def greedy(model, prompt, end):
    """Tokens up to and with `end`, `LIMIT` at most, and the logits of each step."""
    tokens, steps, cache, ids = [], [], None, torch.tensor([prompt])
    while len(tokens) < LIMIT and (not tokens or tokens[-1] != end):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[0, -1]
        tokens.append(int(logits.argmax()))
        steps.append(logits)
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(steps)


def margin(steps):
    """Least distance of the two best logits."""
    best = steps.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())
