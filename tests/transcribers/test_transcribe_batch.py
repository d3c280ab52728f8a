"""Recordings side by side: what each of them would get alone, whatever is decoded beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_speech_llm_transcriber import noise
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

import unique_asr
from unique_asr.attention import PagedCache, SparseAttentionConfig
from unique_asr.attention.cache import is_fully_paged
from unique_asr.attention.paged_layer import HEADROOM
from unique_asr.decoding import batch as batch_decoding
from unique_asr.decoding.batch import BatchDecoder
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.decoding.memory import decoding_memory
from unique_asr.longform.passes import PENDING, LongformConfig
from unique_asr.transcribers import batch
from unique_asr.transcribers import speech_llm as pipeline
from unique_asr.transcribers.batch import interleave, side_by_side, transcribe_batch
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

DATA = Path(__file__).parents[1] / "data"


def alone(model, attention, prompt, count):
    decoder = GreedyDecoder(model, attention, capacity=1024, prefill_chunk=16)
    decoder.prefill(prompt)
    return list(decoder.tokens(count)), decoder.log_probs


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, 90, generator=generator) for length in lengths]


def together(rows, prompts, counts, beside, stop_ids=()):
    """What every prompt gets, (tokens, row), each begun as soon as fewer than `beside` others are at work."""
    waiting, running, results = list(range(len(prompts))), {}, {}
    while waiting or running:
        while waiting and len(running) < beside:
            index, row = waiting.pop(0), rows.row()
            row.prefill(prompts[index])
            running[index], results[index] = row.tokens(counts[index], stop_ids), ([], row)
        for index, tokens in list(running.items()):
            written, row = results[index]
            for token in tokens:
                if token == PENDING:
                    break
                written.append(token)
            else:
                rows.remove(row)
                del running[index]
        if running:
            rows.step()
    return [results[index] for index in range(len(prompts))]


def test_only_models_with_full_attention_in_every_layer_have_static_steps():
    sizes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    assert is_fully_paged(LlamaConfig())
    assert not is_fully_paged(Gemma3TextConfig(**sizes))


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
    prompts, rows = prompts_of(60, 47), BatchDecoder(model, prefill_chunk=16)
    expected = [alone(model, None, prompt, 8)[0] for prompt in prompts]
    for _ in range(2):
        assert [tokens for tokens, _ in together(rows, prompts, [8, 8], 2)] == expected


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [None, 512])
def test_rows_of_any_length_write_what_they_write_alone(llama, static, budget):
    """Waves of three rows, and of fewer."""
    attention = SparseAttentionConfig(budget=budget)
    prompts, counts = prompts_of(40, 7, 23, 64, 33), (9, 30, 12, 5, 20)
    rows = BatchDecoder(llama, attention, prefill_chunk=16, static=static)
    for (tokens, row), prompt, count in zip(together(rows, prompts, counts, 3), prompts, counts, strict=True):
        expected, log_probs = alone(llama, attention, prompt, count)
        assert tokens == expected
        torch.testing.assert_close(row.log_probs, log_probs, rtol=1e-3, atol=1e-4)
        assert row.counters.steps == count - 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [None, 4096])
def test_a_pass_begins_beside_those_under_way(llama, static, budget, monkeypatch):
    """In the place of one that ended, whether its prompt is longer than all that is there or most of that is empty."""
    generator = torch.Generator().manual_seed(2)
    lengths = [20, 9, 30, *torch.randint(5, 150, (20,), generator=generator).tolist(), 12, 12, 12, 12, 12]
    counts = [3, 9, 30, *torch.randint(2, 60, (20,), generator=generator).tolist(), 5, 30, 60, 90, 120]
    prompts, attention = prompts_of(*lengths), SparseAttentionConfig(budget=budget)
    rows = BatchDecoder(llama, attention, prefill_chunk=16, static=static)
    reads, moves, widths = together_read(rows, monkeypatch), [], set()
    move, resize = PagedCache.shift, BatchDecoder._resize
    monkeypatch.setattr(PagedCache, "shift", lambda cache, by: (moves.append(by), move(cache, by)))
    monkeypatch.setattr(
        BatchDecoder, "_resize", lambda *how: (resize(*how), widths.add(len(how[0]._places)))[0]
    )  # fmt: skip
    results = together(rows, prompts, counts, 5)
    for (tokens, row), prompt, count in zip(results, prompts, counts, strict=True):
        expected, log_probs = alone(llama, attention, prompt, count)
        assert tokens == expected
        torch.testing.assert_close(row.log_probs, log_probs, rtol=1e-3, atol=1e-4)
        assert row.counters.steps == count - 1
        assert row.counters.share_of_pages_read == 1
    assert reads[0] == 5
    assert len(moves) > 10
    assert min(moves) < 0 < max(moves)
    assert len(widths) == (1 if static else 3)  # five places, two, and one
    assert rows._made.cache.length < 400  # not all that was ever written


def test_the_batch_gets_wider_where_more_rows_come(llama):
    prompts = prompts_of(40, 7, 64)
    rows, written = BatchDecoder(llama, prefill_chunk=16), []
    for prompt in prompts:
        row = rows.row()
        row.prefill(prompt)
        written.append(([], row.tokens(30)))
        for _ in range(4):
            for tokens, source in written:
                tokens.extend(token for token in iter(lambda source=source: next(source), PENDING))
            rows.step()
    assert len(rows._places) == 3
    for (tokens, _), prompt in zip(written, prompts, strict=True):
        assert len(tokens) >= 3
        assert tokens == alone(llama, None, prompt, 30)[0][: len(tokens)]


def test_captured_steps_are_held_up_for_several_rows_only(llama, monkeypatch):
    prompts, counts = prompts_of(*[20] * 16), [*range(5, 13), *[9] * 8]
    monkeypatch.setattr(batch_decoding, "PATIENCE", 4)
    reads = {}
    for static in (False, True):
        rows = BatchDecoder(llama, static=static)
        reads[static] = together_read(rows, monkeypatch)
        together(rows, prompts, counts, 8)
    assert reads[False][:4] == [8, 1, 1, 1]
    assert reads[True][:3] == [8, 2, 2]


def test_a_stop_id_ends_its_row_only(llama):
    prompts = prompts_of(12, 30)
    first, second = (alone(llama, None, prompt, 16)[0] for prompt in prompts)
    stop = next(token for token in first[1:] if token not in second)
    written = [tokens for tokens, _ in together(BatchDecoder(llama), prompts, (16, 16), 2, {stop})]
    assert written == [first[: first.index(stop)], second]


def described(transcript):
    """All but what rounding may touch."""
    segments = [(each.text, each.start, each.end, [word.text for word in each.words]) for each in transcript.segments]
    info = transcript.info
    return segments, info.stop_reason, info.coverage, info.passes, info.warnings, info.duration


@pytest.mark.parametrize("size", [2, 3, 8])
def test_transcripts_are_those_of_one_by_one(tiny, size):
    """Several passes a recording, of which some are tried again: every recording goes its own way."""
    config = LongformConfig(max_pass_seconds=3.0, retry_pass_seconds=1.0, skip_seconds=1.0, min_progress_seconds=0.1)
    audios = [noise(seconds) for seconds in (7, 2, 5, 9, 3)]
    transcriber = SpeechLLMTranscriber(tiny, longform=config, parallel_passes=1)
    expected = dict(side_by_side(transcriber, audios, 1))
    results = dict(side_by_side(transcriber, audios, size))
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert max(transcript.info.passes for transcript in results.values()) > 3
    for index, transcript in results.items():
        assert described(transcript) == described(expected[index])
        assert transcript.info.timings["decode"] > 0
        assert transcript.info.sparsity["steps"] == expected[index].info.sparsity["steps"]


def test_a_recording_that_fails_does_not_stop_the_others(tiny):
    audios = ["no such file.wav", noise(2), np.zeros(0, np.float32), noise(3), DATA / "manifest.jsonl"]
    heard, stages = [], set()
    results = dict(
        transcribe_batch(
            audios,
            tiny,
            batch=2,
            on_segment=lambda index, segment: heard.append(index),
            progress=lambda index, stage, done, total: stages.add((index, stage)),
        )
    )
    assert sorted(results) == [0, 1, 2, 3, 4]
    for index, message in ((0, "no such file"), (2, "empty"), (4, "not audio or video")):
        assert results[index].info.stop_reason == "error"
        assert message in results[index].info.warnings[-1]
    for index in (1, 3):
        assert results[index].info.stop_reason not in ("", "error", "interrupted")
        assert heard.count(index) == len(results[index].segments)
        assert {(index, "prefill"), (index, "decode")} <= stages
    assert results[0].info.audio == "no such file.wav"


def test_sparse_attention_beside_others(tiny):
    results = dict(side_by_side(SpeechLLMTranscriber(tiny, budget=32), [noise(6), noise(4)], 2))
    for transcript in results.values():
        assert 0 < transcript.info.sparsity["sparse_steps"] <= transcript.info.sparsity["steps"]
        assert transcript.info.sparsity["share_of_pages_read"] < 1


def test_a_transcriber_of_another_kind_goes_one_by_one(tiny, monkeypatch):
    """As adapters do: it knows nothing of rows."""
    transcriber = SpeechLLMTranscriber(tiny)

    class Other:
        def transcribe(self, audio, *, progress, **told):
            return transcriber.transcribe(audio, progress=progress, **told)

    monkeypatch.setattr("unique_asr.models.pretrained.make_transcriber", lambda *arguments, **options: Other())
    results = list(transcribe_batch([noise(2), noise(3)], batch=8))
    assert [index for index, _ in results] == [0, 1]
    assert results[1][1].segments == list(transcriber.transcribe(noise(3))[0])


def test_what_cannot_work(tiny, monkeypatch):
    with pytest.raises(ValueError, match="batch=0"):
        transcribe_batch([], tiny, batch=0)
    assert list(unique_asr.transcribe_batch([], tiny)) == []

    def fails(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(batch.BatchDecoder, "step", fails)
    for _, transcript in transcribe_batch([noise(2), noise(3), noise(2)], tiny, batch=2):
        assert transcript.info.stop_reason == "error"
        assert transcript.info.warnings[-1] == "out of memory on cpu; lower batch or max_pass_seconds"


def test_the_language_is_that_of_the_model(tiny):
    with pytest.raises(ValueError, match="language=French: model=default takes en; leave language out"):
        transcribe_batch([noise(2)], language="French")
    transcriber = SpeechLLMTranscriber(tiny)
    transcriber.languages = ("en",)
    for _, transcript in side_by_side(transcriber, [noise(2), noise(3)], 2, language="English"):
        assert transcript.info.settings["language"] == "en"


def together_read(rows, monkeypatch):
    """The number of rows whose prompts are read together, each time from now on."""
    counts, read = [], rows._read
    monkeypatch.setattr(rows, "_read", lambda some, *how: (counts.append(len(some)), read(some, *how))[1])
    return counts


def test_what_does_not_fit_beside_the_others_waits(llama, monkeypatch):
    prompts, counts = prompts_of(40, 7, 23, 64, 33), (9, 30, 12, 5, 20)
    rows = BatchDecoder(llama, SparseAttentionConfig(budget=None), prefill_chunk=16)
    two = decoding_memory(rows._shape, 64, 64 + HEADROOM, 64, rows.attention, torch.float32, 16, 2).pass_bytes
    # The cache that is there makes room for the next one.
    monkeypatch.setattr(batch_decoding, "free_memory", lambda device: two - rows.held)
    sizes = together_read(rows, monkeypatch)
    results = together(rows, prompts, counts, 4)
    assert [tokens for tokens, _ in results] == [
        alone(llama, rows.attention, prompt, count)[0] for prompt, count in zip(prompts, counts, strict=True)
    ]
    assert max(sizes) == 2
    assert rows.notice.startswith("4 recordings side by side need 0.0 GB and 0.0 GB are free on cpu: 2 at a time")

    monkeypatch.setattr(batch_decoding, "free_memory", lambda device: 0)
    del sizes[:]
    together(rows, prompts, counts, 4)
    assert set(sizes) == {1}
    monkeypatch.setattr(batch_decoding, "free_memory", lambda device: None)  # a system that does not tell
    del sizes[:]
    together(rows, prompts, counts, 4)
    assert sizes[0] == 4


@pytest.mark.parametrize("budget", [None, 512])
def test_the_estimate_for_a_wave_is_what_its_cache_takes(llama, budget):
    rows = BatchDecoder(llama, SparseAttentionConfig(budget=budget), prefill_chunk=16)
    begun = []
    for prompt in prompts_of(40, 7, 23):
        row = rows.row()
        row.prefill(prompt)
        begun.append((row, row.tokens(1200)))
        next(begun[-1][1])
    options = rows.attention, torch.float32, 16, 3
    assert rows._memory(rows.rows) == decoding_memory(rows._shape, 40, 1240, 40, *options).pass_bytes
    assert rows.held == 0
    rows.step()
    begins = decoding_memory(rows._shape, 40, 40 + HEADROOM, 40, *options)
    assert rows.held == begins.cache + begins.statistics
    assert begun[0][0].held == rows.held


def test_a_recording_that_does_not_fit_alone_is_refused_by_name(tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1000)
    results = dict(transcribe_batch([DATA / "nomads.opus", noise(2)], tiny, batch=2))
    for transcript in results.values():
        assert transcript.info.stop_reason == "error"
        assert (
            "does not fit into the 0.0 GB that are free on cpu; lower max_pass_seconds" in transcript.info.warnings[-1]
        )
    assert results[0].info.warnings[-1].startswith(str(DATA / "nomads.opus"))


def test_a_cache_that_cannot_be_had_is_gone(llama, monkeypatch):
    rows = BatchDecoder(llama)
    row = rows.row()
    row.prefill(prompts_of(40)[0])
    with monkeypatch.context() as patch:
        patch.setattr(rows, "_forward", lambda *arguments, **options: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            rows.step()
    assert rows.held == 0
    rows.remove(row)
    assert together(rows, prompts_of(12), (5,), 1)[0][0] == alone(llama, None, prompts_of(12)[0], 5)[0]


class Steps:
    """Tasks for `interleave`, and what was raised in them."""

    def __init__(self, *turns, fails=None):
        self.turns, self.fails, self.stepped, self.raised, self.begun = turns, fails, 0, {}, []

    def step(self):
        self.stepped += 1
        if self.stepped == self.fails:
            raise RuntimeError("no")

    def task(self, index, turns):
        self.begun.append(index)
        try:
            for _ in range(turns):
                yield
        except BaseException as error:
            self.raised[index] = type(error)
            if not isinstance(error, RuntimeError):
                raise
            return "failed"
        return "done"

    def tasks(self):
        return (self.task(index, turns) for index, turns in enumerate(self.turns))


def test_tasks_take_turns_and_the_next_begins_when_one_ends():
    steps = Steps(3, 1, 0, 2)
    ended = list(interleave(steps.tasks(), 2, steps.step))
    assert ended == [(1, "done"), (2, "done"), (0, "done"), (3, "done")]
    assert steps.begun == [0, 1, 2, 3]


def test_a_step_that_fails_ends_those_that_waited_for_it():
    steps = Steps(3, 3, 1, fails=2)
    assert list(interleave(steps.tasks(), 2, steps.step)) == [(0, "failed"), (1, "failed"), (2, "done")]
    assert steps.raised == {0: RuntimeError, 1: RuntimeError}


def test_whoever_stops_listening_ends_all():
    steps = Steps(3, 1, 3, 3)
    results = interleave(steps.tasks(), 3, steps.step)
    next(results)
    results.close()
    assert steps.raised == {0: GeneratorExit, 2: GeneratorExit}
    assert steps.begun == [0, 1, 2]


def test_an_interrupt_reaches_every_task():
    def interrupted():
        raise KeyboardInterrupt

    steps = Steps(3, 3, 3)
    with pytest.raises(KeyboardInterrupt):
        list(interleave(steps.tasks(), 2, interrupted))
    assert steps.raised == {0: KeyboardInterrupt, 1: KeyboardInterrupt}


def test_the_shipped_model_writes_the_same():
    transcriber = SpeechLLMTranscriber(device="cpu")
    clips = [DATA / f"{name}.opus" for name in ("nomads", "milner")]
    expected, results = (dict(side_by_side(transcriber, clips, size)) for size in (1, 2))
    for index, transcript in results.items():
        assert len(transcript.text.split()) > 15
        assert described(transcript) == described(expected[index])
