"""Writes a Llama of random weights: `python random_llama.py DIRECTORY [large]`.

Small, it is for tests; `large`, of 124 M parameters in bf16, to measure with.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        # So that greedy answers are no matter of rounding.
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def large() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


torch.manual_seed(5)
model = large() if sys.argv[2:] == ["large"] else small()
model.save_pretrained(sys.argv[1])
