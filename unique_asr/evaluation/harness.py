"""Scoring a system on recordings: what it wrote, how far it got, how fast, and how sparse it was.

    result = evaluate(SpeechLLM(model, processor, attention="unique"), recordings)
    print(result)

A system is anything with a `name` and `transcribe(recordings)`; those of this project are in `systems.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..data import Recording
from ..transcript import Segment
from .scoring import Errors, Score
from .timing import TimingErrors, timing_errors


@dataclass
class Hypothesis:
    """What a system made of one recording."""

    text: str
    stop_reason: str = "end"  # end, length or loop
    coverage: float = 1.0  # share of the speech that the text covers, as far as the system can tell
    passes: int = 1  # prefills of the decoder: more than one if decoding had to be continued
    sparsity: dict = field(default_factory=dict)  # SparsityStatistics.to_dict()
    segments: list[Segment] = field(default_factory=list)
    seconds: float = 0.0  # wall time, filled in by `evaluate`


class System(Protocol):
    name: str

    def transcribe(self, recordings: Iterable[Recording]) -> Iterator[Hypothesis]:
        """One hypothesis a recording, in order; how many are decoded together is the system's business."""


@dataclass
class Result:
    """Scores of one system, and every hypothesis behind them."""

    system: str
    recordings: list[Recording] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    score: Score = field(default_factory=Score)

    def add(self, recording: Recording, hypothesis: Hypothesis) -> None:
        self.recordings.append(recording)
        self.hypotheses.append(hypothesis)
        self.score.add(recording.text, hypothesis.text)

    @property
    def errors(self) -> list[Errors]:
        """Word errors of each recording."""
        return self.score.words

    @property
    def audio_seconds(self) -> float:
        return sum(recording.duration for recording in self.recordings)

    @property
    def coverage(self) -> float:
        """Mean over the recordings, weighted by their durations."""
        covered = sum(r.duration * h.coverage for r, h in zip(self.recordings, self.hypotheses, strict=True))
        return covered / max(self.audio_seconds, 1e-9)

    @property
    def speed(self) -> float:
        """RTFx: seconds of audio a second of wall time, loading excluded."""
        return self.audio_seconds / max(sum(hypothesis.seconds for hypothesis in self.hypotheses), 1e-9)

    def total(self, counter: str) -> int:
        """Sum of a counter of the sparsity statistics, such as "sparse_steps"."""
        return sum(hypothesis.sparsity.get(counter, 0) for hypothesis in self.hypotheses)

    @property
    def share_of_pages_read(self) -> float:
        return self.total("pages_read") / max(self.total("pages_total"), 1)

    @property
    def timing(self) -> TimingErrors:
        """Of the systems that give times to words."""
        errors = TimingErrors()
        for recording, hypothesis in zip(self.recordings, self.hypotheses, strict=True):
            words = [word for segment in hypothesis.segments for word in segment.words]
            errors += timing_errors(recording.utterances, words)
        return errors

    def to_dict(self) -> dict:
        return {
            "system": self.system,
            **self.score.to_dict(),
            "audio_seconds": round(self.audio_seconds, 2),
            "coverage": self.coverage,
            "rtfx": self.speed,
            "steps": self.total("steps"),
            "sparse_steps": self.total("sparse_steps"),
            "share_of_pages_read": self.share_of_pages_read,
            "stop_reasons": dict(Counter(hypothesis.stop_reason for hypothesis in self.hypotheses)),
            "passes": sum(hypothesis.passes for hypothesis in self.hypotheses),
            "timing": self.timing.to_dict(),
        }

    def row(self, index: int) -> dict:
        """One recording, with the field names of the Open ASR Leaderboard's manifests."""
        recording, hypothesis = self.recordings[index], self.hypotheses[index]
        return {
            "audio_filepath": recording.id,
            "duration": round(recording.duration, 3),
            "time": round(hypothesis.seconds, 3),
            "text": recording.text,
            "pred_text": hypothesis.text,
            "wer": self.errors[index].rate,
            "stop_reason": hypothesis.stop_reason,
            "coverage": hypothesis.coverage,
            "passes": hypothesis.passes,
            "sparsity": hypothesis.sparsity,
            "segments": [
                {"start": round(segment.start, 3), "end": round(segment.end, 3), "text": segment.text}
                for segment in hypothesis.segments
            ],
        }

    def __str__(self) -> str:
        parts = [f"{self.system:<12} {self.score}", f"coverage {self.coverage:.1%}", f"RTFx {self.speed:.1f}"]
        if self.total("steps"):
            sparse = f"sparse steps {self.total('sparse_steps')}/{self.total('steps')}"
            parts.append(f"{sparse}, pages read {self.share_of_pages_read:.1%}")
        timing = self.timing
        if timing.words:
            parts.append(f"words misplaced {timing.misplaced / timing.words:.1%}")
        reasons = Counter(hypothesis.stop_reason for hypothesis in self.hypotheses)
        stops = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        passes = sum(hypothesis.passes for hypothesis in self.hypotheses)
        parts.append(f"{passes} passes: {stops}")
        return " | ".join(parts)


def evaluate(
    system: System, recordings: Sequence[Recording], progress: Callable[[Result], None] | None = None
) -> Result:
    """Transcribe the recordings and score them; `progress(result)` is called after each one."""
    result = Result(system.name)
    started = time.perf_counter()
    for recording, hypothesis in zip(recordings, system.transcribe(recordings), strict=True):
        if not hypothesis.seconds:
            hypothesis.seconds = time.perf_counter() - started
        result.add(recording, hypothesis)
        if progress is not None:
            progress(result)
        started = time.perf_counter()
    return result
