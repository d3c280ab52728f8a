"""Scores and attention in plain PyTorch: at least float32 whatever the keys are, and float64 where they are."""

import pytest
import torch
from paged_layers import DIM, HEADS, filled_layer

from unique_asr.attention import DecodeStep, SparseAttentionConfig, SparsityCounters, reference, sparse_attention
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.page_selector import PageSelector
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.attention.scores import SCORES
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.steps import attend_to_pages


def make_layer(score, combine, dtype, factor=1.0):
    """A layer of 203 tokens with keys and a query of this type, `factor` times as large as usual."""
    config = SparseAttentionConfig(budget=64, score=score, combine=combine, recent_pages=2)
    layer, query = filled_layer(config, 203)
    other = PagedLayer(config, SparsityCounters(), capacity=256)
    other.keeps_selection = True
    other.update((factor * layer.keys[:, :, :203]).to(dtype), layer.values[:, :, :203].to(dtype))
    other.update_statistics()
    return other, (factor * query).to(dtype)


def select_in_float64(layer, query):
    """The pages by scores in float64 of the statistics as they are stored, and these scores [B, K, P]."""
    config, queries = layer.config, reference.group_queries(query, HEADS).double()
    statistics = [statistic[:, :, :25].double() for statistic in layer.statistics]
    scores = SCORES[config.score].scores(queries, statistics, config.scale)
    scores = reference.combine_group(scores, config.combine, DIM**-0.5)
    return reference.top_pages(reference.force_pages(scores, config, 25), config.pages - 1), scores


def select_static(layer, query):
    step = StaticStep(torch.tensor([202]), True, layer.config, layer.capacity)
    queries = reference.group_queries(query, HEADS)
    return PageSelector(layer.config).select_static(queries, layer.levels, step, DIM**-0.5)


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("score", ["unique", "mean", "quest"])
def test_products_beyond_the_range_of_float16_lose_no_page(score, combine):
    """Keys and queries that float16 holds, with scores beyond 65504: forced pages are read, and the best ones."""
    layer, query = make_layer(score, combine, torch.float16, 200.0)
    assert attend_to_pages(layer, query, DIM**-0.5).isfinite().all()
    expected, scores = select_in_float64(layer, query)
    assert combine == "share" or scores.max() > 65504
    assert (layer.selected[..., 0] == 0).all()
    assert (layer.selected[..., -1] == 24).all()  # the page before the newest
    if combine == "max":  # shares of so great a score are 0 in float32 sooner than in float64
        assert torch.equal(layer.selected, expected.int())
    assert torch.equal(select_static(layer, query).int(), layer.selected)


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("score", SCORES)
def test_keys_in_float64(score, combine):
    """Nothing is rounded to float32 on the way, neither statistics nor scores nor what is read."""
    layer, query = make_layer(score, combine, torch.float64)
    output = attend_to_pages(layer, query, DIM**-0.5)
    expected, _ = select_in_float64(layer, query)
    assert torch.equal(layer.selected, expected.int())
    assert torch.equal(select_static(layer, query).int(), layer.selected)
    assert all(statistic.dtype == torch.float64 for statistic in layer.statistics)
    queries = reference.group_queries(query, HEADS)
    read = torch.zeros(1, HEADS, 1, 26, 8, dtype=torch.bool)
    read.scatter_(3, expected[:, :, None, :, None].expand(-1, -1, 1, -1, 8), True)
    read[..., 25, :] = True
    logits = queries @ layer.keys[:, :, :203].transpose(-1, -2) * DIM**-0.5
    weights = logits.masked_fill(~read.flatten(-2)[..., :203], -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(output, weights @ layer.values[:, :, :203], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_model_in_float64(llama, backend):
    """Dense and sparse, by generate and by static steps; the kernels are of float32 at most."""
    llama.double()
    prompt = torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(0))
    expected = llama.generate(prompt, max_new_tokens=6, do_sample=False)
    for budget in (None, 1024, 64):
        with sparse_attention(llama, budget=budget, backend=backend) as sparse, torch.no_grad():
            tokens = llama.generate(prompt, max_new_tokens=6, do_sample=False)
            cache = sparse.make_cache()
            step = DecodeStep(llama, cache)
            step.choose(llama(prompt, **{CACHE_ARGUMENT: cache}).logits[:, -1])
            static = [step.token.item()]
            for _ in range(5):
                step.run()
                static.append(step.token.item())
        assert static == tokens[0, 90:].tolist()
        if budget != 64:
            assert torch.equal(tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_static_steps_in_16_bits(dtype):
    """Logits and sums are in float32, as on a GPU: nothing overflows where the softmax is within range."""
    torch.manual_seed(0)
    query, keys = (100 * torch.randn(1, 2, n, 16).abs() for n in (3, 128))
    values = torch.randn(1, 2, 128, 16)
    bias = torch.zeros(128).masked_fill(torch.arange(128) > 100, -torch.inf)
    found = reference.attend_biased(query.to(dtype), keys.to(dtype), values.to(dtype), 0.25, bias)
    wide = [each.to(dtype).double() for each in (query, keys, values)]
    assert found.isfinite().all()
    torch.testing.assert_close(
        found.double(), reference.attend_biased(*wide, 0.25, bias.double()), rtol=2e-2, atol=2e-2
    )
