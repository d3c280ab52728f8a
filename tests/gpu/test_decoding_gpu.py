"""The captured decode step on a GPU: the same tokens as eagerly, no synchronisation, and what it costs.

python -m pytest tests/gpu/test_decoding_gpu.py -m gpu -s
"""

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unique_asr.attention import SparseAttentionConfig, dense, reference
from unique_asr.attention.dense import attend_densely, supports_flash
from unique_asr.attention.huggingface import make_padding_mask
from unique_asr.decoding import greedy as decoding
from unique_asr.decoding.greedy import GreedyDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def decode(decoder, embeds, tokens):
    decoder.reset()
    decoder.prefill(embeds)
    return list(decoder.tokens(tokens))


@pytest.mark.parametrize("length", [256, 8192, 10240])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_with_a_bias_against_float64(length, dtype):
    torch.manual_seed(0)
    query = torch.randn(1, 3, 3, 64, device="cuda", dtype=dtype)
    keys, values = torch.randn(2, 1, 3, length, 64, device="cuda", dtype=dtype)
    bias = torch.zeros(length, device="cuda")
    bias[-100:] = -torch.inf
    output = reference.attend_biased(query, keys, values, 0.125, bias)
    exact = reference.attend_biased(query.double().cpu(), keys.double().cpu(), values.double().cpu(), 0.125, bias.cpu())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output.double().cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (9, 3, 64), (4, 4, 80)])
def test_a_chunk_of_a_prefill_against_float64(heads, kv_heads, dim, padded, monkeypatch):
    """FlashAttention, which aligns the queries with the last tokens by itself, and takes padded rows one by one."""
    monkeypatch.setattr(dense, "BATCHED_TOKENS", 0)
    torch.manual_seed(0)
    queries, tokens, past = 300, 1000, 700
    query = torch.randn(3, heads, queries, dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 3, kv_heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    assert supports_flash(query, key, value)
    starts = torch.tensor([0, 333, 801], device="cuda") if padded else torch.zeros(3, dtype=torch.int64, device="cuda")
    place = torch.arange(tokens, device="cuda")
    mask = make_padding_mask(3, queries, tokens, attention_mask=place >= starts[:, None])
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // kv_heads, True
    output = attend_densely(module, query, key, value, mask, scaling=dim**-0.5)[0]

    repeated = [each.double().repeat_interleave(heads // kv_heads, dim=1) for each in (key, value)]
    seen = (place <= place[past:, None]) & (place >= starts.view(3, 1, 1, 1))
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), *repeated, seen).transpose(1, 2)
    real = place[past:] >= starts[:, None]  # [B, Tq]
    torch.testing.assert_close(output.double()[real], exact[real], rtol=1e-2, atol=1e-2)
    assert not output[~real].any()


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"backend": "torch"},
        {"combine": "share"},
        {"score": "quest", "page_size": 16},
        {"dense_layers": 1, "statistics_dtype": "fp8"},
        {"super_page_size": 32},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 64, 224, 1024])
def test_graphs_give_the_tokens_of_eager_steps(llama, budget, attention, monkeypatch):
    """In float32, across the budget (224) and across a growth of the cache."""
    monkeypatch.setattr(decoding, "HEADROOM", 0)
    llama.to("cuda")
    torch.manual_seed(0)
    embeds = llama.get_input_embeddings()(torch.randint(1, 97, (1, 200), device="cuda")).detach()
    config = SparseAttentionConfig(budget=budget, **attention)
    eager = GreedyDecoder(llama, config, static=False)
    graphs = GreedyDecoder(llama, config)
    assert graphs.step.capture
    expected = decode(eager, embeds, 60)
    assert decode(graphs, embeds, 60) == expected
    assert decode(graphs, embeds, 60) == expected  # replayed without another capture
    assert graphs.log_probs == pytest.approx(eager.log_probs, abs=1e-3)


@pytest.fixture(scope="module")
def smollm2():
    """The shape of SmolLM2-135M with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("attention", [{}, {"combine": "share"}, {"statistics_dtype": "fp8", "super_page_size": 64}])
def test_kernels_choose_as_pytorch_does(smollm2, attention):
    """In bf16, on the shape of SmolLM2: log-probabilities of the first tokens, by static steps and captured."""
    torch.manual_seed(0)
    embeds = torch.randn(1, 4000, 576, device="cuda", dtype=torch.bfloat16)
    results = {}
    for name in ("torch", "triton"):
        for capture in (False, True):
            config = SparseAttentionConfig(backend=name, **attention)
            decoder = GreedyDecoder(smollm2, config, capture=capture)
            results[name, capture] = decode(decoder, embeds, 12), decoder.log_probs
    for name in ("torch", "triton"):
        assert results[name, True][0] == results[name, False][0]
    torch.testing.assert_close(results["triton", True][1][:4], results["torch", True][1][:4], rtol=0.05, atol=0.2)


def test_a_compiled_step(smollm2):
    """Fused by torch.compile, then captured: nearly the same log-probabilities."""
    torch.manual_seed(0)
    embeds = torch.randn(1, 2000, 576, device="cuda", dtype=torch.bfloat16)
    results = []
    for compiled in (False, True):
        decoder = GreedyDecoder(smollm2, SparseAttentionConfig(), compile=compiled)
        decode(decoder, embeds, 12)
        results.append(decoder.log_probs[:4])
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.2)


@pytest.mark.parametrize("budget", [None, 512])
def test_the_step_never_waits_for_the_device(smollm2, budget):
    decoder = GreedyDecoder(smollm2, SparseAttentionConfig(budget=budget), capture=False)
    decoder.prefill(torch.randn(1, 600, 576, device="cuda", dtype=torch.bfloat16))
    list(decoder.tokens(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("context", [8192, 32768])
def test_milliseconds_a_token(smollm2, context):
    """Prints dense and sparse, captured and eager, in one run; the captured step equals the same step run eagerly."""
    torch.manual_seed(0)
    embeds = torch.randn(1, context, 576, device="cuda", dtype=torch.bfloat16)
    print(f"\nSmolLM2-135M shape, bf16, context {context}, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    tokens = {}
    for name, budget, options in (
        ("dense eager", None, {"static": False}),
        ("dense graph", None, {}),
        ("sparse eager", 512, {"static": False}),
        ("sparse static, not captured", 512, {"capture": False}),
        ("sparse graph", 512, {}),
    ):
        decoder = GreedyDecoder(smollm2, SparseAttentionConfig(budget=budget), capacity=context + 4096, **options)
        torch.cuda.synchronize()
        start = time.perf_counter()
        decoder.prefill(embeds)
        torch.cuda.synchronize()
        prefill = time.perf_counter() - start
        tokens[name] = list(decoder.tokens(20))  # captures
        start = time.perf_counter()
        steps = 500 if "graph" in name else 50
        tokens[name] += list(decoder.tokens(steps))
        elapsed = time.perf_counter() - start
        print(f"{name:28s} {1000 * elapsed / steps:7.3f} ms a token   prefill {prefill:.2f} s   {decoder.counters}")
    assert tokens["sparse graph"][:70] == tokens["sparse static, not captured"]
