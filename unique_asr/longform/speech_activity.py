"""Speech by loudness: a rough guide to cut recordings by, and to check the text of a model that has no CTC head."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from unique_asr.audio import SAMPLE_RATE
from unique_asr.longform.planner import SpeechEvidence


class SpeechActivity(SpeechEvidence):
    """Where a recording is loud enough to be speech, in frames of 20 ms.

    Args:
        samples: [N] at 16 kHz; a memory map is read a block at a time.
    """

    FRAME = 0.02  # s
    SMOOTH = 15  # frames over which loudness is averaged to find a pause
    THRESHOLD = 0.1  # of the loudness that 5 % of the frames exceed
    SILENCE = 1e-4  # loudness, of 1, below which nothing is speech
    BLOCK = 3000  # frames that are measured at once

    is_certain = False  # quiet speech is taken for silence

    def __init__(self, samples: np.ndarray) -> None:
        size = round(self.FRAME * SAMPLE_RATE)
        step = self.BLOCK * size
        firsts = range(0, max(1, len(samples)), step)
        loudness = np.concatenate([_measure_loudness(samples[first : first + step], size) for first in firsts])
        loud = loudness > max(self.THRESHOLD * np.quantile(loudness, 0.95), self.SILENCE)
        self.duration = len(samples) / SAMPLE_RATE
        self._loud = np.flatnonzero(loud)
        self._smooth = np.convolve(loudness, np.full(self.SMOOTH, 1 / self.SMOOTH), mode="same")[: len(loudness)]
        self._before = np.concatenate([[0.0], np.cumsum(loud) * self.FRAME])  # seconds of speech before each frame

    @property
    def total(self) -> float:
        """Seconds of speech in the recording."""
        return float(self._before[-1])

    def count_seconds(self, start: float, end: float) -> float:
        """Return the seconds of speech between two times."""
        first, last = (min(max(round(time / self.FRAME), 0), len(self._before) - 1) for time in (start, end))
        return float(max(self._before[last] - self._before[first], 0.0))

    def next_speech(self, time: float) -> float:
        index = int(np.searchsorted(self._loud, round(time / self.FRAME)))
        return float(self._loud[index]) * self.FRAME if index < len(self._loud) else self.duration

    def find_pause(self, start: float, end: float) -> float:
        """Return the middle of the quietest third of a second between two times."""
        first, last = round(start / self.FRAME), round(end / self.FRAME)
        return (first + int(np.argmin(self._smooth[first:last])) + 0.5) * self.FRAME

    def spread(self, start: float, end: float) -> Callable[[float], float]:
        """Return a function from a share of the speech between two times, 0 to 1, to a time."""
        first, last = (min(round(time / self.FRAME), len(self._before) - 1) for time in (start, end))
        before = self._before[first : last + 1]
        if len(before) < 2 or before[-1] == before[0]:
            return lambda share: start + share * (end - start)
        shares = (before - before[0]) / (before[-1] - before[0])
        return lambda share: float(min(start + np.interp(share, shares, np.arange(len(shares))) * self.FRAME, end))


def _measure_loudness(samples: np.ndarray, size: int) -> np.ndarray:
    """Of every `size` samples, one frame at least; the last one is filled up with silence."""
    missing = max(1, math.ceil(len(samples) / size)) * size - len(samples)
    frames = np.pad(samples, (0, missing)).reshape(-1, size)
    return np.sqrt(np.einsum("fs,fs->f", frames, frames) / size)
