"""`transcribe` from a file to segments and info: with scripted text, and with a tiny speech LLM of random weights."""

from pathlib import Path

import numpy as np
import pytest
from simulated_speech import Model, Processor, ScriptedDecoder, encode, noise, said, timeline

import unique_asr
from unique_asr.attention import SparseAttentionConfig
from unique_asr.longform.coverage import LongformReport
from unique_asr.pipeline import transcribe
from unique_asr.transcribers import base, speech_llm
from unique_asr.transcribers.base import PipelineError, open_audio
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

DATA = Path(__file__).parents[1] / "data"
TEXT = "A boy came up the road with a basket of bread. Nobody had opened the shutters. He knocked and waited politely!"


@pytest.fixture
def scripted(monkeypatch):
    """A (model, processor) pair that hears TEXT in any audio, and a decoder that writes it."""
    words = timeline(TEXT)
    model, processor = Model(), Processor()
    model.config.model_type = "scripted"
    monkeypatch.setattr(base, "resolve_combine", lambda attention, model: attention)  # there are no heads to ask
    model.encode = lambda blocks, processor, progress=None: [list(blocks), encode(model, processor, words)][1]

    class Decoder(ScriptedDecoder):
        capacity = 0
        counters = unique_asr.attention.SparsityCounters()

        def __init__(self, language_model, attention, capacity, prefill_chunk):
            super().__init__(processor, lambda start, end: said(words, start, end))

    monkeypatch.setattr(speech_llm, "GreedyDecoder", Decoder)
    monkeypatch.setattr(SpeechLLMTranscriber, "_check_memory", lambda *arguments: None)
    return model, processor


def test_segments_stream_and_info_is_complete_after_them(scripted):
    stages = []
    segments, info = transcribe(
        noise(10), model=scripted, progress=lambda stage, done, total: stages.append((stage, done, total))
    )
    first = next(segments)
    assert first.text == "A boy came up the road with a basket of bread."
    assert info.stop_reason == ""
    assert " ".join([first.text, *(segment.text for segment in segments)]) == TEXT
    assert (info.stop_reason, info.passes, info.coverage) == ("end", 1, 1.0)
    assert set(info.timings) == {"load", "encode", "prefill", "decode", "align"}
    assert info.attention["budget"] == 512
    assert stages[-1][0] == "decode"
    assert all(done <= total for _, done, total in stages)


def test_an_interrupted_transcription_says_so(scripted):
    segments, info = transcribe(noise(10), model=scripted)
    next(segments)
    segments.close()
    assert info.stop_reason == "interrupted"
    assert 0 < info.coverage < 1


@pytest.mark.parametrize("attention", ["unique", "dense", SparseAttentionConfig(budget=64, page_size=16)])
def test_random_weights_come_to_an_end(tiny, attention):
    stages = set()
    segments, info = transcribe(
        noise(12), model=tiny, attention=attention, budget=64, progress=lambda *state: stages.add(state[0])
    )
    for segment in segments:
        assert 0 <= segment.start <= segment.end <= info.duration
    assert info.duration == pytest.approx(12, abs=0.01)
    assert info.stop_reason
    assert info.sparsity["steps"] > 0
    assert (info.sparsity["sparse_steps"] > 0) is (attention != "dense")
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert stages >= {"prefill", "decode"}


def test_a_budget_beyond_the_context_is_dense(tiny):
    results = []
    for options in ({"attention": "dense"}, {"budget": 65536}):
        segments, info = transcribe(noise(6), model=tiny, **options)
        results.append(([segment.to_dict() for segment in segments], info.passes, info.stop_reason))
    assert results[0] == results[1]


def test_a_transcriber_serves_several_recordings(tiny):
    transcriber = SpeechLLMTranscriber(tiny, budget=64)
    alone = [list(transcriber.transcribe(noise(seconds))[0]) for seconds in (5, 3)]
    counts = []
    for seconds, expected in zip((5, 3), alone, strict=True):
        segments, info = transcriber.transcribe(noise(seconds))
        assert list(segments) == expected
        counts.append(info.sparsity["steps"])
    fresh, info = SpeechLLMTranscriber(tiny, budget=64).transcribe(noise(3))
    assert list(fresh) == alone[1]
    assert info.sparsity["steps"] == counts[1]


def test_another_attention_on_the_same_model(tiny):
    sparse = SpeechLLMTranscriber(tiny, budget=32)
    before = list(sparse.transcribe(noise(6))[0])
    dense = sparse.with_attention(SparseAttentionConfig(budget=None))
    assert dense.model is sparse.model
    segments, info = dense.transcribe(noise(6))
    assert list(segments) == list(SpeechLLMTranscriber(tiny, attention="dense").transcribe(noise(6))[0])
    assert (info.attention["budget"], info.sparsity["sparse_steps"]) == (None, 0)
    assert list(sparse.with_attention(sparse.attention).transcribe(noise(6))[0]) == before


def test_part_of_a_file_has_the_times_of_the_file(scripted):
    segments, info = transcribe(DATA / "sample.opus", model=scripted, start=20.0, end=32.0, channel=1)
    segments = list(segments)
    assert " ".join(segment.text for segment in segments) == TEXT
    assert segments[0].start == segments[0].words[0].start == pytest.approx(20.5, abs=0.2)
    assert info.settings["start"] == 20.0
    assert info.settings["channel"] == 1


