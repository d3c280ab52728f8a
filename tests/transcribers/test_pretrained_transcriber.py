"""Recordings beyond a model's limit, early stops and loops, with scripted answers to a tiny model's requests."""

import json

import numpy as np
import pytest
import speech_models
import transformers
from simulated_speech import speech

import unique_asr
from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.decoding.engine import PENDING
from unique_asr.longform.configuration import TimestampedConfig
from unique_asr.longform.page_reads import PageReads
from unique_asr.models.languages import LANGUAGES
from unique_asr.models.pretrained import KNOWN_MODELS
from unique_asr.transcribers import check_language, make_transcriber
from unique_asr.transcribers.base import PipelineError
from unique_asr.transcribers.batch import transcribe_side_by_side
from unique_asr.transcribers.pretrained import PretrainedTranscriber
from unique_asr.transcript import Unfinished

RATE = 16000
QUICK = TimestampedConfig(rest_seconds=2.0, retry_seconds=6.0, cut_seconds=3.0)


class Script:
    """Stands in for the decoder: writes the next of `answers`, and `reasons` says how each ends."""

    def __init__(self, tokenizer, answers, reasons=()):
        self.tokenizer, self.answers, self.reasons = tokenizer, list(answers), list(reasons)
        self.counters, self.step, self.cache = SparsityCounters(), self, self
        self.capacity, self.length, self.log_probs, self.stop_reason = 1 << 30, 0, [], None
        self.cache_bytes, self.engine_seconds = 0, {}
        self.prompts = []

    def reserve(self, tokens):
        pass

    def reset(self):
        self.length = 0

    def prefill(self, embeds, progress=None):
        self.prompts.append(embeds.shape[1])

    def tokens(self, budget, stop_ids):
        self.log_probs = []
        for token in self.tokenizer(self.answers.pop(0))["input_ids"][:budget]:
            self.log_probs.append(-0.1)
            yield token
        self.stop_reason = self.reasons.pop(0) if self.reasons else "end"


