"""Silence in the place of what is not speech, found by Silero's voice activity detection. Off unless asked for.

What is dropped becomes silence, so every time in the transcript stays that of the recording; the package `silero-vad`
has its weights inside.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec

import numpy as np
import torch

FRAME = 512  # samples that the detector judges at once: 32 ms at 16 kHz
THRESHOLD = 0.3  # probability of speech; low, because a missing word is worse than a noise that is kept
MARGIN = 16  # frames that are kept on both sides of speech: half a second


def is_installed() -> bool:
    """Whether the package silero-vad is there."""
    return find_spec("silero_vad") is not None


class SpeechFilter:
    """Filter of samples: those far from any speech become zeros; `dropped` counts them.

        filter = SpeechFilter()
        for samples in filter(stream): ...
        print(filter.dropped)

    Args:
        probability: of speech in a frame, [FRAME] float32 at 16 kHz; by default Silero's.
    """

    def __init__(self, probability: Callable[[np.ndarray], float] | None = None) -> None:
        self.probability = probability or load_silero()
        self.dropped = 0

    def __call__(self, stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the samples of a stream of arrays, as many as come in; a margin of MARGIN frames is held back."""
        waiting: deque[np.ndarray] = deque()
        index, last = -1, -np.inf  # of the frame just heard, and of the last one with speech
        for index, frame in enumerate(_cut_frames(stream)):
            heard = np.pad(frame, (0, FRAME - len(frame)))
            last = index if self.probability(heard) > THRESHOLD else last
            waiting.append(frame)
            if len(waiting) > MARGIN:
                yield self._pass_or_silence(waiting.popleft(), keep=last >= index - 2 * MARGIN)
        for place in range(index - len(waiting) + 1, index + 1):
            yield self._pass_or_silence(waiting.popleft(), keep=last >= place - MARGIN)

    def _pass_or_silence(self, frame: np.ndarray, keep: bool) -> np.ndarray:
        if keep:
            return frame
        self.dropped += len(frame)
        return np.zeros_like(frame)


def load_silero() -> Callable[[np.ndarray], float]:
    """Return Silero's probability of speech, which depends on the frames before: one for each recording."""
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)  # which the package sets to 1 when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the format of its weights
        model = load_silero_vad()

    def probability(frame: np.ndarray) -> float:
        with torch.no_grad():
            return model(torch.from_numpy(frame), 16_000).item()

    return probability


def _cut_frames(stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield arrays of FRAME samples, the last one shorter."""
    rest = np.empty(0, np.float32)
    for samples in stream:
        joined = np.concatenate([rest, samples])
        full = len(joined) - len(joined) % FRAME
        yield from joined[:full].reshape(-1, FRAME)
        rest = joined[full:]
    if len(rest):
        yield rest
