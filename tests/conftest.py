"""Fixtures that several folders share."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def llama():
    """A tiny random Llama with SmolLM2's heads: nine query heads over three KV heads; nothing ends its answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=90,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.4,  # large enough for answers that depend on the whole context
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