class ScriptedEngine:
    """Stands in for a `BatchEngine`, each sequence with its own answers; a token comes at every other step."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, [list(each) for each in answers]

    def new_sequence(self):
        return ScriptedSequence(self.tokenizer, self.answers.pop(0))

    def step(self):
        pass

    def remove(self, sequence):
        pass


class ScriptedSequence(Script):
    def __init__(self, tokenizer, answers):
        super().__init__(tokenizer, answers)
        self.engine_seconds = {"prefill": 1.0, "decode": 2.0}

    def tokens(self, budget, stop_ids):
        for token in super().tokens(budget, stop_ids):
            yield PENDING
            yield token


@pytest.fixture(scope="module")
def models():
    return Models()


class Models(dict):
    """Made when they are asked for; a transformers that does not know one skips the test."""

    def __missing__(self, name):
        if not hasattr(transformers, KNOWN_MODELS[name].model_class):
            pytest.skip(f"this transformers does not know {name}")
        self[name] = speech_models.make(name)
        return self[name]


def transcribe(models, name, samples, answers, reasons=(), limit=None, prompt=None):
    model, processor = models[name]
    transcriber = PretrainedTranscriber((model, processor), max_pass_seconds=limit, passes=QUICK)
    transcriber.decoder = Script(processor.tokenizer, answers, reasons)
    asked = []
    request = transcriber.embed_prompt
    transcriber.embed_prompt = lambda samples, prompt, *more: (
        asked.append((len(samples) / RATE, prompt)) or request(samples, prompt, *more)
    )
    segments, info = transcriber.transcribe(samples, prompt=prompt)
    return list(segments), info, asked


def test_segments_of_one_pass(models):
    answer = "[0.00][S01]Good morning.[1.50][1.60][S02]So?[11.80]"
    segments, info, asked = transcribe(models, "moss_transcribe_diarize", speech(12), [answer])
    assert [(each.start, each.end, each.text, each.speaker) for each in segments] == [
        (0.0, 1.5, "Good morning.", "S01"),
        (1.6, 11.8, "So?", "S02"),
    ]
    assert [each.id for each in segments] == [0, 1]
    assert segments[0].confidence == pytest.approx(np.exp(-0.1))
    assert (info.stop_reason, info.passes, info.warnings) == ("end", 1, [])
    assert info.coverage == pytest.approx(1, abs=0.03)
    assert asked == [(12.0, None)]


def test_a_long_recording_is_cut_in_a_pause_and_times_go_on(models):
    answers = ["[0.00][S01]One.[9.00]", "[0.00][S01]Two.[8.00]"]
    samples = speech(18, pauses=[(9.2, 9.8)])
    segments, info, asked = transcribe(models, "moss_transcribe_diarize", samples, answers, limit=10)
    assert asked[0][0] + asked[1][0] == pytest.approx(18)
    assert 9.2 < asked[0][0] < 9.8
    assert [each.start for each in segments] == pytest.approx([0, asked[0][0]])
    assert [each.speaker for each in segments] == ["S01", "P2-S01"]
    assert any("P2-S01" in warning for warning in info.warnings)


@pytest.mark.parametrize("reason", ["end", "length"])
def test_decoding_goes_on_after_an_early_stop(models, reason):
    answers = ["[0.00][S01]One.[4.00][4.10][S01]And", "[0.00][S01]Two.[7.90]"]
    segments, info, asked = transcribe(models, "moss_transcribe_diarize", speech(12), answers, [reason])
    if reason == "end":  # a tail without an end that the model ended by itself belongs to the rest
        assert [each.text for each in segments] == ["One.", "And"]
        return
    assert [(each.start, each.text) for each in segments] == [(0.0, "One."), (4.0, "Two.")]
    assert asked == [(12.0, None), (8.0, None)]
    assert "went on from there" in info.warnings[0]
    assert info.coverage > 0.9


def test_a_loop_is_left_and_decoding_goes_on(models):
    loop = "[0.00][S01]One.[4.00][4.10][S01]" + "yes " * 400
    segments, info, asked = transcribe(models, "moss_transcribe_diarize", speech(12), [loop, "[0][S01]Two.[7.9]"])
    assert [each.text for each in segments] == ["One.", "Two."]
    assert asked[1] == (8.0, None)
    assert "repeat" in info.warnings[0]


def test_audio_without_an_answer_is_tried_again_and_reported(models):
    segments, info, asked = transcribe(models, "moss_transcribe_diarize", speech(12), [""] * 4)
    assert segments == []
    assert [seconds for seconds, _ in asked][:2] == pytest.approx([12, 6], abs=1)
    assert sum(seconds for seconds, _ in asked[1:]) == pytest.approx(12)
    assert info.coverage == 0
    assert sum("missing" in warning for warning in info.warnings) == len(asked) - 1


def test_text_without_times_is_spread_over_the_speech(models):
    samples = speech(12, pauses=[(4, 8)])
    segments, info, _ = transcribe(models, "qwen3_asr", samples, ["language English<asr_text>One two. Six ten."])
    assert [each.text for each in segments] == ["One two.", "Six ten."]
    assert segments[0].start == pytest.approx(0, abs=0.1)
    assert 3.5 < segments[0].end < 8.2
    assert segments[1].end == pytest.approx(12, abs=0.1)
    assert "estimates" in info.warnings[0]


def test_text_without_times_that_loops_is_read_again_in_halves(models):
    answers = ["It " + "rained " * 400, "One.", "Two."]
    segments, info, asked = transcribe(models, "qwen3_asr", speech(12), answers)
    assert [each.text for each in segments] == ["One.", "Two."]
    assert [seconds for seconds, _ in asked] == pytest.approx([12, 6, 6], abs=1.1)
    assert "shorter passes" in info.warnings[0]


def test_the_text_before_is_carried_where_the_model_takes_it(models):
    _, _, asked = transcribe(models, "qwen3_asr", speech(18), ["One.", "Two."], limit=10, prompt="Names: Ann.")
    assert [prompt for _, prompt in asked] == ["Names: Ann.", "Names: Ann. One."]
    _, _, asked = transcribe(models, "moss_transcribe_diarize", speech(18), ["[0][S1]One.[9]"] * 2, limit=10)
    assert [prompt for _, prompt in asked] == [None, None]


def test_transcribe_takes_the_model_like_any_other(models, tmp_path):
    model, processor = models["moss_transcribe_diarize"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    segments, info = unique_asr.transcribe(speech(3), tmp_path, budget=64, device="cpu", max_pass_seconds=2)
    list(segments)
    assert info.model == str(tmp_path)
    assert info.passes > 1
    assert info.sparsity["sparse_steps"] > 0
    assert isinstance(make_transcriber((model, processor), parallel_passes=8), PretrainedTranscriber)


def test_recordings_side_by_side_with_loops_and_passes(models):
    """Each with the answers that it gets alone, whatever the others need."""
    model, processor = models["qwen3_asr"]
    loops = "It " + "rained " * 400
    answers = [["One.", "Two."], [loops, "Three.", "Four."], ["Five."]]
    audios = [speech(18), speech(9), speech(5)]
    transcriber = PretrainedTranscriber((model, processor), max_pass_seconds=10, passes=QUICK)
    transcriber.make_engine = lambda: ScriptedEngine(processor.tokenizer, answers)
    results = dict(transcribe_side_by_side(transcriber, audios, 3))
    assert [results[index].text for index in range(3)] == ["One. Two.", "Three. Four.", "Five."]
    assert [results[index].info.passes for index in range(3)] == [2, 3, 1]
    assert "shorter passes" in results[1].info.warnings[0]


def test_another_attention_over_the_same_model(models):
    sparse = PretrainedTranscriber(models["qwen3_asr"], budget=64)
    dense = sparse.with_attention(SparseAttentionConfig(budget=None))
    assert dense.model is sparse.model
    for transcriber, budget in ((sparse, 64), (dense, None)):
        _, info = transcriber.transcribe(speech(1))
        assert info.attention["budget"] == transcriber.decoder.cache.attention.budget == budget


def test_a_broken_off_transcription_goes_on_with_its_pass(models):
    model, processor = models["qwen3_asr"]
    answers, states = ["One.", "Two.", "Three."], []

    def transcriber(answers):
        made = PretrainedTranscriber((model, processor), max_pass_seconds=10, passes=QUICK)
        made.decoder = Script(processor.tokenizer, answers)
        return made

    segments, whole = transcriber(answers).transcribe(speech(27), on_pass=states.append)
    segments = list(segments)
    assert len(states) == 3
    state = json.loads(json.dumps(states[1]))
    rest, info = transcriber(answers[1:]).transcribe(speech(27), unfinished=Unfinished(segments[:1], state))
    assert list(rest) == segments[1:]
    assert (info.passes, info.coverage, info.warnings) == (whole.passes, whole.coverage, whole.warnings)


def test_page_reads_need_times_of_words(models):
    with pytest.raises(PipelineError, match="no times of words"):
        PretrainedTranscriber(models["qwen3_asr"]).transcribe(speech(1), reads=PageReads())


def test_the_language_is_part_of_the_request(models):
    """As transformers' own processors write it."""
    _, processor = models["qwen3_asr"]
    request = KNOWN_MODELS["qwen3_asr"].request
    texts = [
        processor.tokenizer.decode(request(processor, speech(1), None, each)["input_ids"][0]) for each in LANGUAGES
    ]
    for text, language in zip(texts, LANGUAGES.values(), strict=True):
        assert text.endswith(f"language {language}<asr_text>")
    assert "language" not in processor.tokenizer.decode(request(processor, speech(1), None)["input_ids"][0])


