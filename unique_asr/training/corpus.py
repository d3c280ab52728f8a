"""Speech in memory, and the items that training draws from it: utterances joined to any length.

All audio of a source is one int16 tensor on the training device (an hour is 115 MB), so that joining utterances,
augmenting them and computing features needs no loading.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from unique_asr.models.speech_llm.ctc import normalize_ctc_text
from unique_asr.models.speech_llm.processing import SAMPLE_RATE

LOWER_CASE = "lower case"  # the prompt for transcripts without case and punctuation
MIN_SAMPLES = SAMPLE_RATE // 20  # of an utterance
MAX_UTTERANCE_SECONDS = 28.0  # a longer utterance is left out: slowed down it would not fit into the encoder's window


@dataclass(eq=False)
class TrainingUtterance:
    """What was said without a pause, and where in the audio of its source.

    Attributes:
        start, end: its first sample and the one after its last, at 16 kHz.
        text: the transcript.
        cased: the transcript with case and punctuation; None where they are unknown.
        heard: what a listener made of it: the likely tokens of each of M positions, [M, A], and their weights, [M, A].
    """

    start: int
    end: int
    text: str
    cased: str | None
    heard: tuple[Tensor, Tensor] | None = None

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / SAMPLE_RATE


@dataclass(eq=False)
class Source:
    """Recordings of one kind, each a list of consecutive utterances."""

    name: str
    audio: Tensor  # [samples] int16
    recordings: list[list[TrainingUtterance]]
    weight: float  # how often it is drawn from, relative to other sources
    left_out: Counter[str] = field(default_factory=Counter)  # utterances that the filters took away, by reason
    cased_runs: list[list[TrainingUtterance]] = field(init=False)  # consecutive utterances of known case

    def __post_init__(self) -> None:
        self.cased_runs = [run for recording in self.recordings for run in _cased_runs(recording)]

    @property
    def hours(self) -> float:
        """Speech in all recordings."""
        return sum(utterance.seconds for recording in self.recordings for utterance in recording) / 3600

    def has_utterances(self, cased: bool) -> bool:
        """Whether there is anything to draw; with `cased`, anything whose case is known."""
        return bool(self.cased_runs if cased else self.recordings)

    def draw_stretch(self, cased: bool, random: np.random.Generator) -> Iterable[TrainingUtterance]:
        """Consecutive utterances of one recording, from a random one on; with `cased` only those of known case."""
        pool = self.cased_runs if cased else self.recordings
        run = pool[random.integers(len(pool))]
        return run[random.integers(len(run)) :]


@dataclass
class TrainingItem:
    """Utterances joined one after the other."""

    pieces: list[tuple[Source, TrainingUtterance, float]]  # with the seconds of silence before each
    cased: bool  # the transcript has case and punctuation

    @property
    def text(self) -> str:
        """The transcript that the LLM is to write."""
        if self.cased:
            return " ".join(utterance.cased or "" for _, utterance, _ in self.pieces)
        return normalize_ctc_text(" ".join(utterance.text for _, utterance, _ in self.pieces))

    @property
    def prompt(self) -> str | None:
        """The instruction that asks for such a transcript."""
        return None if self.cased else LOWER_CASE

    @property
    def seconds(self) -> float:
        return sum(utterance.seconds + gap for _, utterance, gap in self.pieces)


def check_utterances(sources: Iterable[Source]) -> None:
    """Raise ValueError if there is nothing to draw; it says how many utterances were left out, and why."""
    left_out: Counter[str] = Counter()
    for source in sources:
        if source.has_utterances(cased=False):
            return
        left_out.update(source.left_out)
    if left_out:
        raise ValueError(
            f"data: no utterance to train on: left out are {describe_left_out(left_out)}; check data.manifests, "
            "data.synthetic and data.min_match"
        )
    raise ValueError("data: no utterance to train on; check data.manifests, data.synthetic and data.weights")


def describe_left_out(left_out: Counter[str]) -> str:
    """Return "3 misread, 1 longer than 28 s"."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


class Corpus:
    """Draws items of a wanted length from several sources.

    Args:
        seed: the same seed draws the same items.
        max_gap_seconds: longest silence put between two utterances.
    """

    def __init__(self, sources: Sequence[Source], seed: int, max_gap_seconds: float = 0.8):
        self.sources = list(sources)
        self.random = np.random.default_rng(seed)
        self.max_gap_seconds = max_gap_seconds

    def draw_item(self, seconds: float, cased_share: float) -> TrainingItem:
        """Draw consecutive utterances; those of further recordings follow where one is too short.

        Args:
            seconds: longest item, unless its first utterance is longer.
            cased_share: probability of an item of utterances whose case and punctuation are known.

        Raises:
            ValueError: there is nothing to draw from.
        """
        check_utterances(self.sources)
        cased = self.random.random() < cased_share and any(source.has_utterances(cased=True) for source in self.sources)
        pieces: list[tuple[Source, TrainingUtterance, float]] = []
        total = 0.0
        while True:
            source = self._source(cased)
            for utterance in source.draw_stretch(cased, self.random):
                gap = float(self.random.uniform(0, self.max_gap_seconds)) if pieces else 0.0
                if pieces and total + gap + utterance.seconds > seconds:
                    return TrainingItem(pieces, cased)
                pieces.append((source, utterance, gap))
                total += gap + utterance.seconds
            if total > 0.7 * seconds:
                return TrainingItem(pieces, cased)

    def _source(self, cased: bool) -> Source:
        weights = np.array([source.weight if source.has_utterances(cased) else 0.0 for source in self.sources])
        return self.sources[self.random.choice(len(weights), p=weights / weights.sum())]


def _cased_runs(recording: Iterable[TrainingUtterance]) -> Iterator[list[TrainingUtterance]]:
    run: list[TrainingUtterance] = []
    for utterance in recording:
        if utterance.cased:
            run.append(utterance)
        elif run:
            yield run
            run = []
    if run:
        yield run


def has_case(text: str) -> bool:
    """Whether the text has both cases; one all in capitals says nothing about them."""
    return text != text.lower() and text != text.upper()


def draw_log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    """A number from `low` to `high` whose logarithm is uniformly distributed."""
    return math.exp(random.uniform(math.log(low), math.log(high)))
