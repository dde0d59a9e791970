"""Tiny models and token batches that the tests of retention share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 50
TOKENS = torch.arange(8 * 12).view(8, 12) * 7 % VOCABULARY
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]
HELD_OUT = [{"input_ids": TOKENS[:3].flip(1), "labels": TOKENS[:3].flip(1)}]


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            **settings,
        )
    )
