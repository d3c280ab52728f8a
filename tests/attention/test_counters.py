"""What the counters count."""

import copy

import pytest
import torch

from unique_asr.attention import PagedCache, SparseAttentionConfig, SparsityCounters, sparse_attention
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.counters import StepCounting
from unique_asr.attention.huggingface import unique_attention_forward


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


PROMPT = torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(0))


def read(model, tokens, cache):
    return model(tokens, **{CACHE_ARGUMENT: cache}).logits


@pytest.mark.parametrize("lookup", [4, 10])
def test_a_step_that_verifies_a_draft_is_a_dense_one(llama, lookup):
    """Prompt lookup: each forward pass after the prompt's is one step, which reads everything."""
    llama.lm_head.weight.data[:] = 0
    llama.lm_head.weight.data[5:7] = llama.lm_head.weight.data[5:7].normal_()  # repeats itself, so that drafts fit
    passes = []
    llama.register_forward_pre_hook(
        lambda model, _, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    with sparse_attention(llama, budget=64) as sparse:
        llama.generate(PROMPT, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=lookup)
    counters, single = sparse.counters, passes.count(1)
    assert any(1 < tokens < 90 for tokens in passes)
    assert counters.steps == len(passes) - 1
    assert counters.sparse_steps == single
    assert counters.pages_read < counters.pages_total or not single


def test_a_draft_counts_what_it_reads(llama):
    cache = PagedCache(llama.config, SparseAttentionConfig(budget=64))
    llama.set_attn_implementation("unique")
    read(llama, PROMPT, cache)
    read(llama, PROMPT[:, :5], cache)
    cache.crop(-3)
    assert (cache.counters.steps, cache.counters.sparse_steps, cache.length) == (1, 0, 92)
    assert cache.counters.pages_read == cache.counters.pages_total == 3 * 3 * 12
    cache.crop(-2)  # of what has been accepted: no draft
    read(llama, PROMPT[:, :40], cache)  # and the next chunk of a prompt is none either
    read(llama, PROMPT[:, :1], cache)
    assert (cache.counters.steps, cache.counters.sparse_steps) == (2, 1)


def test_copies_of_a_prompt_count_together(llama):
    """The recipe for several answers to one prompt."""
    with sparse_attention(llama, budget=64) as sparse, torch.no_grad():
        prefix = sparse.make_cache()
        read(llama, PROMPT, prefix)
        alone = [read(llama, PROMPT[:, index : index + 1], copy.deepcopy(prefix)) for index in range(3)]
        caches = [copy.deepcopy(prefix) for _ in range(3)]
        for index, cache in enumerate(caches):
            assert torch.equal(read(llama, PROMPT[:, index : index + 1], cache), alone[index])
            assert cache.counters is sparse.counters
    assert (prefix.length, caches[0].length) == (90, 91)
    assert (sparse.counters.steps, sparse.counters.sparse_steps) == (6, 6)
    assert sparse.counters.pages_total == 6 * 3 * 3 * 12


def test_a_copy_of_the_counters_stays_as_it_is(llama):
    with sparse_attention(llama, budget=64) as sparse:
        llama.generate(PROMPT, max_new_tokens=3, do_sample=False)
        before = copy.deepcopy(sparse.counters)
        llama.generate(PROMPT, max_new_tokens=3, do_sample=False)
    assert (before.steps, sparse.counters.since(before).steps) == (2, 2)


def test_attention_that_is_called_twice_for_a_token_is_one_step(llama):
    """As by a layer that attends twice to what it cached: what both read counts, and the step once."""
    cache = PagedCache(llama.config, SparseAttentionConfig(budget=64))
    llama.set_attn_implementation("unique")
    read(llama, PROMPT, cache)
    read(llama, PROMPT[:, :1], cache)
    once = cache.counters.copy()
    for layer in cache.paged_layers:
        forward = llama.model.layers[layer.index].self_attn.forward

        def twice(*args, forward=forward, layer=layer, **kwargs):
            result = forward(*args, **kwargs)
            key = layer.keys[:, :, : layer.length]
            query, value = torch.zeros(1, 9, 1, 16), layer.values[:, :, : layer.length]
            key.paged_layer = value.paged_layer = layer
            unique_attention_forward(llama.model.layers[layer.index].self_attn, query, key, value, None)
            return result

        llama.model.layers[layer.index].self_attn.forward = twice
    read(llama, PROMPT[:, :1], cache)
    new = cache.counters.since(once)
    assert (new.steps, new.sparse_steps) == (1, 1)
    assert new.pages_total == 2 * once.pages_total


def test_a_last_layer_without_pages_of_its_own():
    """A step counts once whichever layers attend, sparse or not: the last paged one may be dense, or left out."""
    counters = SparsityCounters()
    counting = StepCounting(counters)
    for _ in range(2):
        counting.count(0, SparsityCounters(pages_read=2), True)
        counting.count(1, SparsityCounters(pages_read=5), False)
    counting.count(1, SparsityCounters(pages_read=5), False)
    counting.count(0, SparsityCounters(pages_read=2), True)
    counting.count(0, SparsityCounters(pages_read=2), True)
    assert (counters.steps, counters.sparse_steps, counters.pages_read) == (4, 4, 23)
