"""The shipped model on real speech: what it writes, when it says it was said, and what attention it used."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioFile, load_audio
from unique_asr.evaluation.scoring import Score
from unique_asr.models import load
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

DATA = Path(__file__).parent / "data"
CLIPS = {row["audio_filepath"]: row for row in map(json.loads, (DATA / "manifest.jsonl").read_text().splitlines())}
WER_CEILING = 0.15  # of the three short clips and the sample together


@pytest.fixture(scope="module")
def default():
    return load("default", device="cpu")


@pytest.fixture(scope="module")
def transcripts(default):
    transcriber = SpeechLLMTranscriber(default, attention="unique", budget=64)
    results = {}
    for name in CLIPS:
        segments, info = transcriber.transcribe(DATA / name)
        results[name] = list(segments), info
    return results


def text_of(segments):
    return " ".join(segment.text.strip() for segment in segments)


def test_the_words_are_those_that_were_said(transcripts):
    score = Score()
    for name, (segments, _) in transcripts.items():
        score.add(CLIPS[name]["text"], text_of(segments))
    assert score.wer < WER_CEILING


def test_the_text_has_case_and_punctuation(transcripts):
    text = text_of(transcripts["sample.opus"][0])
    assert text[0].isupper()
    assert "." in text


def test_the_whole_recording_is_covered_in_time(transcripts):
    for name, (segments, info) in transcripts.items():
        assert info.coverage > 0.85, name
        assert info.stop_reason == "end", name
        times = [time for segment in segments for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times), name
        assert 0 <= times[0] < times[-1] <= CLIPS[name]["duration"] + 0.01, name


def test_words_lie_in_their_utterances(transcripts):
    """Words of the first and the last utterance of the sample, away from the joints, within a second of them."""
    utterances = CLIPS["sample.opus"]["segments"]
    segments, _ = transcripts["sample.opus"]
    written = [(word.text.strip(" .,").lower(), word) for segment in segments for word in segment.words]
    counts = Counter(text for text, _ in written)
    words = {text: word for text, word in written if counts[text] == 1}
    for utterance in (utterances[0], utterances[-1]):
        rare = [word for word in utterance["text"].split() if CLIPS["sample.opus"]["text"].split().count(word) == 1]
        found = [words[word] for word in rare if word in words]
        assert len(found) >= len(rare) / 3
        for word in found:
            assert utterance["start"] - 1 < word.start < word.end < utterance["end"] + 1, word


def test_the_sparse_steps_are_counted(transcripts):
    _, info = transcripts["sample.opus"]
    assert info.sparsity["sparse_steps"] > 0.9 * info.sparsity["steps"]
    assert info.sparsity["share_of_pages_read"] < 0.8


def test_a_budget_beyond_the_context_writes_what_dense_attention_writes(default):
    audio = load_audio(DATA / "repose.opus")
    texts = []
    for attention in ("dense", SparseAttentionConfig(budget=65536)):
        segments, info = SpeechLLMTranscriber(default, attention=attention).transcribe(audio)
        texts.append((text_of(segments), info.sparsity["sparse_steps"]))
    assert texts[0] == texts[1]
    assert texts[0][1] == 0


def test_a_batch_writes_what_single_recordings_write(default):
    model, processor = default
    clips = [load_audio(DATA / "nomads.opus"), load_audio(DATA / "milner.opus")]
    together = model.generate(
        **processor.apply_transcription_request(clips), max_new_tokens=24, do_sample=False, pad_token_id=2
    )
    for row, clip in zip(together, clips, strict=True):
        alone = model.generate(
            **processor.apply_transcription_request(clip), max_new_tokens=24, do_sample=False, pad_token_id=2
        )
        assert processor.decode(row) == processor.decode(alone[0])


def test_an_hour_takes_little_memory(default):
    """What is kept of a recording while it is decoded, besides a few windows at work: 0.14 GB an hour."""
    model, processor = default
    source = AudioFile(DATA / "nomads.opus")
    encoded = model.encode(source.blocks(), processor)
    kept = sum(value.nbytes for value in vars(encoded).values() if isinstance(value, torch.Tensor))
    assert kept / encoded.duration * 3600 < 0.15e9


def test_lower_case_on_request(default):
    transcriber = SpeechLLMTranscriber(default)
    segments, _ = transcriber.transcribe(load_audio(DATA / "nomads.opus"), prompt="lower case")
    text = text_of(segments)
    assert text == text.lower()


def test_silence_gives_no_text(default):
    segments, info = SpeechLLMTranscriber(default).transcribe(np.zeros(16_000 * 5, np.float32))
    assert list(segments) == []
    assert info.stop_reason == "silence"


def test_one_short_word_is_heard(default):
    segments, info = SpeechLLMTranscriber(default).transcribe(DATA / "yes.wav")
    assert text_of(segments).strip(" .,!") == "Yes"
    assert info.warnings == []


def test_a_language_that_it_does_not_know_is_noticed(default):
    transcriber = SpeechLLMTranscriber(default)
    transcriber.languages = ("en",)  # as of the name "default"
    segments, info = transcriber.transcribe(DATA / "german.opus")
    list(segments)
    (warning,) = [warning for warning in info.warnings if "low confidence" in warning]
    assert re.match(r"0:00-0:\d\d: low confidence \(", warning)  # to where its text ends
    assert warning.endswith("the text may not be what was said; the model knows English only")


def test_english_is_not_taken_for_another_language(transcripts):
    for name, (_, info) in transcripts.items():
        assert not any("low confidence" in warning for warning in info.warnings), name


def test_save_and_reload(default, tmp_path):
    model, processor = default
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load(tmp_path, device="cpu")
    audio = load_audio(DATA / "nomads.opus")
    expected, encoded = (m.encode([audio], p) for m, p in ((model, processor), (again, processor_again)))
    torch.testing.assert_close(encoded.embeds, expected.embeds)
    assert processor_again.tokenize_ctc("Voyaging") == processor.tokenize_ctc("Voyaging")
