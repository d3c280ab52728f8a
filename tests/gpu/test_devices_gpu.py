"""Steps on a device that is not the current one, on several streams at once, and after sequences of NaN.

python -m pytest tests/gpu/test_devices_gpu.py -m gpu
"""

import timeit

import pytest
import torch
from kernel_cases import make_case
from transformers import LlamaConfig, LlamaForCausalLM
from unique_asr.kernels.launch import HERE, use_device
from unique_asr.kernels.page_scores import page_scores, select_pages, select_pages_in_two_levels
from unique_asr.kernels.page_statistics import append, write_page_statistics
from unique_asr.kernels.soft_mask_attention import training_attention
from unique_asr.kernels.sparse_decode import sparse_decode
from unique_asr.kernels.sparse_step import sparse_step
from unique_asr.kernels.top_pages import top_pages

from unique_asr.attention import (
    DecodeStep,
    SparseAttentionConfig,
    SparsityCounters,
    TrainingAttentionConfig,
    sparse_attention,
)
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.attention.steps import attend_to_pages
from unique_asr.decoding.greedy import GreedyDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
BF16 = torch.bfloat16


def make_model(device, dtype=BF16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, initializer_range=0.2, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype).eval()


@needs_two
def test_kernels_run_where_their_tensors_are():
    case = make_case([1000, 801], 1024, group=4, dim=128, dtype=BF16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    step, how = (case.query, case.statistics, case.lengths), ("unique", 0.5, 8)
    scaling = case.query.shape[-1] ** -0.5
    supers = case.readable(case.expected_statistics(64), 64)
    pages = select_pages(*step, 31, *how)
    assert torch.equal(pages, top_pages(page_scores(*step, *how), 31))
    select_pages_in_two_levels(*step[:2], supers, case.lengths, 31, 20, *how, 8)
    out = sparse_decode(case.query, case.keys, case.values, pages, case.lengths, scaling, 8)
    torch.testing.assert_close(out.double(), case.output(pages.cpu(), scaling), rtol=2e-2, atol=2e-2)
    write_page_statistics(case.plain_keys, case.empty_statistics(8), 0, 100, "unique")
    token = torch.randn(2, 2, case.heads, 1, 128, device="cuda:1").to(BF16)
    append(*token, case.keys, case.values, case.statistics, case.lengths, "unique")
    sparse_step(case.query, *token, case.keys, case.values, case.statistics, case.lengths, 31, "unique", 0.5)
    query, key, value = torch.randn(3, 1, 2, 512, 64, device="cuda:1", dtype=BF16, requires_grad=True)
    training_attention(query, key, value, TrainingAttentionConfig.from_dict({"budget": 64})).sum().backward()
    torch.cuda.synchronize("cuda:1")
    assert torch.cuda.current_device() == 0


@needs_two
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [128, None])
def test_a_model_on_the_second_device(static, budget):
    """Eager steps and captured ones give the tokens of the same model on the current device."""
    tokens = []
    for device in ("cuda:0", "cuda:1"):
        model = make_model(device)
        torch.manual_seed(1)
        embeds = torch.randn(1, 700, 128).to(device, BF16)
        decoder = GreedyDecoder(model, SparseAttentionConfig(budget=budget), static=static)
        decoder.prefill(embeds)
        tokens.append(list(decoder.tokens(40)))
    assert tokens[0] == tokens[1]
    assert torch.cuda.current_device() == 0


def test_streams_do_not_share_counters():
    """Two streams choose pages at the same time, over and over."""
    torch.manual_seed(0)
    cases, streams = [], [torch.cuda.Stream() for _ in range(2)]
    for _ in streams:
        numbers = torch.randn(8, 8, 4096, 128, device="cuda", dtype=BF16)
        std = torch.rand(8, 8, 4096, 1, device="cuda", dtype=BF16)
        lengths = torch.full((8,), 32768, dtype=torch.int32, device="cuda")
        query = torch.randn(8, 32, 128, device="cuda", dtype=BF16)
        cases.append((query, (numbers, std), lengths))
    expected = [select_pages(*case, 63, "unique", 0.5, 8, "share") for case in cases]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(100):
        for each, case, stream in zip(got, cases, streams):
            with torch.cuda.stream(stream):
                each.append(select_pages(*case, 63, "unique", 0.5, 8, "share"))
    torch.cuda.synchronize()
    for each, want in zip(got, expected):
        assert all(torch.equal(pages, want) for pages in each)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("budget", [128, None])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("capture", [False, True])
