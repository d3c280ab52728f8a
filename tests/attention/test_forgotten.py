"""NaN and inf of sequences that are forgotten reach nobody: 0 x NaN is NaN."""

import pytest
import torch
from paged_layers import DEVICE

from unique_asr.attention import DecodeStep, SparseAttentionConfig, reference, sparse_attention
from unique_asr.attention.page_selector import PageSelector
from unique_asr.attention.static_step import StaticStep

FORGET = {
    "reset": lambda cache: cache.reset(),
    "crop": lambda cache: cache.crop(-cache.length),
    "crop twice": lambda cache: (cache.crop(-60), cache.crop(-cache.length)),
    "shift": lambda cache: cache.shift(-256),
}


def poison(cache, garbage):
    """Fill all that is written, statistics too, as a sequence that overflowed leaves it."""
    for layer in cache.paged_layers:
        for buffer, size in layer._buffers():
            if buffer.is_floating_point():
                buffer[:, :, : -(-layer.length // size)] = garbage


def run_steps(model, cache, logits, starts=None, steps=9):
    step = DecodeStep(model, cache, batch=len(logits), starts=starts, capture=False)
    step.choose(logits)
    results = []
    for _ in range(steps):
        step.run()
        results.append(step.result.clone())
    return torch.stack(results)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", FORGET)
@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_static_steps_after_a_forgotten_sequence(llama, backend, budget, how, garbage):
    """Across the end of a page; with a budget the first steps are dense."""
    llama.to(DEVICE)
    torch.manual_seed(0)
    ids = torch.randint(1, 97, (1, 61), device=DEVICE)
    results = []
    with sparse_attention(llama, budget=budget, backend=backend, super_page_size=16) as sparse, torch.no_grad():
        for forget in (None, FORGET[how]):
            cache = sparse.make_cache(capacity=512)
            if forget is not None:
                llama(torch.randint(1, 97, (1, 256), device=DEVICE), past_key_values=cache)
                llama(ids[:, :1], past_key_values=cache) if how != "shift" else None
                poison(cache, garbage)
                forget(cache)
                assert cache.length == 0
            results.append(run_steps(llama, cache, llama(ids, past_key_values=cache).logits[:, -1]))
    assert results[0].isfinite().all()
    assert torch.equal(results[1], results[0])


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_that_is_replaced(llama, backend, budget):
    """The padding before the new sequence, which is shorter, is where the former one lay."""
    llama.to(DEVICE)
    torch.manual_seed(0)
    ids, new = torch.randint(1, 97, (2, 104), device=DEVICE), torch.randint(1, 97, (1, 72), device=DEVICE)
    results = []
    with sparse_attention(llama, budget=budget, backend=backend) as sparse, torch.no_grad():
        for garbage in (None, torch.nan):
            cache, other = sparse.make_cache(capacity=512), sparse.make_cache()
            logits = llama(ids, past_key_values=cache).logits[:, -1]
            if garbage is not None:
                for layer in cache.paged_layers:
                    for buffer, size in layer._buffers():
                        buffer[1, :, : layer.length // size] = garbage
            cache.shift(16)
            logits[1] = llama(new, past_key_values=other).logits[0, -1]
            cache.copy_rows(torch.tensor([1], device=DEVICE), other, torch.tensor([0], device=DEVICE))
            starts = torch.tensor([16, 120 - 72], device=DEVICE)
            results.append(run_steps(llama, cache, logits, starts))
    assert results[0].isfinite().all()
    assert torch.equal(results[1], results[0])


def test_nothing_is_written_where_nothing_was_forgotten(llama):
    cache = sparse_attention(llama, budget=64).make_cache(capacity=512)
    with torch.no_grad():
        llama(torch.ones(1, 100, dtype=torch.long), past_key_values=cache)
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
    from paged_layers import DIM, filled_layer

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
    from paged_layers import make_layer_pair

    from unique_asr.attention.steps import attend_to_pages

    layer = make_layer_pair({"budget": 96, "combine": combine}, 301)[backend == "triton"]
    query = make_layer_pair({}, 301)[2]
    starts = torch.tensor([0, 37], device=DEVICE) if padded else None
    valid = torch.arange(301, device=DEVICE) >= starts[:, None] if padded else None
    layer.keeps_selection = True
    layer.keys[0, 1, 83] = torch.nan
    output = attend_to_pages(layer, query, 0.25, valid, starts)
    assert output.isfinite().all()
    assert not (layer.selected[0, 1] == 83 // 8).any()
    assert (layer.selected[..., -1] == 36).all()
