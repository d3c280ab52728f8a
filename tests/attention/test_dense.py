"""Dense attention over a chunked prefill."""

import pytest
import torch

from unique_asr.attention import (
    dense,
    huggingface,
    sparse_attention,
)


@pytest.fixture
def batch():
    """Three prompts of different lengths, padded on the left."""
    torch.manual_seed(0)
    lengths = torch.tensor([150, 61, 118])
    mask = (torch.arange(150) >= 150 - lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 97, (3, 150)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_a_chunked_prefill_equals_a_whole_one(llama, batch, rows, flash, monkeypatch):
    """When the causal mask of a chunk has to be built in slices, and row by row as FlashAttention reads them.

    On a CPU a mask stands for FlashAttention's own alignment; tests/gpu/test_decoding_gpu.py runs the kernel.
    """
    inputs = {name: value[rows] for name, value in batch.items()}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    sparse = sparse_attention(llama, budget=64)
    whole, chunked = sparse.make_cache(), sparse.make_cache()
    expected = llama(**inputs, position_ids=positions, past_key_values=whole, logits_to_keep=1).logits
    monkeypatch.setattr(dense, "MASK_ELEMENTS", 1000)
    monkeypatch.setattr(dense, "BATCHED_TOKENS", 70)  # of three chunks the last two go row by row
    monkeypatch.setattr(dense, "supports_flash", lambda *tensors: flash)
    for start in range(0, 150, 64):
        part = slice(start, start + 64)
        output = llama(
            inputs["input_ids"][:, part],
            attention_mask=inputs["attention_mask"][:, : start + 64],
            position_ids=positions[:, part],
            past_key_values=chunked,
            logits_to_keep=1,
        ).logits
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert chunked.layers[2].pages_ready == whole.layers[2].pages_ready == 18


def test_no_mask_of_the_whole_prefill_is_built():
    mask = torch.ones(2, 5000, dtype=torch.bool)
    assert huggingface.make_padding_mask(2, 5000, 5000, attention_mask=mask) is None
    mask[0, :10] = False
    assert huggingface.make_padding_mask(2, 5000, 5000, attention_mask=mask).shape == (2, 1, 1, 5000)
