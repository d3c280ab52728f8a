"""Sequences of an engine: what each of them would write alone, whatever is decoded beside it."""

import pytest
import torch
from decoded_prompts import decode_alone, decode_together, make_prompts
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from unique_asr.attention import PagedCache, SparseAttentionConfig
from unique_asr.attention.cache import HEADROOM, pages_every_layer
from unique_asr.decoding import batch
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING
from unique_asr.decoding.memory import estimate_memory


def test_only_models_with_full_attention_in_every_layer_have_static_steps():
    sizes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    assert pages_every_layer(LlamaConfig())
    assert not pages_every_layer(Gemma3TextConfig(**sizes))


def test_a_second_wave_of_a_model_with_sliding_layers(monkeypatch):
    """In chunks longer than the window; the cache of the first wave is used again, whatever a layer's reset leaves."""
    monkeypatch.setattr(DynamicSlidingWindowLayer, "reset", lambda layer: None)
    torch.manual_seed(0)
    sizes = {"hidden_size": 90, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=97, num_hidden_layers=3, head_dim=8, sliding_window=12, layer_types=kinds, **sizes
    )
    model = Gemma3ForCausalLM(config).eval()
    prompts, engine = make_prompts(60, 47), BatchEngine(model, prefill_chunk=16)
    expected = [decode_alone(model, None, prompt, 8)[0] for prompt in prompts]
    for _ in range(2):
        assert [tokens for tokens, _ in decode_together(engine, prompts, [8, 8], 2)] == expected


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [None, 512])
def test_rows_of_any_length_write_what_they_write_alone(llama, static, budget):
    """Waves of three engine, and of fewer."""
    attention = SparseAttentionConfig(budget=budget)
    prompts, counts = make_prompts(40, 7, 23, 64, 33), (9, 30, 12, 5, 20)
    engine = BatchEngine(llama, attention, prefill_chunk=16, static=static)
    for (tokens, sequence), prompt, count in zip(
        decode_together(engine, prompts, counts, 3), prompts, counts, strict=True
    ):
        expected, log_probs = decode_alone(llama, attention, prompt, count)
        assert tokens == expected
        torch.testing.assert_close(sequence.log_probs, log_probs, rtol=1e-3, atol=1e-4)
        assert sequence.counters.steps == count - 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [None, 4096])
def test_a_pass_begins_beside_those_under_way(llama, static, budget, monkeypatch):
    """In the place of one that ended, whether its prompt is longer than all that is there or most of that is empty."""
    generator = torch.Generator().manual_seed(2)
    lengths = [20, 9, 30, *torch.randint(5, 150, (20,), generator=generator).tolist(), 12, 12, 12, 12, 12]
    counts = [3, 9, 30, *torch.randint(2, 60, (20,), generator=generator).tolist(), 5, 30, 60, 90, 120]
    prompts, attention = make_prompts(*lengths), SparseAttentionConfig(budget=budget)
    engine = BatchEngine(llama, attention, prefill_chunk=16, static=static)
    reads, moves, widths = count_prompts_read(engine, monkeypatch), [], set()
    move, resize = PagedCache.move, BatchEngine._resize
    monkeypatch.setattr(PagedCache, "move", lambda cache, by: (moves.append(by), move(cache, by)))
    monkeypatch.setattr(
        BatchEngine, "_resize", lambda *how: (resize(*how), widths.add(len(how[0]._places)))[0]
    )  # fmt: skip
    results = decode_together(engine, prompts, counts, 5)
    for (tokens, sequence), prompt, count in zip(results, prompts, counts, strict=True):
        expected, log_probs = decode_alone(llama, attention, prompt, count)
        assert tokens == expected
        torch.testing.assert_close(sequence.log_probs, log_probs, rtol=1e-3, atol=1e-4)
        assert sequence.counters.steps == count - 1
        assert sequence.counters.share_of_pages_read == 1
    assert reads[0] == 5
    assert len(moves) > 10
    assert min(moves) < 0 < max(moves)
    assert len(widths) == (1 if static else 3)  # five places, two, and one
    assert engine._decode_step.cache.length < 400  # not all that was ever written


def test_the_batch_gets_wider_where_more_rows_come(llama):
    prompts = make_prompts(40, 7, 64)
    engine, written = BatchEngine(llama, prefill_chunk=16), []
    for prompt in prompts:
        sequence = engine.new_sequence()
        sequence.prefill(prompt)
        written.append(([], sequence.tokens(30)))
        for _ in range(4):
            for tokens, source in written:
                tokens.extend(token for token in iter(lambda source=source: next(source), PENDING))
            engine.step()
    assert len(engine._places) == 3
    for (tokens, _), prompt in zip(written, prompts, strict=True):
        assert len(tokens) >= 3
        assert tokens == decode_alone(llama, None, prompt, 30)[0][: len(tokens)]


