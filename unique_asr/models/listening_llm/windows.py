"""Cutting a recording into windows that end in its quietest moments, where a cut goes through no word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

SAMPLE_RATE = 16_000  # Hz
FRAME_SECONDS = 0.02  # of a measurement of loudness
QUIET_SECONDS = 0.3  # over which loudness is averaged


def cut_windows(
    blocks: Iterable[np.ndarray], window_seconds: float, search_seconds: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Cut a recording into consecutive windows, without overlap.

    Args:
        blocks: float32 samples [n] at 16 kHz, of any length.
        window_seconds: the longest window.
        search_seconds: a window ends in the quietest moment of so many seconds before its longest end.

    Yields:
        When a window begins, in seconds, and its samples [n]; an hour is never in memory at once.
    """
    longest, search = round(window_seconds * SAMPLE_RATE), round(search_seconds * SAMPLE_RATE)
    buffer, first = np.zeros(0, np.float32), 0
    for block in blocks:
        buffer = np.concatenate([buffer, np.asarray(block, np.float32)])
        while len(buffer) > longest:
            end = longest - search + find_quietest(buffer[longest - search : longest])
            yield first / SAMPLE_RATE, buffer[:end]
            buffer, first = buffer[end:], first + end
    if len(buffer):
        yield first / SAMPLE_RATE, buffer


def find_quietest(samples: np.ndarray) -> int:
    """Find the sample in the middle of the quietest `QUIET_SECONDS` of some samples [n]; the last such of several."""
    frame = round(FRAME_SECONDS * SAMPLE_RATE)
    size = min(round(QUIET_SECONDS / FRAME_SECONDS), len(samples) // frame)
    if size < 1:
        return len(samples)
    frames = samples[: len(samples) // frame * frame].reshape(-1, frame)
    loudness = np.convolve(np.einsum("fs,fs->f", frames, frames), np.ones(size), mode="valid")
    quietest = len(loudness) - 1 - int(np.argmin(loudness[::-1]))
    return round((quietest + size / 2) * frame)
