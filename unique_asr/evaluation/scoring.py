"""Word error rate as the literature reports it: corpus level, after the English normaliser of Whisper.

    score = Score()
    for recording in recordings:
        score.add(recording.text, hypothesis)
    print(score)  # WER 4.71% [4.20%, 5.32%] (S 3.11% D 0.90% I 0.70%) of 9876 words

Errors of all recordings are summed before dividing, so a long recording weighs as much as its words. The normaliser is
transformers' `EnglishTextNormalizer` with the spelling map of openai-whisper 20250625 (`english_spelling.json`,
Copyright (c) 2022 OpenAI, MIT licence).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np


@functools.cache
def load_english_normalizer() -> Callable[[str], str]:
    """Load the normaliser: a function from text to text.

    It gives lower case, no punctuation, no fillers, expanded contractions, numbers as digits, and American spelling.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spelling = json.loads(resources.files(__package__).joinpath("english_spelling.json").read_text("utf-8"))
    return functools.lru_cache(4096)(EnglishTextNormalizer(spelling))  # every system has the same references


@dataclass(frozen=True)
class Errors:
    """Edits between one reference and one hypothesis, in words or in characters; `+` adds another pair."""

    reference: int  # length of the reference
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.reference + other.reference,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def edits(self) -> int:
        """All edits together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits divided by the length of the reference; an empty reference counts as one word."""
        return self.edits / max(self.reference, 1)


def count_word_errors(reference: str, hypothesis: str) -> Errors:
    """Count the edits between the white-space separated words of two texts, by minimum edit distance."""
    return _count_errors(reference.split(), hypothesis.split())


def count_character_errors(reference: str, hypothesis: str) -> Errors:
    """Count the edits between the characters of two texts; a run of white space is one character."""
    return _count_errors(" ".join(reference.split()), " ".join(hypothesis.split()))


def _count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> Errors:
    if not reference or not hypothesis:  # jiwer refuses an empty reference
        return Errors(len(reference), deletions=len(reference), insertions=len(hypothesis))
    import jiwer

    if isinstance(reference, str):
        output = jiwer.process_characters(reference, hypothesis)
    else:
        output = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    return Errors(len(reference), output.substitutions, output.deletions, output.insertions)


@dataclass
class Score:
    """Errors of a corpus: one hypothesis for each recording, in the order in which they were added."""

    words: list[Errors] = field(default_factory=list)  # normalised
    raw_words: list[Errors] = field(default_factory=list)  # as written, with case and punctuation
    characters: list[Errors] = field(default_factory=list)  # normalised

    def add(self, reference: str, hypothesis: str) -> Errors:
        """Count the errors of a recording and return its word errors, both texts normalised."""
        normalize = load_english_normalizer()
        self.raw_words.append(count_word_errors(reference, hypothesis))
        reference, hypothesis = normalize(reference), normalize(hypothesis)
        self.characters.append(count_character_errors(reference, hypothesis))
        self.words.append(count_word_errors(reference, hypothesis))
        return self.words[-1]

    @property
    def total(self) -> Errors:
        """Word errors of all recordings together."""
        return sum(self.words, Errors(0))

    @property
    def wer(self) -> float:
        """Word error rate of the corpus, both texts normalised."""
        return self.total.rate

    @property
    def raw_wer(self) -> float:
        """Word error rate of the corpus, with case and punctuation."""
        return sum(self.raw_words, Errors(0)).rate

    @property
    def cer(self) -> float:
        """Character error rate of the corpus, both texts normalised."""
        return sum(self.characters, Errors(0)).rate

    def to_dict(self) -> dict:
        """List the rates by name, as fractions of the reference's words (of its characters for `cer`).

        `interval` is the 95 % interval of `wer`, None for a single recording.
        """
        total = self.total
        words = max(total.reference, 1)
        return {
            "wer": self.wer,
            "interval": list(estimate_interval(self.words)) if len(self.words) > 1 else None,
            "substitutions": total.substitutions / words,
            "deletions": total.deletions / words,
            "insertions": total.insertions / words,
            "raw_wer": self.raw_wer,
            "cer": self.cer,
            "words": total.reference,
            "recordings": len(self.words),
        }

    def __str__(self) -> str:
        rates = self.to_dict()
        interval = "[{:.2%}, {:.2%}] ".format(*rates["interval"]) if rates["interval"] else ""
        edits = " ".join(
            f"{name[0].upper()} {rates[name]:.2%}" for name in ("substitutions", "deletions", "insertions")
        )
        return f"WER {self.wer:.2%} {interval}({edits}) of {self.total.reference} words"


def estimate_interval(errors: Sequence[Errors], level: float = 0.95, samples: int = 1000) -> tuple[float, float]:
    """Estimate the interval of the corpus rate: percentiles over recordings that are drawn again with replacement.

    Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.

    Args:
        errors: of each recording.
        level: share of the draws inside the interval.
        samples: number of draws.
    """
    return _find_percentiles(_resample_rates([errors], samples)[0], level)


def compare_rates(
    errors: Sequence[Errors], baseline: Sequence[Errors], level: float = 0.95, samples: int = 1000
) -> tuple[float, float, float]:
    """Compare two systems on the same recordings, which are drawn again in pairs.

    Args:
        errors, baseline: of each recording, in the same order.
        level: share of the draws inside the interval.
        samples: number of draws. Those in which the baseline makes no error have no ratio and are left out.

    Returns:
        The rate divided by the baseline's less 1, and the low and high end of its interval.

    Raises:
        ValueError: the two have different numbers of recordings.
    """
    if len(errors) != len(baseline):
        raise ValueError(f"{len(errors)} recordings against {len(baseline)}: score both on the same ones")
    rates, reference = (sum(e, Errors(0)).rate for e in (errors, baseline))
    drawn, drawn_reference = _resample_rates([errors, baseline], samples)
    if not reference:
        return (0.0, 0.0, 0.0) if not rates else (float("inf"),) * 3
    defined = drawn_reference > 0
    low, high = _find_percentiles(drawn[defined] / drawn_reference[defined] - 1, level)
    return rates / reference - 1, low, high


def _resample_rates(systems: Sequence[Sequence[Errors]], samples: int) -> np.ndarray:
    """Compute corpus rates [systems, samples], each column over one draw of the recordings, always the same draws."""
    count = len(systems[0])
    if not count:
        return np.zeros((len(systems), samples))
    draws = np.random.default_rng(0).integers(count, size=(samples, count))
    edits = np.array([[e.edits for e in errors] for errors in systems])[:, draws].sum(-1)
    lengths = np.array([[e.reference for e in errors] for errors in systems])[:, draws].sum(-1)
    return edits / np.maximum(lengths, 1)


def _find_percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