def test_captured_steps_are_held_up_for_several_rows_only(llama, monkeypatch):
    prompts, counts = make_prompts(*[20] * 16), [*range(5, 13), *[9] * 8]
    monkeypatch.setattr(batch, "RUNNING_PER_WAITING", 4)
    reads = {}
    for static in (False, True):
        engine = BatchEngine(llama, static=static)
        reads[static] = count_prompts_read(engine, monkeypatch)
        decode_together(engine, prompts, counts, 8)
    assert reads[False][:4] == [8, 1, 1, 1]
    assert reads[True][:3] == [8, 2, 2]


def test_a_stop_id_ends_its_row_only(llama):
    prompts = make_prompts(12, 30)
    first, second = (decode_alone(llama, None, prompt, 16)[0] for prompt in prompts)
    stop = next(token for token in first[1:] if token not in second)
    written = [tokens for tokens, _ in decode_together(BatchEngine(llama), prompts, (16, 16), 2, {stop})]
    assert written == [first[: first.index(stop)], second]


def count_prompts_read(engine, monkeypatch):
    """The number of engine whose prompts are read together, each time from now on."""
    counts, read = [], engine._read
    monkeypatch.setattr(engine, "_read", lambda some, *how: (counts.append(len(some)), read(some, *how))[1])
    return counts


def test_what_does_not_fit_beside_the_others_waits(llama, monkeypatch):
    prompts, counts = make_prompts(40, 7, 23, 64, 33), (9, 30, 12, 5, 20)
    engine = BatchEngine(llama, SparseAttentionConfig(budget=None), prefill_chunk=16)
    two = estimate_memory(engine._shape, 64, 64 + HEADROOM, 64, engine.attention, torch.float32, 16, 2).pass_bytes
    # The cache that is there makes room for the next one.
    monkeypatch.setattr(batch, "measure_free_memory", lambda device: two - engine.cache_bytes)
    sizes = count_prompts_read(engine, monkeypatch)
    results = decode_together(engine, prompts, counts, 4)
    assert [tokens for tokens, _ in results] == [
        decode_alone(llama, engine.attention, prompt, count)[0] for prompt, count in zip(prompts, counts, strict=True)
    ]
    assert max(sizes) == 2
    assert engine.notice.startswith("4 recordings side by side need 0.0 GB and 0.0 GB are free on cpu: 2 at a time")

    monkeypatch.setattr(batch, "measure_free_memory", lambda device: 0)
    del sizes[:]
    decode_together(engine, prompts, counts, 4)
    assert set(sizes) == {1}
    monkeypatch.setattr(batch, "measure_free_memory", lambda device: None)  # a system that does not tell
    del sizes[:]
    decode_together(engine, prompts, counts, 4)
    assert sizes[0] == 4


@pytest.mark.parametrize("attention", [{"budget": None}, {"budget": 512}, {"budget": 512, "super_page_size": 64}])
def test_the_estimate_for_a_wave_is_what_its_cache_takes(llama, attention):
    engine = BatchEngine(llama, SparseAttentionConfig(**attention), prefill_chunk=16)
    begun = []
    for prompt in make_prompts(40, 7, 23):
        sequence = engine.new_sequence()
        sequence.prefill(prompt)
        begun.append((sequence, sequence.tokens(1200)))
        next(begun[-1][1])
    options = engine.attention, torch.float32, 16, 3
    assert engine._bytes_alone(engine.sequences) == estimate_memory(engine._shape, 40, 1240, 40, *options).pass_bytes
    assert engine.cache_bytes == 0
    engine.step()
    begins = estimate_memory(engine._shape, 40, 40 + HEADROOM, 40, *options)
    assert engine.cache_bytes == begins.cache + begins.statistics
    assert begun[0][0].cache_bytes == engine.cache_bytes


def test_a_cache_that_cannot_be_had_is_gone(llama, monkeypatch):
    engine = BatchEngine(llama)
    sequence = engine.new_sequence()
    sequence.prefill(make_prompts(40)[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda *arguments, **options: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert engine.cache_bytes == 0
    engine.remove(sequence)
    assert (
        decode_together(engine, make_prompts(12), (5,), 1)[0][0] == decode_alone(llama, None, make_prompts(12)[0], 5)[0]
    )
