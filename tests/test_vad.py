"""Voice activity detection: what is dropped becomes silence, and is counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unique_asr import vad
from unique_asr.audio import SAMPLE_RATE, AudioError, AudioFile, load_audio
from unique_asr.pipeline import transcribe
from unique_asr.transcribers.base import open_audio
from unique_asr.vad import FRAME, MARGIN, SpeechFilter

DATA = Path(__file__).parent / "data"
FRAMES = 200


def loud(frame):
    return float(np.abs(frame).max() > 0.5)


def filtered(samples, sizes):
    """Through the filter in arrays of these lengths, again and again."""
    speech = SpeechFilter(loud)
    bounds = np.cumsum(np.resize(sizes, len(samples)))
    stream = np.split(samples, bounds[bounds < len(samples)])
    passed = list(speech(stream))
    return np.concatenate(passed) if passed else np.empty(0, np.float32), speech.dropped


@pytest.mark.parametrize("sizes", [[100_000], [320], [1, 700, 5000]])
def test_what_is_far_from_speech_is_silenced(sizes):
    samples = np.full(FRAMES * FRAME + 77, 0.1, np.float32)
    samples[60 * FRAME + 5], samples[100 * FRAME + 9] = 1.0, -1.0
    kept = np.zeros(len(samples), bool)
    for frame in (60, 100):
        kept[(frame - MARGIN) * FRAME : (frame + MARGIN + 1) * FRAME] = True
    passed, dropped = filtered(samples, sizes)
    np.testing.assert_array_equal(passed, np.where(kept, samples, 0))
    assert dropped == (~kept).sum()


@pytest.mark.parametrize("place", [0, FRAMES - 1])
def test_speech_at_an_end_keeps_its_margin(place):
    samples = np.full(FRAMES * FRAME, 0.1, np.float32)
    samples[place * FRAME] = 1.0
    passed, dropped = filtered(samples, [999])
    kept = passed.reshape(-1, FRAME)[:, 1] > 0
    assert kept.sum() == MARGIN + 1
    assert kept[place]
    assert dropped == (FRAMES - MARGIN - 1) * FRAME


@pytest.mark.parametrize("length", [0, 1, FRAME, 3 * FRAME + 1])
def test_short_audio(length):
    samples = np.full(length, 0.1, np.float32)
    passed, dropped = filtered(samples, [100])
    np.testing.assert_array_equal(passed, np.zeros(length))
    assert dropped == length


def test_a_package_that_is_missing_is_named_at_once(monkeypatch):
    monkeypatch.setattr(vad, "is_installed", lambda: False)
    for audio in (DATA / "nomads.opus", np.zeros(10, np.float32)):
        with pytest.raises(AudioError, match=r"vad=true: needs the package silero-vad") as error:
            open_audio(audio, vad=True)
        assert "\n" not in str(error.value)


@pytest.fixture
def silero():
    pytest.importorskip("silero_vad", reason="pip install silero-vad")


def test_silero_keeps_speech_and_drops_noise(silero, tmp_path):
    speech = load_audio(DATA / "nomads.opus")
    rng = np.random.default_rng(0)
    hiss = rng.normal(0, 0.02, 10 * SAMPLE_RATE).astype(np.float32)
    source = open_audio(np.concatenate([hiss, speech, hiss]), vad=True)
    threads = torch.get_num_threads()
    heard = np.concatenate(list(source.blocks(seconds=3.0)))
    assert torch.get_num_threads() == threads
    assert len(heard) == len(hiss) + len(speech) + len(hiss)
    assert 16 < source.dropped < 20.5
    middle = slice(len(hiss) + SAMPLE_RATE // 2, len(hiss) + len(speech) - SAMPLE_RATE // 2)
    assert (heard[middle] == speech[SAMPLE_RATE // 2 : -SAMPLE_RATE // 2]).all()
    assert source.warnings == [f"<array>: vad=true dropped {source.dropped:.1f} s of 29.1 s as not speech"]


def test_a_part_of_a_file(silero):
    file = AudioFile(DATA / "sample.opus", start=20.0, end=31.5, vad=True)
    blocks = list(file.blocks(seconds=5.0))
    assert [len(block) / SAMPLE_RATE for block in blocks] == [5.0, 5.0, 1.5]
    assert 0 <= file.dropped < 3
    assert "of 11.5 s" in file.warnings[-1]


def test_the_transcript_says_what_was_dropped(silero, tiny):
    rng = np.random.default_rng(0)
    hiss = rng.normal(0, 0.02, 6 * SAMPLE_RATE).astype(np.float32)
    samples = np.concatenate([hiss, load_audio(DATA / "nomads.opus")])
    segments, info = transcribe(samples, model=tiny, budget=64, vad=True)
    list(segments)
    assert info.settings["vad"] is True
    assert 4 < info.dropped < 6.5
    assert any("dropped" in warning for warning in info.warnings)
    plain, info = transcribe(samples, model=tiny, budget=64)
    list(plain)
    assert info.settings["vad"] is None
    assert info.dropped == 0.0