def test_every_language_of_fun_asr_is_one_of_its_processor(models, monkeypatch):
    _, processor = models["fun_asr_nano"]
    asked = []
    monkeypatch.setattr(processor, "apply_chat_template", lambda conversations, **_: asked.append(conversations[0]))
    known_model = KNOWN_MODELS["fun_asr_nano"]
    for language in known_model.languages:
        known_model.request(processor, speech(1), None, language)
    told = [part["language"] for (message,) in asked for part in message["content"] if part["type"] == "language"]
    assert told == ["英文", "日文", "中文"]


@pytest.mark.parametrize("name", list(KNOWN_MODELS))
def test_the_language_reaches_the_model_or_is_refused(models, name, monkeypatch):
    transcriber = PretrainedTranscriber(models[name])
    taken = KNOWN_MODELS[name].languages
    for language in ("French", "Klingon"):
        if language[:2].lower() in taken:
            continue
        with pytest.raises(ValueError, match=f"language={language}: model=.* leave language out") as error:
            transcriber.transcribe(speech(1), language=language)
        assert "\n" not in str(error.value)
    if taken:
        asked = []
        monkeypatch.setattr(transcriber, "embed_prompt", lambda *arguments: asked.append(arguments[2]))
        segments, info = transcriber.transcribe(speech(1), language="English")
        assert info.settings["language"] == "en"
        with pytest.raises(AttributeError):  # for want of embeddings
            list(segments)
        assert asked == ["en"]


