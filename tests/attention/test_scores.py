"""Page scores: their bounds, and their statistics in 8 bits."""

import pytest
import torch
from paged_layers import DIM, GROUP, HEADS

from unique_asr.attention import reference
from unique_asr.attention.scores import SCORES


def test_quest_bounds_every_key_of_a_page():
    keys, query = torch.randn(1, HEADS, 64, DIM), torch.randn(1, HEADS, GROUP, DIM)
    score = SCORES["quest"]
    bound = score.scores(query, reference.page_statistics(keys, 8, score), 0.5)
    logits = torch.matmul(query, keys.transpose(-1, -2)).unflatten(-1, (8, 8))
    assert (logits.amax(-1) <= bound + 1e-5).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("statistics_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_hold_the_scores(score, statistics_dtype, dtype):
    """Within a few percent of their spread, half the memory, and zeros stay zeros."""
    torch.manual_seed(0)
    score = SCORES[score]
    pages, query = torch.randn(1, 2, 50, 8, 64, dtype=dtype), torch.randn(1, 2, 4, 64, dtype=dtype)
    pages[:, :, 7] = 0
    exact = score.statistics(pages)
    stored = score.encode(exact, statistics_dtype)
    assert [(each.shape[-1], each.dtype) for each in stored] == score.buffer_layout(64, dtype, statistics_dtype)
    scores, expected = score.scores(query, stored, 0.5), score.scores(query, exact, 0.5)
    assert (scores - expected).std() < 0.05 * expected.std()
    assert (scores[..., 7] == 0).all()
