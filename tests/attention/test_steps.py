"""Steps of one layer: static ones against eager ones, and Triton's against plain PyTorch's.

The kernels run on a GPU, or without one under Triton's interpreter.
"""

import pytest
import torch
from paged_layers import DEVICE, DIM, EIGHT_BITS, HEADS, filled_layer, make_layer_pair, record_calls

from unique_asr.attention import (
    SparseAttentionConfig,
    backend,
    reference,
    sparse_attention,
)
from unique_asr.attention.scores import SCORES
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.steps import attend_static, attend_to_pages, run_static_step

CONFIGURATIONS = [
    {},
    {"combine": "share"},
    {"score": "mean", "sink_pages": 0, "recent_pages": 1},
    {"score": "quest", "page_size": 16},
    {"score": "second_moment", "statistics_dtype": EIGHT_BITS},
    {"statistics_dtype": EIGHT_BITS, "page_size": 16},
    {"statistics_dtype": "int8", "combine": "share"},
    {"super_page_size": 32, "super_pages": 6},
    {"super_page_size": 256, "combine": "share"},  # more super-pages to choose than there are
    {"super_page_size": 32, "super_pages": 6, "statistics_dtype": "fp8"},
]


def assert_same(output, expected, configuration):
    """Of 8-bit statistics one rounded the other way may choose another page, now and then."""
    wrong = ((output - expected).abs() > 1e-4).any(dim=-1).float().mean()
    assert wrong <= (0.1 if "statistics_dtype" in configuration else 0)


@pytest.mark.parametrize("length", [65, 72, 100, 250])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("combine", ["max", "share"])
def test_the_static_step_is_the_step(length, score, combine):
    """The step of a CUDA graph knows the length only as a tensor; slots after it hold an earlier sequence."""
    config = SparseAttentionConfig(budget=64, score=score, combine=combine)
    layer, query = filled_layer(config, length)
    layer.keys[:, :, length:] = 50.0
    layer.values[:, :, length:] = 50.0
    expected = attend_to_pages(layer, query, DIM**-0.5)
    for statistic in layer.statistics:
        statistic[:, :, (length - 1) // 8 :] = 1e3
    layer.step = StaticStep(torch.tensor([length - 1]), True, config, layer.capacity)
    torch.testing.assert_close(attend_static(layer, query, DIM**-0.5), expected)

    layer.step = StaticStep(torch.tensor([length - 1]), False, config, layer.capacity)
    dense = reference.attend(
        reference.group_queries(query, HEADS), layer.keys[:, :, :length], layer.values[:, :, :length], DIM**-0.5
    )
    torch.testing.assert_close(attend_static(layer, query, DIM**-0.5), dense)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step(configuration, padded):
    length = 301
    plain, triton, query = make_layer_pair({"budget": 96} | configuration, length)
    assert triton.triton
    starts = torch.tensor([0, 37], device=DEVICE) if padded else None
    valid = torch.arange(length, device=DEVICE) >= starts[:, None] if padded else None
    expected = attend_to_pages(plain, query, 0.25, valid, starts)
    output = attend_to_pages(triton, query, 0.25, valid, starts)
    assert_same(output, expected, configuration)
    for level, other in zip(triton.levels, plain.levels):
        assert level.ready == other.ready == length // level.size
        for statistic, same in zip(level.statistics, other.statistics):
            difference = (statistic[:, :, : level.ready].float() - same[:, :, : level.ready].float()).abs().max()
            assert difference <= (1e-4 if statistic.dtype == torch.float32 else 32 if EIGHT_BITS == "fp8" else 1)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("one_launch", [True, False])
def test_static_steps(configuration, padded, one_launch, monkeypatch):
    """Across the end of a page, and of a super-page: the token is written, its page's statistics with it."""
    if not one_launch:
        monkeypatch.setattr(backend.load_kernels(), "STEP_PAGES", 8)
    calls, appends = record_calls(monkeypatch, "sparse_step"), record_calls(monkeypatch, "append")
    start, end = (318, 322) if one_launch else (302, 305)
    plain, triton, query = make_layer_pair({"budget": 96} | configuration, end)
    plain.keeps_selection = triton.keeps_selection = True
    starts = torch.tensor([0, 37], device=DEVICE) if padded else None
    tokens = plain.keys[:, :, start:end].clone(), plain.values[:, :, start:end].clone()
    for layer in (plain, triton):
        layer.crop(start - end)
        layer.keys[:, :, start:], layer.values[:, :, start:] = 7.0, 7.0
        valid = torch.arange(start, device=DEVICE) >= starts[:, None] if padded else None
        layer.update_statistics(valid, starts)
    for position in range(start, end):
        outputs = []
        for layer in (plain, triton):
            now = torch.tensor([position], device=DEVICE)
            layer.step = StaticStep(now, True, layer.config, layer.capacity, starts)
            token = [each[:, :, position - start : position - start + 1] for each in tokens]
            outputs.append(run_static_step(layer, query, *token, 0.25))
        assert_same(outputs[1], outputs[0], configuration)
        assert torch.equal(triton.keys, plain.keys)
        assert torch.equal(triton.values, plain.values)
        assert not triton.step.make_arrivals(1).any()
        differs = ~(triton.selected.unsqueeze(-1) == plain.selected.unsqueeze(-2)).any(dim=-1)
        assert differs.float().mean() <= (0.1 if "statistics_dtype" in configuration else 0)
    assert (len(calls), len(appends)) == ((end - start, 0) if one_launch else (0, end - start))
    for level, other in zip(triton.levels, plain.levels):
        for statistic, same in zip(level.statistics, other.statistics):
            got, expected = (each[:, :, : end // level.size].float() for each in (statistic, same))
            assert (got - expected).abs().max() <= (1e-4 if statistic.dtype == torch.float32 else 32)


@pytest.mark.parametrize("step", ["dense step", "dense layer"])
def test_dense_steps_write_the_token_alone(step, monkeypatch):
    calls, appends = record_calls(monkeypatch, "sparse_step"), record_calls(monkeypatch, "append")
    plain, triton, query = make_layer_pair({"budget": 96}, 304)
    token = torch.randn(2, 2, 2, 1, 16, device=DEVICE)
    outputs = []
    for layer in (plain, triton):
        layer.is_sparse = step == "dense step"
        now = torch.tensor([304], device=DEVICE)
        layer.step = StaticStep(now, step == "dense layer", layer.config, layer.capacity)
        outputs.append(run_static_step(layer, query, *token, 0.25))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(triton.keys, plain.keys)
    assert (len(calls), len(appends)) == (0, 1)


@pytest.mark.parametrize("attention", [{"combine": "share", "dense_layers": 1}, {"super_page_size": 16}], ids=str)
def test_generate(llama, attention):
    """A batch with padding, token by token the same."""
    llama.to(DEVICE)
    torch.manual_seed(0)
    mask = (torch.arange(100) >= torch.tensor([[0], [45]])).long()
    inputs = {"input_ids": torch.randint(1, 97, (2, 100)) * mask, "attention_mask": mask}
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    outputs = {}
    for name in ("torch", "triton"):
        with sparse_attention(llama, budget=64, backend=name, **attention) as sparse:
            outputs[name] = llama.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert sparse.counters.sparse_steps == 2
    assert torch.equal(outputs["triton"], outputs["torch"])