def read(samples, **part):
    return np.concatenate(list(open_audio(samples, **part).blocks()))


def test_integers_are_scaled_as_in_files():
    wave = np.linspace(-0.9, 0.9, 500_000)
    for samples in (wave, wave.astype(np.float16), (wave * 2**15).astype(np.int16), (wave * 2**31).astype(np.int32)):
        assert read(samples).dtype == np.float32
        assert read(samples) == pytest.approx(wave, abs=1e-3)
    assert read((wave * 2**15).astype(">i2")) == pytest.approx(wave, abs=1e-3)
    assert read((128 + wave * 127).astype(np.uint8)) == pytest.approx(wave, abs=0.02)


def test_what_is_no_number_is_silence_as_in_files():
    samples = np.full(1000, 0.5, np.float32)
    samples[[3, 4, 5]] = np.nan, np.inf, -np.inf
    assert read(samples)[2:7].tolist() == [0.5, 0, 0, 0, 0.5]
    assert np.isnan(samples[3])  # the caller's array stays as it is


def test_part_of_an_array_has_the_times_of_the_array(scripted):
    samples = np.arange(80000, dtype=np.float32) / 80000
    np.testing.assert_array_equal(read(samples, start=1.0, end=2.5, channel=1), samples[16000:40000])
    segments, info = transcribe(np.zeros(40 * 16000, np.float32), model=scripted, start=20.0, end=32.0)
    assert next(segments).start == pytest.approx(20.5, abs=0.2)
    assert (info.settings["start"], info.settings["end"]) == (20.0, 32.0)


def test_silence_says_so(scripted):
    model = scripted[0]
    model.encode = lambda blocks, processor, progress=None: encode(model, processor, [], 5.0)
    segments, info = transcribe(np.zeros(80000, np.float32), model=scripted)
    assert list(segments) == []
    assert info.stop_reason == "silence"
    assert info.warnings == ["<array>: no speech was heard; the transcript is empty"]


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        ("no such file.wav", {}, "no such file.wav"),
        (np.zeros((2, 16000), np.float32), {}, "one channel"),
        (np.zeros(16000, np.int64), {}, "not int64"),
        (np.zeros(16000, bool), {}, "not bool"),
        (np.full(16000, 3000.0, np.float32), {}, "floats reach 3000"),
        (np.zeros(16000, np.float32), {"channel": 2}, "no channel=2, only 1"),
        (np.zeros(16000, np.float32), {"track": 2}, "no track=2, only 1"),
        (np.zeros(16000, np.float32), {"start": 1.5}, "start=1.5, but the array ends after 1.0 s"),
        (np.zeros(16000, np.float32), {"start": 0.5, "end": 0.5}, "end has to lie after start"),
        ([0.0] * 16000, {}, "not a list"),
        (np.zeros(16000, np.float32), {"attention": "quick"}, "attention=quick"),
        (np.zeros(16000, np.float32), {"budget": 100}, "multiple of the page size"),
        (np.zeros(16000, np.float32), {"max_pass_seconds": 0}, "max_pass_seconds=0"),
        (np.zeros(16000, np.float32), {"model": "no/such model"}, "no/such model"),
        (np.zeros(16000, np.float32), {"dtype": "float7", "model": "default"}, "dtype=float7"),
    ],
)
def test_errors_are_one_line_and_come_at_once(tiny, audio, options, message):
    with pytest.raises(ValueError, match=message) as error:
        transcribe(audio, **{"model": tiny, **options})
    assert "\n" not in str(error.value)


def test_the_default_model_takes_english_alone():
    with pytest.raises(ValueError, match="language=fr: model=default takes en; leave language out"):
        transcribe(np.zeros(16000, np.float32), language="fr", dtype="none")  # said before anything about loading


@pytest.mark.parametrize("language", ["en", "English"])
def test_the_language_is_recorded(tiny, language):
    transcriber = SpeechLLMTranscriber(tiny)
    with pytest.raises(ValueError, match=f"language={language}: model=SpeechLLM.* cannot be told a language"):
        transcriber.transcribe(noise(1), language=language)
    transcriber.languages = ("en",)
    assert transcriber.transcribe(noise(1), language=language)[1].settings["language"] == "en"
    assert transcriber.transcribe(noise(1))[1].settings["language"] is None


def test_audio_without_samples(tiny):
    segments, _ = transcribe(np.zeros(0, np.float32), model=tiny)
    with pytest.raises(PipelineError, match="empty"):
        next(segments)


def test_a_cache_that_does_not_fit_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(speech_llm, "measure_free_memory", lambda device: 1000)
    segments, _ = transcribe(noise(3), model=tiny)
    with pytest.raises(PipelineError, match="max_pass_seconds"):
        next(segments)


def test_what_was_encoded_is_transcribed_as_the_recording_is(tiny):
    transcriber = SpeechLLMTranscriber(tiny, budget=64)
    segments, info = transcriber.transcribe(noise(6))
    expected = list(segments)
    model, processor = tiny
    encoded, report = model.encode(iter([noise(6)]), processor), LongformReport()
    segments, again = transcriber.transcribe_encoded(encoded, report=report)
    assert list(segments) == expected
    for name in ("duration", "stop_reason", "coverage", "passes", "sparsity", "attention"):
        assert getattr(again, name) == getattr(info, name)
    assert (report.passes, report.stop_reason) == (info.passes, info.stop_reason)
    assert report.longest > 0
