"""A recording on its way through the passes of a known speech LLM: what to hear next, and what becomes of the answer.

A model that writes times is checked against the audio: where its text ends early, loops or runs out of tokens, the next
pass begins after the last complete segment. The text of a model without times is placed by its share of the speech.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from unique_asr.longform.configuration import TimestampedConfig
from unique_asr.longform.coverage import BREAKS, format_clock
from unique_asr.longform.loops import LoopDetector
from unique_asr.longform.planner import Continuation, PassPlanner
from unique_asr.longform.speech_activity import SpeechActivity
from unique_asr.models.pretrained.catalogue import SAMPLE_RATE, KnownModel
from unique_asr.models.pretrained.formats import TextStream, Utterance
from unique_asr.transcript import Segment, TranscriptionInfo, Unfinished


@dataclass
class PassState:
    """Where a transcription is when a pass begins, for JSON: enough to go on with it later."""

    limit: float  # s, of the next pass
    position: float = 0.0  # s, where it begins
    carried: str = ""  # text of the pass before
    covered: float = 0.0  # s of speech in segments
    reached: float = 0.0  # s, end of the last segment
    passes: int = 0
    warnings: list[str] = field(default_factory=list)
    sparsity: dict[str, int] = field(default_factory=dict)  # of SparsityCounters


@dataclass(frozen=True)
class PassRequest:
    """What the LLM is asked for."""

    start: float  # s
    end: float  # s
    prompt: str | None
    samples: np.ndarray  # [N] at 16 kHz


class TimestampedRecording:
    """The samples of a recording and how far they are transcribed.

        while recording.has_speech_left:
            request = recording.begin()
            for token, log_prob in ...:                    # the answer to request.samples and request.prompt
                yield from recording.push(token, log_prob)
            yield from recording.end("end")                # or "length", or "loop" if recording.looped

    Args:
        samples: [N] at 16 kHz.
        info: kept up to date.
        offset: seconds of the file before the recording; times of segments count from the file's beginning.
        unfinished: what an earlier transcription left.
    """

    def __init__(
        self,
        samples: np.ndarray,
        known_model: KnownModel,
        tokenizer: Any,
        config: TimestampedConfig,
        info: TranscriptionInfo,
        prompt: str | None = None,
        offset: float = 0.0,
        unfinished: Unfinished | None = None,
    ) -> None:
        self.samples, self.speech = samples, SpeechActivity(samples)
        self.known_model, self.tokenizer, self.config = known_model, tokenizer, config
        self.info, self.prompt, self.offset = info, prompt, offset
        longest, duration = config.max_pass_seconds or known_model.pass_seconds, self.speech.duration
        self._state = PassState(**unfinished.state) if unfinished else PassState(longest)
        self.planner = PassPlanner(self.speech, config, longest, self._state.position, duration, self._state.limit)
        self.segments = len(unfinished.segments) if unfinished else 0  # so far
        self._own_warnings = len(info.warnings)  # those before are of the audio itself
        self._is_timed = known_model.parser.timed
        info.duration, info.passes = duration, self._state.passes
        info.warnings += self._state.warnings
        if self.speech.total == 0:
            info.stop_reason, info.coverage = "silence", 1.0

    @property
    def has_speech_left(self) -> bool:
        """Whether another pass is to be made."""
        return self.planner.has_speech_left

    @property
    def earlier_sparsity(self) -> dict[str, int]:
        """Counters of the transcription that this one goes on with."""
        return self._state.sparsity

    def make_state(self, sparsity: dict[str, int]) -> dict[str, Any]:
        """Return what `Unfinished` needs to go on with the next pass; `sparsity`: the counters until then."""
        progress = {"limit": self.planner.limit, "position": self.planner.start, "passes": self.info.passes}
        warnings = self.info.warnings[self._own_warnings :]
        return asdict(replace(self._state, **progress, warnings=warnings, sparsity=sparsity))

    def begin(self) -> PassRequest:
        """Begin the next pass."""
        start, end = self.planner.plan()
        self.info.passes += 1
        self._parser, self._stream, self._loops = self.known_model.parser(), TextStream(self.tokenizer), LoopDetector()
        self._placer = Placer(start, end, self.speech, self.info.passes)
        self._segments: list[Segment] = []  # of this pass
        self._log_probs: list[float] = []  # of the tokens since the last utterance
        self.looped = False
        words = " ".join(filter(None, (self.prompt, self._state.carried[-self.config.carried_characters :])))
        samples = self.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        self._request = PassRequest(start, end, words or None, samples)
        return self._request

    def push(self, token: int, log_prob: float) -> Iterator[Segment]:
        """Yield the segments that a token completes; `looped` says that it is of no use to go on."""
        self._log_probs.append(log_prob)
        for utterance in self._parser.push(self._stream.push(token)):
            yield from self._place(utterance)
        self.looped = bool(self._loops.push(token))

    def end(self, reason: str) -> Iterator[Segment]:
        """Yield the last segments of a pass, and decide where the next one begins.

        reason: "end", "length" or "loop", see `unique_asr.transcript.STOP_REASONS`.
        """
        if reason == "end":
            for utterance in self._parser.close():
                yield from self._place(utterance)
        yield from self._keep(self._placer.close(whole=reason == "end"))
        self.info.stop_reason = reason
        yield from self._go_on(reason)
        if not self.has_speech_left:
            self._warn_of_passes()

    @property
    def reached(self) -> float:
        """Seconds, of the text so far."""
        return self._placer.reached

    def _place(self, utterance: Utterance) -> Iterator[Segment]:
        confidence = math.exp(np.mean(self._log_probs)) if self._log_probs else None
        self._log_probs = []
        yield from self._keep(self._placer.push(utterance, confidence))

    def _keep(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        """Keep segments of the pass; those of a model without times are not given out before its answer is good."""
        for segment in segments:
            self._segments.append(segment)
            if self._is_timed:
                yield self._count(segment)

    def _count(self, segment: Segment) -> Segment:
        """The segment as it is given out; its speech is counted."""
        state, info = self._state, self.info
        state.covered += self.speech.count_seconds(max(segment.start, state.reached), segment.end)
        state.reached = max(segment.end, state.reached)
        info.coverage = state.covered / max(self.speech.total, 1e-9)
        self.segments += 1
        start, end = segment.start + self.offset, segment.end + self.offset
        return replace(segment, id=self.segments - 1, start=start, end=end)

    def _go_on(self, reason: str) -> Iterator[Segment]:
        """Plan the next pass; an answer without times is given out, or asked for again in shorter passes."""
        start, end, reached, planner = self._request.start, self._request.end, self._placer.reached, self.planner
        failed = reason != "end" and not self._is_timed
        if failed and planner.retry((end - start) / 2) is Continuation.RETRIED:
            self._warn(f"{format_clock(start)}: {BREAKS[reason]}; again in shorter passes")
            return
        if not self._is_timed:
            yield from map(self._count, self._segments)
        if self.known_model.carries_text:
            self._state.carried = " ".join(segment.text for segment in self._segments)
        if failed:
            outcome = Continuation.SKIPPED
        elif reason == "end" and self.speech.count_seconds(reached, end) < self.config.rest_seconds:
            planner.complete()
            return
        else:
            outcome = planner.continue_from(reached) if self._is_timed else planner.skip()
        if outcome is Continuation.CONTINUED:
            self._warn(f"{format_clock(reached)}: {BREAKS[reason]}; went on from there")
        elif outcome is Continuation.SKIPPED:
            self._warn(f"{format_clock(start)}-{format_clock(end)}: {BREAKS[reason]}; the rest of it is missing")

    def _warn(self, message: str) -> None:
        self.info.warnings.append(message)

    def _warn_of_passes(self) -> None:
        """Say what the times or the speakers of the transcript are worth."""
        if not self._is_timed:
            self._warn("the model gives no times: they are estimates, which a smaller max_pass_seconds narrows")
        elif self.info.passes > 1:
            self._warn("speakers are told apart within a pass only: P2-S01, of pass 2, may be any of pass 1")


class Placer:
    """Turns utterances of a pass into segments of the recording, with times inside the pass.

    Args:
        start, end: of the pass, in seconds.
        number: of the pass in the recording, from 1.
    """

    def __init__(self, start: float, end: float, speech: SpeechActivity, number: int) -> None:
        self.start, self.end, self.speech, self.number = start, end, speech, number
        self.reached = start  # s, the latest end of a segment
        self._waiting: tuple[Utterance, float | None] | None = None  # without an end until the next one begins
        self._untimed: list[tuple[Utterance, float | None]] = []

    def push(self, utterance: Utterance, confidence: float | None) -> Iterator[Segment]:
        """Yield the segments that are complete with an utterance; one without an end waits for the next one."""
        if utterance.start is None and utterance.end is None:
            self._untimed.append((utterance, confidence))
            return
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting[0].end = utterance.start
            yield from self._segment(*waiting)
        if utterance.end is None:
            self._waiting = utterance, confidence
        else:
            yield from self._segment(utterance, confidence)

    def close(self, whole: bool) -> Iterator[Segment]:
        """Yield what waits; text without times is spread over the speech that is left.

        whole: whether the text came to its end by itself, so that its last utterance ends with the pass.
        """
        if self._waiting is not None and whole:
            self._waiting[0].end = self.end - self.start
            yield from self._segment(*self._waiting)
        total = sum(len(utterance.text) for utterance, _ in self._untimed)
        times, done = self.speech.spread(self.reached, self.end), 0
        for utterance, confidence in self._untimed:
            bounds = times(done / total), times((done + len(utterance.text)) / total)
            done += len(utterance.text)
            utterance.start, utterance.end = (bound - self.start for bound in bounds)
            yield from self._segment(utterance, confidence)

    def _segment(self, utterance: Utterance, confidence: float | None) -> Iterator[Segment]:
        start = self.start if utterance.start is None else self.start + utterance.start
        start = min(max(start, self.start), self.end)
        end = min(max(start if utterance.end is None else self.start + utterance.end, start), self.end)
        self.reached = max(self.reached, end)
        if not utterance.text:
            return
        speaker = utterance.speaker
        if speaker is not None and self.number > 1:
            speaker = f"P{self.number}-{speaker}"
        yield Segment(0, start, end, utterance.text, confidence=confidence, speaker=speaker)