@pytest.mark.parametrize("name", list(KNOWN_MODELS))
def test_hotwords_reach_the_model_or_are_refused(models, name, monkeypatch):
    """As keywords of the request where it has them, else beside its prompt, where that is context."""
    model, processor = models[name]
    transcriber, how = PretrainedTranscriber((model, processor)), KNOWN_MODELS[name].hotwords
    if how is None:
        with pytest.raises(ValueError, match=r"hotwords=Ada: model=.* cannot be told words"):
            transcriber.transcribe(speech(1), hotwords="Ada")
        return
    asked, request = [], processor.apply_transcription_request
    monkeypatch.setattr(processor, "apply_transcription_request", lambda **told: asked.append(told) or request(**told))
    segments, info = transcriber.transcribe(speech(1), prompt="A talk.", hotwords=" Ada,Charles  Babbage,, ")
    next(segments, None)
    assert info.settings["hotwords"] == "Ada, Charles Babbage"
    assert info.settings["prompt"] == "A talk."
    words = {"keywords": ["Ada", "Charles Babbage"], "prompt": "A talk."}
    assert words | asked[0] == asked[0] if how == "keywords" else asked[0]["prompt"] == "A talk., Ada, Charles Babbage"


def test_voxtral_is_told_a_code(models):
    _, processor = models["voxtral"]
    KNOWN_MODELS["voxtral"].request(processor, speech(1), None, "fr")
    assert processor.language == "fr"


def test_a_language_is_checked_before_the_model_is_loaded(models, tmp_path, monkeypatch):
    model, _ = models["moss_transcribe_diarize"]
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("unique_asr.transcribers.pretrained.load", None)
    for call in (
        unique_asr.transcribe,
        lambda audio, *rest, **options: unique_asr.transcribe_batch([audio], *rest, **options),
    ):
        with pytest.raises(ValueError, match=r"cannot be told a language; leave language out"):
            call(speech(1), tmp_path, language="en")
    assert check_language("fr", str(tmp_path / "none")) == "fr"  # loading says that there is none
    assert check_language("", tmp_path) is None


def test_a_pass_beside_others_counts_their_cache_as_room(models, monkeypatch):
    model, processor = models["qwen3_asr"]
    transcriber = PretrainedTranscriber((model, processor), attention="dense")
    _, info = transcriber.transcribe(speech(5))
    sequence = transcriber.make_engine().new_sequence()
    monkeypatch.setattr("unique_asr.transcribers.pretrained.measure_free_memory", lambda device: 1000)
    with pytest.raises(PipelineError, match=r"free on cpu; try max_pass_seconds="):
        transcriber._check_memory(1000, 5, info, sequence)
    monkeypatch.setattr(type(sequence), "cache_bytes", 1 << 40)
    transcriber._check_memory(1000, 5, info, sequence)


def test_silence_has_no_text(models):
    segments, info, asked = transcribe(models, "qwen3_asr", np.zeros(RATE * 5, np.float32), [])
    assert (segments, asked) == ([], [])
    assert (info.stop_reason, info.coverage) == ("silence", 1.0)


def test_too_little_memory_is_said_before_decoding(models, monkeypatch):
    monkeypatch.setattr("unique_asr.transcribers.pretrained.measure_free_memory", lambda device: 1000)
    model, processor = models["qwen3_asr"]
    segments, _ = PretrainedTranscriber((model, processor)).transcribe(speech(5))
    with pytest.raises(PipelineError, match=r"free on cpu; try max_pass_seconds="):
        next(segments)


def test_recordings_are_encoded_pass_by_pass(models):
    with pytest.raises(PipelineError, match="encodes each pass by itself"):
        PretrainedTranscriber(models["qwen3_asr"]).transcribe_encoded(None)
