"""Speech by loudness."""

import tracemalloc

import numpy as np
import pytest
from simulated_speech import speech

from unique_asr.audio import spooled
from unique_asr.longform.speech_activity import SpeechActivity


def test_a_long_recording_does_not_fill_the_memory():
    """Ten minutes, 38 MB: what is kept of them, and what is worked on, is a few MB."""
    second = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    tracemalloc.start()
    samples = spooled(second * (index % 2) for index in range(600))
    activity = SpeechActivity(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(samples), activity.duration) == (600 * 16000, 600)
    np.testing.assert_array_equal(samples[16000:32000], second)
    assert activity.total == pytest.approx(300, abs=1)
    assert peak < 16e6


def test_speech_is_found_by_loudness():
    found = SpeechActivity(speech(10, pauses=[(2, 4), (7, 7.5)]))
    assert found.total == pytest.approx(7.5, abs=0.1)
    assert found.count_seconds(1, 5) == pytest.approx(2, abs=0.1)
    assert 2 < found.find_pause(0, 6) < 4
    assert found.spread(0, 10)(0.5) == pytest.approx(5.75, abs=0.1)
    assert SpeechActivity(np.zeros(100, np.float32)).total == 0


def test_the_next_speech():
    found = SpeechActivity(speech(10, pauses=[(0, 1), (4, 10)]))
    assert found.next_speech(0) == pytest.approx(1, abs=0.05)
    assert found.next_speech(2.5) == pytest.approx(2.5, abs=0.05)
    assert found.next_speech(5) == 10, "the end"
