"""What a system wrote for each recording, and its scores over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from unique_asr.data import Recording
from unique_asr.evaluation.entities import EntityErrors, count_entity_errors
from unique_asr.evaluation.repetition import measure_longest_repeat
from unique_asr.evaluation.scoring import Errors, Score
from unique_asr.evaluation.timing import TimingErrors, measure_timing
from unique_asr.transcript import Segment


@dataclass
class Hypothesis:
    """What a system wrote for one recording, and how."""

    text: str
    stop_reason: str = "end"  # as in `TranscriptionInfo`
    coverage: float = 1.0  # share of the speech that the text covers, as far as the system can tell
    passes: int = 1  # prefills of the decoder: more for a long recording, and where decoding had to be continued
    broken: int = 0  # passes that did not get to their end
    longest: int | None = None  # positions of the longest pass, prompt and text, where the system tells
    sparsity: dict = field(default_factory=dict)  # counters by name, as in `SparsityCounters`
    segments: list[Segment] = field(default_factory=list)
    seconds: float = 0.0  # wall time; `evaluate` measures it if the system does not
    tokens: int = 0  # written by the decoder, with those that were dropped later
    decode_seconds: float = 0.0  # part of the wall time, spent on writing tokens
    peak_memory: int | None = None  # bytes, measured by `evaluate`; of the whole batch for recordings side by side


@dataclass
class SystemResult:
    """The scores of one system on one set of recordings, and every hypothesis behind them."""

    system: str
    recordings: list[Recording] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    score: Score = field(default_factory=Score)
    set: str = ""  # name of the set of recordings, if a run has several: "10 min"
    budget: int | None = None  # tokens that a sparse step reads; None for systems without a budget
    entities: EntityErrors = field(default_factory=EntityErrors)

    def add(self, recording: Recording, hypothesis: Hypothesis) -> None:
        """Score a hypothesis against the text of its recording."""
        for name in ("timing", "longest_repeated_run"):
            vars(self).pop(name, None)  # computed again when it is asked for
        self.recordings.append(recording)
        self.hypotheses.append(hypothesis)
        self.score.add(recording.text, hypothesis.text)
        self.entities += count_entity_errors(recording.text, hypothesis.text, recording.entities)

    @property
    def errors(self) -> list[Errors]:
        """Word errors of each recording, in their order."""
        return self.score.words

    @property
    def audio_seconds(self) -> float:
        """Length of all recordings together."""
        return sum(recording.duration for recording in self.recordings)

    @property
    def coverage(self) -> float:
        """Mean coverage of the recordings, weighted by their durations."""
        covered = sum(r.duration * h.coverage for r, h in zip(self.recordings, self.hypotheses, strict=True))
        return covered / max(self.audio_seconds, 1e-9)

    @property
    def speed(self) -> float:
        """RTFx: seconds of audio a second of wall time, without loading."""
        return self.audio_seconds / max(sum(hypothesis.seconds for hypothesis in self.hypotheses), 1e-9)

    def sum_counter(self, name: str) -> int:
        """Sum a counter of `SparsityCounters`, such as `sparse_steps`, over the recordings."""
        return sum(hypothesis.sparsity.get(name, 0) for hypothesis in self.hypotheses)

    @property
    def share_of_pages_read(self) -> float:
        """Pages that the steps read, as a share of those that dense attention would have read."""
        return self.sum_counter("pages_read") / max(self.sum_counter("pages_total"), 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second of decoding alone; None for systems that do not count them."""
        seconds = sum(hypothesis.decode_seconds for hypothesis in self.hypotheses)
        return self.tokens / seconds if seconds else None

    @property
    def tokens(self) -> int:
        """Tokens that the decoder wrote, with those that were dropped later."""
        return sum(hypothesis.tokens for hypothesis in self.hypotheses)

    @property
    def peak_memory(self) -> int | None:
        """Largest peak of a recording in bytes; None where it was not measured."""
        return max((h.peak_memory for h in self.hypotheses if h.peak_memory is not None), default=None)

    @cached_property
    def longest_repeated_run(self) -> int:
        """Words of the longest repetition in any hypothesis."""
        return max((measure_longest_repeat(hypothesis.text) for hypothesis in self.hypotheses), default=0)

    @cached_property
    def timing(self) -> TimingErrors:
        """How well words lie where they were said; without words for systems that give no times."""
        errors = TimingErrors()
        for recording, hypothesis in zip(self.recordings, self.hypotheses, strict=True):
            words = [word for segment in hypothesis.segments for word in segment.words]
            errors += measure_timing(recording.utterances, words)
        return errors

    def to_dict(self) -> dict:
        """List every measure by name, for results.json."""
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
            "steps": self.sum_counter("steps"),
            "sparse_steps": self.sum_counter("sparse_steps"),
            "share_of_pages_read": self.share_of_pages_read,
            "stop_reasons": dict(Counter(hypothesis.stop_reason for hypothesis in self.hypotheses)),
            "tokens": self.tokens,
            "passes": sum(hypothesis.passes for hypothesis in self.hypotheses),
            "broken_passes": sum(hypothesis.broken for hypothesis in self.hypotheses),
            "single_passes": sum(hypothesis.passes == 1 for hypothesis in self.hypotheses),
            "timing": self.timing.to_dict(),
        }

    def reorder(self, recordings: Sequence[Recording]) -> SystemResult:
        """Make a copy whose recordings are in the order of `recordings`."""
        order = [self.recordings.index(recording) for recording in recordings]
        score = Score(*([values[index] for index in order] for values in vars(self.score).values()))
        hypotheses = [self.hypotheses[index] for index in order]
        return replace(self, recordings=list(recordings), hypotheses=hypotheses, score=score)

    def make_row(self, index: int) -> dict:
        """List what is known of one recording, with the field names of the Open ASR Leaderboard's manifests."""
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
        if self.sum_counter("steps"):
            sparse = f"sparse steps {self.sum_counter('sparse_steps')}/{self.sum_counter('steps')}"
            parts.append(f"{sparse}, pages read {self.share_of_pages_read:.1%}")
        timing = self.timing
        if timing.words:
            parts.append(f"words misplaced {timing.misplaced / timing.words:.1%}")
        reasons = Counter(hypothesis.stop_reason for hypothesis in self.hypotheses)
        stops = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        passes = sum(hypothesis.passes for hypothesis in self.hypotheses)
        parts.append(f"{passes} passes: {stops}")
        return " | ".join(parts)
