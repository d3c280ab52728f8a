"""NaN and inf of sequences that are forgotten reach nobody: 0 x NaN is NaN."""

import pytest
import torch
from paged_layers import DEVICE, DIM, filled_layer, make_layer_pair
from transformers import LlamaConfig, LlamaForCausalLM

from unique_asr.attention import DecodeStep, SparseAttentionConfig, reference, sparse_attention
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.page_selector import PageSelector
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.steps import attend_to_pages

FORGET = {
    "reset": lambda cache: cache.reset(),
    "crop": lambda cache: cache.crop(-cache.length),
    "crop twice": lambda cache: (cache.crop(-60), cache.crop(-cache.length)),
    "shift": lambda cache: cache.shift(-96),
}


@pytest.fixture
def small_llama():
    """One layer, with two query heads over one KV head: every program of a kernel takes its time without a GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.4, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(DEVICE)


def poison(buffer, entries):
    """Fill the first entries as a sequence that overflowed leaves them: with inf and NaN."""
    if buffer.is_floating_point():
        buffer[..., :entries, :] = torch.nan
        buffer[..., :entries:2, :] = torch.inf


def run_steps(model, cache, logits, starts=None, steps=3):
    step = DecodeStep(model, cache, batch=len(logits), starts=starts, capture=False)
    step.choose(logits)
    results = []
    for _ in range(steps):
        step.run()
        results.append(step.result.clone())
    return torch.stack(results)


@pytest.mark.parametrize("how", FORGET)
@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_static_steps_after_a_forgotten_sequence(small_llama, backend, budget, how):
    """Across the end of a page; with a budget the first steps are dense."""
    torch.manual_seed(0)
    ids = torch.randint(1, 97, (1, 63), device=DEVICE)
    results = []
    with sparse_attention(small_llama, budget=budget, backend=backend, super_page_size=16) as sparse, torch.no_grad():
        for forget in (None, FORGET[how]):
            cache = sparse.make_cache(capacity=128)
            if forget is not None:
                small_llama(torch.randint(1, 97, (1, 96), device=DEVICE), **{CACHE_ARGUMENT: cache})
                if how != "shift":
                    small_llama(ids[:, :1], **{CACHE_ARGUMENT: cache})  # which brings the statistics up to date
                for layer in cache.paged_layers:
                    for buffer, size in layer._buffers():
                        poison(buffer, -(-layer.length // size))
                forget(cache)
                assert cache.length == 0
            results.append(run_steps(small_llama, cache, small_llama(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1]))
    assert results[0].isfinite().all()
    assert torch.equal(results[1], results[0])


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_that_is_replaced(small_llama, backend, budget):
    """The padding before the new sequence, which is shorter, is where the former one lay."""
    torch.manual_seed(0)
    ids, new = torch.randint(1, 97, (2, 72), device=DEVICE), torch.randint(1, 97, (1, 40), device=DEVICE)
    results = []
    with sparse_attention(small_llama, budget=budget, backend=backend) as sparse, torch.no_grad():
        for poisoned in (False, True):
            cache, other = sparse.make_cache(capacity=128), sparse.make_cache()
            logits = small_llama(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1]
            if poisoned:
                for layer in cache.paged_layers:
                    for buffer, size in layer._buffers():
                        poison(buffer[1], layer.length // size)
            cache.shift(16)
            logits[1] = small_llama(new, **{CACHE_ARGUMENT: other}).logits[0, -1]
            cache.copy_rows(torch.tensor([1], device=DEVICE), other, torch.tensor([0], device=DEVICE))
            starts = torch.tensor([16, 88 - 40], device=DEVICE)
            results.append(run_steps(small_llama, cache, logits, starts, steps=2))
    assert results[0].isfinite().all()
    assert torch.equal(results[1], results[0])


def test_nothing_is_written_where_nothing_was_forgotten(llama):
    cache = sparse_attention(llama, budget=64).make_cache(capacity=512)
    with torch.no_grad():
        llama(torch.ones(1, 100, dtype=torch.long), **{CACHE_ARGUMENT: cache})
    layer = cache.paged_layers[0]
    layer.keys[:, :, 100:], layer.values[:, :, 100:] = 7.0, 7.0
    cache.clear_forgotten()
    assert (layer.keys[:, :, 100:] == 7).all()
    cache.crop(-10)
    cache.clear_forgotten()
    assert (layer.keys[:, :, 90:100] == 0).all()
    assert (layer.values[:, :, 100:] == 7).all()
    assert layer.keys[:, :, :90].any(dim=-1).all()


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("super_page_size", [None, 16])
def test_statistics_that_are_not_written_yet_do_not_matter(combine, super_page_size):
    """Whatever they are, `select_static` chooses the same pages."""
    config = SparseAttentionConfig(budget=64, combine=combine, super_page_size=super_page_size)
    layer, query = filled_layer(config, 203)
    layer.update_statistics()
    queries, step = reference.group_queries(query, 3), StaticStep(torch.tensor([202]), True, config, layer.capacity)
    expected = PageSelector(config).select_static(queries, layer.levels, step, DIM**-0.5)
    for level in layer.levels:
        for statistic in level.statistics:
            statistic[:, :, 202 // level.size :] = torch.nan
    assert torch.equal(PageSelector(config).select_static(queries, layer.levels, step, DIM**-0.5), expected)
    valid = torch.ones(1, 203, dtype=torch.bool)
    assert torch.equal(PageSelector(config).select(queries, layer.levels, 202 // 8, DIM**-0.5, valid), expected)


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_page_with_a_nan_key_is_read_by_nobody(combine, padded, backend):
    """The queries attend to the other pages, and all of the pages stay in order."""
    layer = make_layer_pair({"budget": 96, "combine": combine}, 141, heads=1)[backend == "triton"]
    query = make_layer_pair({}, 141, heads=1)[2]
    starts = torch.tensor([0, 37], device=DEVICE) if padded else None
    valid = torch.arange(141, device=DEVICE) >= starts[:, None] if padded else None
    layer.keeps_selection = True
    layer.keys[0, 0, 83] = torch.nan
    output = attend_to_pages(layer, query, 0.25, valid, starts)
    assert output.isfinite().all()
    assert not (layer.selected[0, 0] == 83 // 8).any()
    assert (layer.selected[..., -1] == 16).all()