def test_a_forgotten_sequence_leaves_nothing(backend, budget, garbage, capture):
    """After NaN or inf in a sequence that was reset, captured steps give what a new cache gives."""
    model = make_model("cuda")
    ids = torch.randint(1, 97, (1, 300), generator=torch.Generator().manual_seed(2)).cuda()
    results = []
    with sparse_attention(model, budget=budget, backend=backend) as sparse, torch.no_grad():
        for poisoned in (False, True):
            cache = sparse.make_cache(capacity=1024)
            step = DecodeStep(model, cache, capture=capture)
            if poisoned:
                model(ids.repeat(1, 2), **{CACHE_ARGUMENT: cache})
                for layer in cache.paged_layers:
                    layer.keys[:, :, : layer.length] = garbage
                    layer.values[:, :, : layer.length] = garbage
                step.run()  # captured before, as in a decoder that goes on
                cache.reset()
            step.choose(model(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1])
            tokens = []
            for _ in range(20):
                step.run()
                tokens.append(step.fetch().tolist())
            results.append(tokens)
    assert results[0] == results[1]


@pytest.mark.parametrize("combine", ["max", "share"])
def test_nan_in_a_page(combine):
    case = make_case([4000], 4096, group=4, dim=128, dtype=BF16, device="cuda")
    for statistic in case.statistics:
        statistic[0, 0, [0, 7]] = torch.nan
        statistic[0, 0, 9] = torch.inf
    scores = page_scores(case.query, case.statistics, case.lengths, "unique", 0.5, 8, combine)
    assert not scores.isnan().any()
    assert scores[0, 0, 7] == -torch.inf
    assert scores[0, 0, 0] == torch.inf
    assert scores[0, 0, 9] < torch.inf
    chosen = select_pages(case.query, case.statistics, case.lengths, 63, "unique", 0.5, 8, combine)[0, 0].tolist()
    assert 7 not in chosen
    assert {0, 498} < set(chosen)
    scores = torch.randn(4, 4096, device="cuda")
    scores[:, ::3] = torch.nan
    assert (top_pages(scores, 64) % 3 > 0).all()


def capture_step(model, seed, budget, capacity):
    """A captured step of a sequence, its first token chosen, on a cache so long that a step takes several launches."""
    ids = torch.randint(1, 97, (2, 3000), generator=torch.Generator().manual_seed(seed)).cuda()
    sparse = sparse_attention(model, budget=budget, backend="triton")
    cache = sparse.make_cache(capacity=capacity)
    with torch.no_grad():
        logits = model(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    step = DecodeStep(model, cache, batch=2)
    step.choose(logits)
    step.run()
    return step


@pytest.mark.parametrize("capacity", [8192, 80_000])
def test_two_captured_steps_at_the_same_time(capacity):
    """Both are captured on one stream, and replayed on two: each has counters of its own."""
    models, tokens = [make_model("cuda") for _ in range(2)], []
    for together in (False, True):
        steps = [capture_step(model, seed, 512, capacity) for seed, model in enumerate(models)]
        streams = [torch.cuda.Stream() for _ in steps]
        torch.cuda.synchronize()
        written = [[], []]
        for _ in range(200):
            for step, stream, own in zip(steps, streams, written):
                with torch.cuda.stream(stream):
                    step.run()
                    own.append(step.token.clone())
                if not together:
                    torch.cuda.synchronize()
        torch.cuda.synchronize()
        tokens.append([torch.cat(own).tolist() for own in written])
    assert tokens[0] == tokens[1]


def test_a_graph_of_ones_own_after_one_run():
    """Captured on PyTorch's own stream: nothing is allocated or waited for on the way, and every replay is right."""
    case = make_case([4000, 3001], 4096, group=4, dim=128, dtype=BF16, device="cuda")
    query, scaling = case.query.clone(), 128**-0.5

    def run():
        pages = select_pages(query, case.statistics, case.lengths, 63, "unique", 0.5, 8, "share")
        return pages, sparse_decode(query, case.keys, case.values, pages, case.lengths, scaling, 8)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(5):
        torch.manual_seed(seed)
        query.copy_(torch.randn_like(query))
        graph.replay()
        for found, expected in zip(captured, run()):
            torch.testing.assert_close(found, expected)


def test_the_guard_costs_nothing_on_the_current_device():
    """Less than a microsecond: a launch takes ten."""
    tensor = torch.zeros(1, device="cuda")
    best = min(timeit.repeat(lambda: use_device(tensor).__enter__(), number=10_000, repeat=5)) / 10_000
    assert use_device(tensor) is HERE
    assert best < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("combine", ["max", "share"])
def test_products_beyond_the_range_of_float16(backend, combine):
    """Keys and queries that float16 holds, with scores beyond 65504: sink and recent pages are read."""
    torch.manual_seed(0)
    config = SparseAttentionConfig(budget=128, backend=backend, combine=combine, recent_pages=2)
    layer = PagedLayer(config, SparsityCounters())
    layer.keeps_selection = True
    keys, query = (200 * torch.randn(1, heads, n, 64, device="cuda") for heads, n in ((2, 1000), (8, 1)))
    layer.update(keys.half(), torch.randn(1, 2, 1000, 64, device="cuda").half())
    assert attend_to_pages(layer, query.half(), 0.125).isfinite().all()
    assert (layer.selected[..., 0] == 0).all()
    assert (layer.selected[..., -1] == 123).all()
