"""Scoring a system on recordings: what it wrote, how far it got, how fast, and how sparse it was.

    result = evaluate(SpeechLLM(model, processor, attention="unique"), recordings)
    print(result)

A system is anything with a `name` and `transcribe(recordings)`; those of this project are in `systems.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from unique_asr.data import Recording
from unique_asr.evaluation.entities import EntityErrors, entity_errors
from unique_asr.evaluation.peak_memory import PeakMemory
from unique_asr.evaluation.repetition import longest_repeated_run
from unique_asr.evaluation.scoring import Errors, Score
from unique_asr.evaluation.timing import TimingErrors, timing_errors
from unique_asr.transcript import Segment

if TYPE_CHECKING:
    from unique_asr.evaluation.decodings import Decodings


@dataclass
class Hypothesis:
    """What a system made of one recording."""

    text: str
    stop_reason: str = "end"  # end, length or loop
    coverage: float = 1.0  # share of the speech that the text covers, as far as the system can tell
    passes: int = (
        1  # prefills of the decoder: more than one if the recording is longer, or decoding had to be continued
    )
    broken: int = 0  # passes that did not get to their end
    longest: int | None = None  # positions of the longest pass, prompt and text, where the system tells
    sparsity: dict = field(default_factory=dict)  # SparsityCounters.to_dict()
    segments: list[Segment] = field(default_factory=list)
    seconds: float = 0.0  # wall time, filled in by `evaluate`
    tokens: int = 0  # written by the decoder, those that were dropped later included
    decode_seconds: float = 0.0  # of the wall time, spent on those tokens
    peak_memory: int | None = None  # bytes, filled in by `evaluate`; of a whole batch if several go together


class System(Protocol):
    name: str

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        """(index of the recording, hypothesis) as they are complete; how many go together is the system's business."""


@dataclass
class Result:
    """Scores of one system, and every hypothesis behind them."""

    system: str
    recordings: list[Recording] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    score: Score = field(default_factory=Score)
    set: str = ""  # of the recordings, if a run has several: "10 min"
    budget: int | None = None  # tokens a step, of systems that have one
    entities: EntityErrors = field(default_factory=EntityErrors)

    def add(self, recording: Recording, hypothesis: Hypothesis) -> None:
        for name in ("timing", "longest_repeated_run"):
            vars(self).pop(name, None)
        self.recordings.append(recording)
        self.hypotheses.append(hypothesis)
        self.score.add(recording.text, hypothesis.text)
        self.entities += entity_errors(recording.text, hypothesis.text, recording.entities)

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
    def tokens_per_second(self) -> float | None:
        """Of decoding alone; None for systems that do not count."""
        seconds = sum(hypothesis.decode_seconds for hypothesis in self.hypotheses)
        return self.tokens / seconds if seconds else None

    @property
    def tokens(self) -> int:
        """Written by the decoder, those that were dropped later included."""
        return sum(hypothesis.tokens for hypothesis in self.hypotheses)

    @property
    def peak_memory(self) -> int | None:
        """Bytes."""
        return max((h.peak_memory for h in self.hypotheses if h.peak_memory is not None), default=None)

    @cached_property
    def longest_repeated_run(self) -> int:
        """Words of the longest repetition in any hypothesis."""
        return max((longest_repeated_run(hypothesis.text) for hypothesis in self.hypotheses), default=0)

    @cached_property
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
            "set": self.set,
            "budget": self.budget,
            "recordings": len(self.recordings),
            **self.score.to_dict(),
            "entities": self.entities.entities,
            "entity_error_rate": self.entities.rate,
            "longest_repeated_run": self.longest_repeated_run,
            "audio_seconds": round(self.audio_seconds, 2),
            "coverage": self.coverage,
            "rtfx": self.speed,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory": self.peak_memory,
            "steps": self.total("steps"),
            "sparse_steps": self.total("sparse_steps"),
            "share_of_pages_read": self.share_of_pages_read,
            "stop_reasons": dict(Counter(hypothesis.stop_reason for hypothesis in self.hypotheses)),
            "tokens": self.tokens,
            "passes": sum(hypothesis.passes for hypothesis in self.hypotheses),
            "broken_passes": sum(hypothesis.broken for hypothesis in self.hypotheses),
            "single_passes": sum(hypothesis.passes == 1 for hypothesis in self.hypotheses),
            "timing": self.timing.to_dict(),
        }

    def ordered(self, recordings: Sequence[Recording]) -> Result:
        """The same in the order of `recordings`."""
        order = [self.recordings.index(recording) for recording in recordings]
        score = Score(*([values[index] for index in order] for values in vars(self.score).values()))
        hypotheses = [self.hypotheses[index] for index in order]
        return replace(self, recordings=list(recordings), hypotheses=hypotheses, score=score)

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
            "broken": hypothesis.broken,
            "tokens": hypothesis.tokens,
            "sparsity": hypothesis.sparsity,
            "segments": [
                {"start": round(segment.start, 3), "end": round(segment.end, 3), "text": segment.text}
                for segment in hypothesis.segments
            ],
        }

    def __str__(self) -> str:
        name = f"{self.system} {self.set}".strip()
        parts = [f"{name:<12} {self.score}", f"coverage {self.coverage:.1%}", f"RTFx {self.speed:.1f}"]
        if self.entities.rate is not None:
            parts.insert(1, f"entities missed {self.entities.rate:.1%} of {self.entities.entities}")
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
    system: System,
    recordings: Sequence[Recording],
    progress: Callable[[Result], None] | None = None,
    decodings: Decodings | None = None,
    known: Mapping[Recording, Hypothesis] | None = None,
) -> Result:
    """Transcribe the recordings and score them; `progress(result)` is called after each one, in the order they come.

    What is `known`, or what `decodings` has, is not decoded; what was decoded is put into `decodings`.
    """
    result, known = Result(system.name), dict(known or {})
    if decodings is not None:
        known |= {r: found for r in recordings if r not in known and (found := decodings.get(r)) is not None}

    def add(recording: Recording, hypothesis: Hypothesis) -> None:
        result.add(recording, hypothesis)
        if progress is not None:
            progress(result)

    for recording in recordings:
        if recording in known:
            add(recording, known[recording])
    pending = [recording for recording in recordings if recording not in known]
    decoded = system.transcribe(pending)
    for _ in pending:
        started, memory = time.perf_counter(), PeakMemory()
        index, hypothesis = next(decoded)
        hypothesis.seconds = hypothesis.seconds or time.perf_counter() - started
        hypothesis.peak_memory = memory.bytes()
        if decodings is not None:
            decodings.put(pending[index], hypothesis)
        add(pending[index], hypothesis)
    return result.ordered(recordings)
