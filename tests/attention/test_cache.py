"""The paged cache against transformers' own, through every operation that generation uses."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config
from transformers.cache_utils import DynamicSlidingWindowLayer

from unique_asr.attention import PagedCache, SparseAttentionConfig, sparse_attention
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.decoding.greedy import GreedyDecoder


def write(cache, length, batch=2, layers=3):
    """Append the same random tokens to every layer; returns what `update` gave for the last."""
    keys, values = torch.randn(2, batch, 3, length, 16)
    for layer in range(layers):
        result = cache.update(keys, values, layer)
    return result


@pytest.fixture
def caches(llama):
    """A paged and a dynamic cache with the same 300 tokens, and the statistics of the paged one up to date."""
    paged, dynamic = PagedCache(llama.config, SparseAttentionConfig(budget=64)), DynamicCache(config=llama.config)
    for cache in (paged, dynamic):
        torch.manual_seed(1)
        write(cache, 300)
    paged.update_statistics()
    return paged, dynamic


def assert_same(paged, dynamic):
    """Both hold the same tokens, and the statistics are those of a cache into which they were written at once."""
    layer, other = paged.layers[1], dynamic.layers[1]
    length = other.get_seq_length()
    assert paged.get_seq_length() == length == layer.length
    assert torch.equal(layer.keys[:, :, :length], other.keys)
    assert torch.equal(layer.values[:, :, :length], other.values)
    fresh = PagedLayer(layer.config, paged.counters)
    fresh.update(other.keys, other.values)
    fresh.update_statistics()
    layer.update_statistics()
    assert layer.pages_ready == fresh.pages_ready == length // 8
    for statistic, expected in zip(layer.statistics, fresh.statistics):
        assert torch.equal(statistic[:, :, : layer.pages_ready], expected[:, :, : layer.pages_ready])


def test_tokens_are_returned_as_written_and_buffers_grow_in_big_steps(llama):
    paged, dynamic = PagedCache(llama.config), DynamicCache(config=llama.config)
    capacities = set()
    for length in (7, 1, 1, 2000, *[1] * 20, 1500):
        for cache in (paged, dynamic):
            torch.manual_seed(length)
            keys, values = write(cache, length)
            if cache is paged:
                written = keys, values
        assert torch.equal(written[0], keys)
        assert torch.equal(written[1], values)
        capacities.add(paged.capacity)
    assert len(capacities) == 3
    assert_same(paged, dynamic)


def test_capacity_can_be_asked_for(llama):
    cache = PagedCache(llama.config, capacity=5000)
    write(cache, 10)
    assert 5000 <= cache.capacity < 5256
    cache.reserve(6000)
    assert cache.capacity >= 6000
    assert cache.length == 10


def test_crop_and_write_again(caches):
    for cache in caches:
        cache.crop(-41)
        torch.manual_seed(2)
        write(cache, 30)
        cache.crop(0)
    assert_same(*caches)


def test_crop_by_a_positive_number_is_refused(caches):
    with pytest.raises(ValueError, match="negative"):
        caches[0].crop(10)


def test_reset_keeps_the_buffers(caches, llama):
    paged, _ = caches
    address = paged.layers[0].keys.data_ptr()
    paged.reset()
    dynamic = DynamicCache(config=llama.config)
    for cache in (paged, dynamic):
        torch.manual_seed(3)
        write(cache, 50)
    assert paged.layers[0].keys.data_ptr() == address
    assert_same(paged, dynamic)


@pytest.mark.parametrize(
    ("operation", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 3),
        ("batch_select_indices", torch.tensor([1])),
    ],
)
def test_rows_follow_the_beams(caches, operation, argument):
    for cache in caches:
        getattr(cache, operation)(argument)
    assert_same(*caches)


def test_sliding_layers_stay_what_they_were():
    config = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    cache = PagedCache(config)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [PagedLayer] * 2 + [DynamicSlidingWindowLayer] * 2
    with pytest.raises(ValueError, match="every layer"), cache.static_step(torch.tensor([0]), sparse=False):
        pass


@pytest.mark.parametrize("window", [512, 600, 300])
def test_a_window_as_long_as_the_longest_text_is_full_attention(window):
    """As that of Phi-4 multimodal; 300 of 512 tokens are a real window."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(
        vocab_size=50, num_hidden_layers=2, max_position_embeddings=512, sliding_window=window, **sizes
    )
    model, prompt = MistralForCausalLM(config).eval(), torch.randint(0, 50, (1, 100))
    if window == 300:
        with pytest.raises(ValueError, match="no full-attention layer"):
            PagedCache(config)
        return
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with sparse_attention(model, budget=512):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    with sparse_attention(model, budget=64) as sparse:
        model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert sparse.counters.sparse_steps == sparse.counters.steps == 4
    decoders = [GreedyDecoder(model, SparseAttentionConfig(budget=512), static=static) for static in (False, True)]
    for decoder in decoders:
        decoder.prefill(model.get_input_embeddings()(prompt).detach())
        assert list(decoder.tokens(5)) == expected[0, 100:].tolist()


def test_a_model_of_sliding_layers_alone_is_refused():
    with pytest.raises(ValueError, match="no full-attention layer"):
        PagedCache(MistralConfig(num_hidden_layers=2, sliding_window=8))
