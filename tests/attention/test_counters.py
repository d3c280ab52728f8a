"""What the counters count."""

import pytest
import torch

from unique_asr.attention import PagedCache, SparseAttentionConfig


def test_counters(llama):
    cache = PagedCache(llama.config, SparseAttentionConfig(budget=64))
    llama.set_attn_implementation("unique")
    tokens = torch.randint(0, 97, (2, 60))
    llama(tokens, past_key_values=cache)
    for _ in range(10):
        llama(tokens[:, :1], past_key_values=cache)
    counters = cache.counters
    assert (counters.steps, counters.sparse_steps) == (10, 6)  # lengths 61 to 64 fit the budget
    rows = 3 * 2 * 3  # layers, batch, KV heads
    assert counters.pages_total == rows * (4 * 8 + 6 * 9)
    assert counters.pages_read == rows * 10 * 8
    key_bytes, statistics_bytes = 2 * 16 * 4, (16 + 1) * 4
    read = sum(key_bytes * (n - 8) + statistics_bytes * 8 for n in range(65, 71)) + sum(range(61, 65)) * key_bytes
    assert counters.bytes_read == rows * read
    assert counters.bytes_dense == rows * key_bytes * sum(range(61, 71))
    assert 0 < counters.share_of_pages_read < 1
    assert str(counters).startswith("6 of 10 steps sparse")
    assert counters.to_dict()["share_of_pages_read"] == pytest.approx(counters.share_of_pages_read, abs=1e-6)
