"""The greedy decoder against transformers' generate, eagerly and with the step that a CUDA graph would capture."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from unique_asr.attention import DecodeStep, SparseAttentionConfig, sparse_attention
from unique_asr.decoding import greedy as decoding
from unique_asr.decoding.greedy import GreedyDecoder

PROMPT = 200  # tokens


@pytest.fixture
def prompt(llama):
    torch.manual_seed(0)
    return torch.randint(1, 97, (1, PROMPT))


@pytest.fixture
def embeds(llama, prompt):
    return llama.get_input_embeddings()(prompt).detach()


def generated(llama, prompt, budget, tokens, **attention):
    with sparse_attention(llama, budget=budget, **attention) as sparse:
        output = llama.generate(
            prompt, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return output.sequences[0, prompt.shape[1] :].tolist(), torch.cat(output.logits), sparse.counters


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("attention", [{}, {"combine": "share"}, {"score": "second_moment"}, {"dense_layers": 1}])
@pytest.mark.parametrize("budget", [None, 64, 224, 1024])
def test_tokens_are_those_of_generate(llama, prompt, embeds, static, budget, attention):
    """A budget of 224 is crossed on the way; 60 tokens cross the capacity of 256 too."""
    expected, logits, statistics = generated(llama, prompt, budget, 60, **attention)
    config = SparseAttentionConfig(budget=budget, **attention)
    decoder = GreedyDecoder(llama, config, capacity=400, prefill_chunk=64, static=static)
    decoder.prefill(embeds)
    assert list(decoder.tokens(60)) == expected
    assert decoder.stop_reason == "length"
    assert decoder.counters == statistics
    assert (decoder.counters.sparse_steps > 0) == (budget in (64, 224))
    best = logits.log_softmax(-1).amax(-1).tolist()
    assert decoder.log_probs == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_growing_on_the_way(llama, prompt, embeds, static, monkeypatch):
    monkeypatch.setattr(decoding, "HEADROOM", 0)
    decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=64), static=static)
    decoder.prefill(embeds)
    assert decoder.cache.capacity == 256
    expected, _, _ = generated(llama, prompt, 64, 80)
    assert list(decoder.tokens(80)) == expected
    assert decoder.cache.capacity > 256


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_stopping_and_going_on(llama, prompt, embeds, static):
    expected, _, _ = generated(llama, prompt, 64, 30)
    decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=64), static=static)
    decoder.prefill(embeds)
    assert list(decoder.tokens(10)) + list(decoder.tokens(5)) == expected[:15]
    stop = expected[20]
    rest = list(decoder.tokens(100, stop_ids={stop}))
    assert rest == expected[15 : 15 + expected[15:].index(stop)]
    assert decoder.stop_reason == "end"
    assert len(decoder.log_probs) == 15 + len(rest)
    assert decoder.length == PROMPT + 15 + len(rest)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_whoever_stops_listening_can_go_on(llama, prompt, embeds, static):
    """In pages of 8, across which a step that had begun is taken back."""
    expected, _, statistics = generated(llama, prompt, 64, 40)
    stops = [stop for stop in range(8, 39) if expected[stop] not in expected[:stop]]
    assert len(stops) > 8
    for stop in stops:
        decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=64), static=static)
        decoder.prefill(embeds)
        tokens = decoder.tokens(40)
        written = [next(tokens) for _ in range(7)]
        tokens.close()
        written += decoder.tokens(40, {expected[stop]})
        assert written == expected[:stop]
        assert decoder.length == PROMPT + stop
        assert decoder.counters.steps == stop
        written += decoder.tokens(39 - stop)  # after the token that was to stop it
        assert written == expected[:stop] + expected[stop + 1 :]
        assert decoder.counters == statistics


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_reset_and_a_second_prefill(llama, embeds, static):
    decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=64), static=static)
    decoder.prefill(embeds)
    first = list(decoder.tokens(20))
    decoder.reset()
    decoder.prefill(embeds[:, :150])
    decoder.prefill(embeds[:, 150:])
    assert list(decoder.tokens(20)) == first


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_full_cache_ends_the_answer(llama, embeds, static):
    decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=64), capacity=PROMPT + 10, static=static)
    decoder.prefill(embeds)
    assert len(list(decoder.tokens(50))) == 11  # the last token needs no place
    assert decoder.stop_reason == "length"


def test_a_prompt_over_the_capacity_is_refused(llama, embeds):
    decoder = GreedyDecoder(llama, capacity=100)
    with pytest.raises(ValueError, match="needs 200 positions and the decoder has 100"):
        decoder.prefill(embeds)


def test_progress(llama, embeds):
    calls = []
    GreedyDecoder(llama, prefill_chunk=64).prefill(embeds, progress=lambda *call: calls.append(call))
    assert calls == [(50, 200), (100, 200), (150, 200), (200, 200)]


def test_no_chunk_of_the_prompt_is_a_decode_step(llama, embeds):
    """Not even where all but one token fill whole chunks."""
    decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=64), prefill_chunk=64)
    decoder.prefill(embeds[:, :129])
    assert decoder.counters.steps == 0
    assert decoder.length == 129


@pytest.mark.parametrize("attention", [{}, {"combine": "share"}, {"score": "quest"}, {"score": "second_moment"}])
def test_the_static_step_reads_nothing_on_the_host(llama, attention, monkeypatch):
    """Tensors without data on a CUDA device: reading one, or mixing it with one of the CPU, would raise."""
    monkeypatch.setattr(DecodeStep, "fetch", lambda _: None)  # the way to the host, which needs a device
    with FakeTensorMode(), torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(llama.config, dtype=torch.bfloat16)
        decoder = GreedyDecoder(model, SparseAttentionConfig(budget=64, backend="torch", **attention), capture=False)
        decoder.prefill(torch.randn(1, PROMPT, 90, dtype=torch.bfloat16))
        with torch.no_grad(), sparse_attention(model):
            decoder.step.run_static(sparse=False)
            decoder.step.run_static(sparse=True)
