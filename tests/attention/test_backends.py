"""The Triton backend against plain PyTorch: on a GPU, or without one under Triton's interpreter."""

import pytest
import torch

from unique_asr.attention import (
    DecodeStep,
    PagedCache,
    SparseAttentionConfig,
    SparsityCounters,
    backend,
    sparse_attention,
)
from unique_asr.attention.cache import PagedLayer
from unique_asr.attention.scores import SCORES
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.steps import attend_to_pages, run_static_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EIGHT_BITS = "fp8" if torch.cuda.is_available() else "int8"
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


def layers(config, length, batch=2, heads=2, group=3, dim=16, seed=0):
    """The same random tokens in a layer of each backend, PyTorch's first, and a query."""
    torch.manual_seed(seed)
    shift = torch.randn(batch, heads, length // 4 + 1, dim).repeat_interleave(4, dim=2)[:, :, :length]
    keys, values = shift + torch.randn(shift.shape), torch.randn(shift.shape)
    pair = []
    for name in ("torch", "triton"):
        options = config | {"backend": name}
        layer = PagedLayer(SparseAttentionConfig(**options), SparsityCounters())
        layer.update(keys.to(DEVICE), values.to(DEVICE))
        pair.append(layer)
    return *pair, torch.randn(batch, heads * group, 1, dim).to(DEVICE)


def spied(monkeypatch, name):
    """The list that every call of this kernel is appended to."""
    calls, function = [], getattr(backend.load_kernels(), name)

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(backend.load_kernels(), name, spy)
    return calls


def assert_same(output, expected, configuration):
    """Of 8-bit statistics one rounded the other way may choose another page, now and then."""
    wrong = ((output - expected).abs() > 1e-4).any(dim=-1).float().mean()
    assert wrong <= (0.1 if "statistics_dtype" in configuration else 0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step(configuration, padded):
    length = 301
    plain, triton, query = layers({"budget": 96} | configuration, length)
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
    calls, appends = spied(monkeypatch, "sparse_step"), spied(monkeypatch, "append")
    start, end = (318, 322) if one_launch else (302, 305)
    plain, triton, query = layers({"budget": 96} | configuration, end)
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
    calls, appends = spied(monkeypatch, "sparse_step"), spied(monkeypatch, "append")
    plain, triton, query = layers({"budget": 96}, 304)
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


def test_values_of_another_width_are_left_to_pytorch():
    layer = PagedLayer(SparseAttentionConfig(budget=96, backend="triton"), SparsityCounters())
    layer.update(torch.randn(1, 2, 301, 16, device=DEVICE), torch.randn(1, 2, 301, 8, device=DEVICE))
    assert not layer.triton


def test_more_pages_than_the_kernel_can_choose_from(monkeypatch):
    plain, triton, query = layers({"budget": 96}, 301)
    monkeypatch.setattr(backend.load_kernels(), "MAX_PAGES", 16)
    torch.testing.assert_close(
        attend_to_pages(triton, query, 0.25), attend_to_pages(plain, query, 0.25), rtol=1e-4, atol=1e-4
    )


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


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(
    "attention", [{"statistics_dtype": "int8", "dense_layers": 1}, {"super_page_size": 16, "combine": "share"}], ids=str
)
def test_a_batch_by_static_steps(llama, name, attention, monkeypatch):
    """`DecodeStep` on a padded batch gives the tokens of generate, over the end of the budget and of a page."""
    calls = spied(monkeypatch, "sparse_step")
    llama.to(DEVICE)
    torch.manual_seed(0)
    starts = torch.tensor([0, 45], device=DEVICE)
    mask = (torch.arange(102, device=DEVICE) >= starts[:, None]).long()
    ids = torch.randint(1, 97, (2, 102), device=DEVICE) * mask
    with sparse_attention(llama, budget=104, backend=name, **attention) as sparse:
        expected = llama.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 102:]
        cache = sparse.make_cache(capacity=256)
        positions = (torch.arange(102, device=DEVICE) - starts[:, None]).clamp(min=0)
        output = llama(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        step = DecodeStep(llama, cache, batch=2, starts=starts)
        step.choose(output.logits[:, -1])
        tokens = [step.result[0].tolist()]
        for _ in range(4):
            step.run()
            tokens.append(step.result[0].tolist())
    assert torch.tensor(tokens).T.tolist() == expected.tolist()
    assert sparse.counters.sparse_steps == 2 * 2
    if name == "triton":
        # two steps; on CUDA the first one's warm-up and capture
        assert len(calls) == 2 * (3 - attention.get("dense_layers", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CUDA")
def test_triton_without_cuda_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not backend.uses_triton("auto", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        PagedLayer(SparseAttentionConfig(backend="triton"), None).update(*torch.zeros(2, 1, 1, 8, 16))


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


def test_every_super_page_is_every_page():
    """Two levels that look into all super-pages select as one level does."""
    config = {"budget": 96, "super_page_size": 64}
    _, _, query = layers({"budget": 96}, 501)
    one, _, _ = layers({"budget": 96}, 501)
    two, _, _ = layers(config | {"super_pages": 8}, 501)
    few, _, _ = layers(config | {"super_pages": 3}, 501)
    expected = attend_to_pages(one, query, 0.25)
    assert torch.equal(attend_to_pages(two, query, 0.25), expected)
    assert not torch.allclose(attend_to_pages(few, query, 0.25), expected)


def test_a_compiled_step_is_one_graph(llama):
    """Whatever the length: a recompilation a step would cost seconds each."""
    torch._dynamo.reset()
    llama.set_attn_implementation("unique")
    tokens = {}
    for compiled in (False, True):
        cache = PagedCache(llama.config, SparseAttentionConfig(budget=64, backend="torch"))
        step = DecodeStep(llama, cache, capture=False)
        if compiled:
            graphs = []

            def count(graph, inputs, graphs=graphs):
                graphs.append(graph)
                return graph.forward

            step._model = torch.compile(llama, fullgraph=True, dynamic=False, backend=count)
        with torch.no_grad():
            step.choose(llama(torch.arange(1, 91)[None], past_key_values=cache).logits[:, -1])
        tokens[compiled] = []
        for _ in range(6):
            step.run()
            tokens[compiled].append(step.result[0].item())
    assert tokens[True] == tokens[False]
    assert len(graphs) == 1
