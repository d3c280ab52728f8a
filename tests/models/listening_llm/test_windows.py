"""Windows end in quiet moments, lose nothing, and are never longer than they may be."""

import numpy as np
import pytest

from unique_asr.models.listening_llm.windows import SAMPLE_RATE, cut_windows, find_quietest


def speech(seconds, pauses):
    """Noise with half a second of silence from each of some times on."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)
    for pause in pauses:
        samples[round(pause * SAMPLE_RATE) : round((pause + 0.5) * SAMPLE_RATE)] = 0
    return samples


def test_windows_end_in_pauses_and_lose_nothing():
    samples = speech(75, [5, 24, 41, 48, 68])
    windows = list(cut_windows(np.split(samples, [1000, 300_000, 300_001]), 30.0, 12.0))
    np.testing.assert_array_equal(np.concatenate([window for _, window in windows]), samples)
    starts = [start for start, _ in windows]
    assert starts == pytest.approx([0.0, 24.25, 48.25], abs=0.15)
    assert all(len(window) <= 30 * SAMPLE_RATE for _, window in windows)


def test_a_short_recording_is_one_window_and_nothing_is_none():
    assert [start for start, _ in cut_windows([speech(3, [])], 30.0, 12.0)] == [0.0]
    assert list(cut_windows([np.zeros(0, np.float32)], 30.0, 12.0)) == []


def test_the_last_of_several_quiet_moments_is_taken():
    assert find_quietest(np.zeros(2 * SAMPLE_RATE, np.float32)) == pytest.approx(1.85 * SAMPLE_RATE, abs=400)
    assert find_quietest(np.zeros(10, np.float32)) == 10
