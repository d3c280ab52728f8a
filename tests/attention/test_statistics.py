"""Page statistics of a layer: kept up to date, and small."""

import pytest
import torch
from paged_layers import filled_layer

from unique_asr.attention import PagedCache, SparseAttentionConfig, SparsityCounters
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.attention.scores import SCORES


@pytest.mark.parametrize("score", SCORES)
def test_statistics_of_a_page_do_not_depend_on_how_it_was_written(score):
    config = SparseAttentionConfig(score=score)
    layer, _ = filled_layer(config, 96)
    layer.update_statistics()
    bulk = [statistic.clone() for statistic in layer.statistics]
    again = PagedLayer(config, SparsityCounters())
    for token in range(96):
        again.update(layer.keys[:, :, token : token + 1], layer.values[:, :, token : token + 1])
        again.update_statistics()
    for statistic, expected in zip(again.statistics, bulk):
        torch.testing.assert_close(statistic[:, :, :12], expected[:, :, :12], rtol=0, atol=0)


def test_a_cache_in_eight_bits_follows_its_rows():
    torch.manual_seed(0)
    layer = PagedLayer(SparseAttentionConfig(statistics_dtype="fp8", super_page_size=64), SparsityCounters())
    keys, values = torch.randn(2, 3, 2, 200, 16)
    layer.update(keys, values)
    layer.update_statistics()
    layer.reorder_cache(torch.tensor([2, 0]))
    other = PagedLayer(layer.config, SparsityCounters())
    other.update(keys[[2, 0]], values[[2, 0]])
    other.update_statistics()
    assert [level.ready for level in layer.levels] == [25, 3]
    for level, same in zip(layer.levels, other.levels):
        for statistic, expected in zip(level.statistics, same.statistics):
            assert torch.equal(statistic[:, :, : level.ready].float(), expected[:, :, : level.ready].float())


@pytest.mark.parametrize(("statistics_dtype", "share"), [("keys", 0.064), ("fp8", 0.033), ("int8", 0.033)])
def test_statistics_memory(statistics_dtype, share):
    """Of the KV cache, at pages of 8 tokens and head dim 128."""
    layer = PagedLayer(SparseAttentionConfig(statistics_dtype=statistics_dtype), SparsityCounters())
    layer.update(*torch.zeros(2, 1, 8, 1024, 128, dtype=torch.bfloat16))
    size = sum(statistic.nbytes for statistic in layer.statistics)
    assert size <= share * (layer.keys.nbytes + layer.values.nbytes)


def test_a_dense_layer_keeps_no_statistics(llama):
    cache = PagedCache(llama.config, SparseAttentionConfig(dense_layers=2))
    write(cache, 100)
    cache.update_statistics()
    assert [len(layer.statistics) for layer in cache.layers] == [0, 0, 2]
    assert [layer.sparse_at(600) for layer in cache.layers] == [False, False, True]


def write(cache, length, batch=2, layers=3):
    """Append the same random tokens to every layer; returns what `update` gave for the last."""
    keys, values = torch.randn(2, batch, 3, length, 16)
    for layer in range(layers):
        result = cache.update(keys, values, layer)
    return result
