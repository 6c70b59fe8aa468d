"""Writes a Llama of random weights: `python random_llama.py DIRECTORY`."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(5)
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
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
