"""Pairs of what a listener heard and what was said, from recordings with exact texts.

Recordings are heard as at inference, in windows that end in quiet moments, and cut where listener and text agree on the
words at both sides of an utterance's end. A stretch of which too few words were heard is left out: its text may be
another. Readings after the first one hear the speech at another tempo and through noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from unique_asr.models.listening_llm import HeardWord, WhisperListener
from unique_asr.training.augment import AugmentConfig, Perturbation, add_noise
from unique_asr.training.corpus import SAMPLE_RATE, Source, TrainingUtterance
from unique_asr.training.heard_text import HeardPart
from unique_asr.training.listening import MAX_PAUSE, cut_stretch

PAUSE_SECONDS = 0.3, 0.9  # put between utterances that follow each other without any, as synthetic ones do
BLOCK_SECONDS = 1200.0  # of speech that is heard in one go


def hear_pairs(
    listener: WhisperListener,
    sources: Sequence[Source],
    readings: int = 1,
    augment: AugmentConfig | None = None,
    batch: int = 16,
    min_match: float = 0.8,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Iterator[tuple[str, list[HeardPart]]]:
    """Hear recordings.

    Args:
        readings: times that each is heard; all but the first are augmented.
        augment: how; its masks are not used.
        batch: windows at a time.
        min_match: share of the words of a stretch that has to be heard.

    Yields:
        The name of the source, and consecutive parts.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    began, seconds, words, right, kept = time.monotonic(), 0.0, 0, 0, 0
    for source in sources:
        for stretch in (each for recording in source.recordings for each in cut_stretches(recording)):
            for reading in range(readings):
                samples, speed = join(source, stretch, random), 1.0
                if reading:
                    samples, speed = disturb(samples, augment or AugmentConfig(), generator)
                heard: list[HeardWord] = []
                for state in listener.listen([samples], batch):
                    heard = state.words
                parts, matched, count = cut_stretch(stretch, [word.text for word in heard])
                words, right, seconds = words + count, right + matched, seconds + len(samples) / SAMPLE_RATE
                if parts and matched >= min_match * count:
                    kept += 1
                    yield (
                        source.name,
                        [
                            HeardPart(
                                tuple(heard[part.start : part.stop]),
                                part.text,
                                sum(each.seconds for each in stretch[part.first : part.end]) / speed,
                            )
                            for part in parts
                        ],
                    )
        spent = time.monotonic() - began
        log(f"{source.name}: {seconds / 3600:.2f} h so far in {spent:.0f} s, {right / max(words, 1):.1%} of the words")
    log(f"{kept} stretches kept")


def cut_stretches(recording: Sequence[TrainingUtterance]) -> Iterator[list[TrainingUtterance]]:
    """Cut a recording where a pause may hold speech without a text, and into blocks of some minutes."""
    stretch: list[TrainingUtterance] = []
    for utterance in recording:
        apart = stretch and utterance.start - stretch[-1].end > MAX_PAUSE * SAMPLE_RATE
        long = stretch and utterance.end - stretch[0].start > BLOCK_SECONDS * SAMPLE_RATE
        if apart or long:
            yield stretch
            stretch = []
        stretch.append(utterance)
    if stretch:
        yield stretch


def join(source: Source, stretch: Sequence[TrainingUtterance], random: np.random.Generator) -> np.ndarray:
    """Join the audio of a stretch, float32 [N], with pauses where there are none."""
    pieces = []
    for index, utterance in enumerate(stretch):
        last = index + 1 == len(stretch)
        end = utterance.end if last else max(stretch[index + 1].start, utterance.end)
        pieces.append(source.audio[utterance.start : end].cpu().numpy())
        if not last and end - utterance.end < 0.05 * SAMPLE_RATE:
            pieces.append(np.zeros(round(random.uniform(*PAUSE_SECONDS) * SAMPLE_RATE), np.int16))
    return np.concatenate(pieces).astype(np.float32) / 32768


def disturb(samples: np.ndarray, augment: AugmentConfig, generator: torch.Generator) -> tuple[np.ndarray, float]:
    """Change tempo and pitch together, and the level, and add noise; return the samples [N'] and the speed."""
    drawn = Perturbation.draw(1, augment, generator)
    speed = float(drawn.speed)
    places = np.arange(0, len(samples) - 1, speed, dtype=np.float64)
    changed = torch.from_numpy(np.interp(places, np.arange(len(samples)), samples).astype(np.float32))
    noisy = add_noise(changed[None], torch.tensor([len(changed)]), drawn.gain, drawn.noise, drawn.low)
    return noisy[0].clamp(-1, 1).numpy(), speed
