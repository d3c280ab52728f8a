"""A recording on its way through the passes of a speech LLM: what to hear next, and what becomes of the answer.

A model that writes times is checked against the audio: where its text ends early, loops or runs out of tokens, the next
pass begins after the last complete segment. The text of a model without times is placed by its share of the speech.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from unique_asr.longform.passes import LoopDetector, clock
from unique_asr.models.pretrained.catalogue import SAMPLE_RATE, KnownModel
from unique_asr.models.pretrained.formats import ParsedUtterance, TextStream
from unique_asr.transcript import Segment, TranscriptionInfo, Unfinished

REASONS = {
    "end": "the text ended before the speech",
    "length": "the token limit was reached",
    "loop": "the text began to repeat itself",
}


@dataclass(frozen=True)
class PassConfig:
    max_pass_seconds: float | None = None  # None: what the model's authors say
    cut_seconds: float = 30.0  # a pass that is not the last one ends in the quietest moment of its last seconds
    retry_seconds: float = 60.0  # a pass that made no progress is tried again on this much audio, then skipped
    rest_seconds: float = 10.0  # speech after the end of the text that is worth another pass
    min_progress_seconds: float = 2.0  # less than this is no progress
    carried_characters: int = 400  # of the text before, for models that take it
    encode_windows: int = 8  # of the encoder at once


@dataclass
class Place:
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
class Pass:
    """What the LLM is asked for."""

    start: float  # s
    end: float  # s
    prompt: str | None
    samples: np.ndarray  # [N] at 16 kHz


class Recording:
    """The samples of a recording and how far they are transcribed.

        while recording.unheard:
            asked = recording.begin()
            for token, log_prob in ...:                    # the answer to asked.samples and asked.prompt
                yield from recording.push(token, log_prob)
            yield from recording.end("end")                # or "length", or "loop" if recording.looped

    `info` is kept up to date; times of segments count from `offset` seconds before the recording.
    """

    def __init__(
        self,
        samples: np.ndarray,
        known_model: KnownModel,
        tokenizer: Any,
        config: PassConfig,
        info: TranscriptionInfo,
        prompt: str | None = None,
        offset: float = 0.0,
        unfinished: Unfinished | None = None,
    ) -> None:
        self.samples, self.speech = samples, Speech(samples)
        self.known_model, self.tokenizer, self.config = known_model, tokenizer, config
        self.info, self.prompt, self.offset = info, prompt, offset
        self.max_pass_seconds = config.max_pass_seconds or known_model.pass_seconds
        self.place = Place(**unfinished.state) if unfinished else Place(self.max_pass_seconds)
        self.number = len(unfinished.segments) if unfinished else 0
        self.warnings_before = len(info.warnings)  # of the audio itself
        info.duration, info.passes = self.speech.duration, self.place.passes
        info.warnings += self.place.warnings
        if self.speech.total == 0:
            info.stop_reason, info.coverage = "silence", 1.0

    @property
    def unheard(self) -> bool:
        """Whether another pass is to be made."""
        return self.speech.between(self.place.position, self.speech.duration) > 0

    def state(self, sparsity: dict[str, int]) -> dict[str, Any]:
        """What `Unfinished` needs to go on before the next pass."""
        warnings = self.info.warnings[self.warnings_before :]
        return asdict(replace(self.place, passes=self.info.passes, warnings=warnings, sparsity=sparsity))

    def begin(self) -> Pass:
        start, end = self.place.position, self._pass_end()
        self.info.passes += 1
        self._parser, self._stream, self._loops = self.known_model.parser(), TextStream(self.tokenizer), LoopDetector()
        self._placer = Placer(start, end, self.speech, self.info.passes)
        self._segments: list[Segment] = []  # of this pass
        self._log_probs: list[float] = []  # of the tokens since the last utterance
        self.looped = False
        words = " ".join(filter(None, (self.prompt, self.place.carried[-self.config.carried_characters :])))
        samples = self.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        self.current = Pass(start, end, words or None, samples)
        return self.current

    def push(self, token: int, log_prob: float) -> Iterator[Segment]:
        """Segments that a token completes; `looped` says that it is of no use to go on."""
        self._log_probs.append(log_prob)
        for utterance in self._parser.push(self._stream.push(token)):
            yield from self._placed(utterance)
        self.looped = bool(self._loops.push(token))

    def end(self, reason: str) -> Iterator[Segment]:
        """The last segments of a pass, and where the next one begins."""
        if reason == "end":
            for utterance in self._parser.close():
                yield from self._placed(utterance)
        yield from self._given(self._placer.close(whole=reason == "end"))
        yield from self._place_next(reason)
        if not self.unheard:
            self._sum_up()

    @property
    def reached(self) -> float:
        """Seconds, of the text so far."""
        return self._placer.reached

    def _placed(self, utterance: ParsedUtterance) -> Iterator[Segment]:
        confidence = math.exp(np.mean(self._log_probs)) if self._log_probs else None
        self._log_probs = []
        yield from self._given(self._placer.push(utterance, confidence))

    def _given(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        """Segments of a model that writes no times are held back until its answer is found good."""
        for segment in segments:
            self._segments.append(segment)
            if self.known_model.parser.timed:
                yield self._counted(segment)

    def _counted(self, segment: Segment) -> Segment:
        place, info = self.place, self.info
        place.covered += self.speech.between(max(segment.start, place.reached), segment.end)
        place.reached = max(segment.end, place.reached)
        info.coverage = place.covered / max(self.speech.total, 1e-9)
        self.number += 1
        start, end = segment.start + self.offset, segment.end + self.offset
        return replace(segment, id=self.number - 1, start=start, end=end)

    def _place_next(self, ended: str) -> Iterator[Segment]:
        config, place, info, timed = self.config, self.place, self.info, self.known_model.parser.timed
        position, end, reached = self.current.start, self.current.end, self._placer.reached
        info.stop_reason, reason = ended, REASONS[ended]
        if not timed and ended != "end" and end - position > config.retry_seconds:
            place.limit = (end - position) / 2  # again in halves; nothing of it was given out
            info.warnings.append(f"{clock(position)}: {reason}; again in shorter passes")
            return
        if not timed:
            yield from map(self._counted, self._segments)
        if self.known_model.carries_text:
            place.carried = " ".join(segment.text for segment in self._segments)

        done = reached - position
        if ended == "end" and self.speech.between(reached, end) < config.rest_seconds:
            place.position, place.limit = end, self.max_pass_seconds
        elif timed and done >= config.min_progress_seconds:
            info.warnings.append(f"{clock(reached)}: {reason}; went on from there")
            # Not the whole rest after a pass that got over a small part of its audio.
            place.limit = min(max(4 * done, config.retry_seconds), self.max_pass_seconds)
            place.position = reached
        elif timed and min(place.limit, end - position) > config.retry_seconds:
            place.limit = config.retry_seconds
        else:
            info.warnings.append(f"{clock(position)}-{clock(end)}: {reason}; the rest of it is missing")
            place.position, place.limit = end, min(config.retry_seconds, self.max_pass_seconds)

    def _sum_up(self) -> None:
        if not self.known_model.parser.timed:
            self.info.warnings.append(
                "the model gives no times: they are estimates, which a smaller max_pass_seconds narrows"
            )
        elif self.info.passes > 1:
            self.info.warnings.append(
                "speakers are told apart within a pass only: P2-S01, of pass 2, may be any of pass 1"
            )

    def _pass_end(self) -> float:
        """In the quietest moment near the end of an even share of what is left."""
        start, limit = self.place.position, self.place.limit
        left = self.speech.duration - start
        if left <= limit:
            return self.speech.duration
        share = min(1.05 * left / math.ceil(left / limit), limit)
        return self.speech.quietest(start + share - min(self.config.cut_seconds, share / 6), start + share)


class Placer:
    """From utterances of a pass to segments of the recording: times inside the pass, never running backwards."""

    def __init__(self, start: float, end: float, speech: Speech, number: int) -> None:
        self.start, self.end, self.speech, self.number = start, end, speech, number
        self.reached = start
        self._waiting: tuple[ParsedUtterance, float | None] | None = None  # without an end until the next one begins
        self._untimed: list[tuple[ParsedUtterance, float | None]] = []

    def push(self, utterance: ParsedUtterance, confidence: float | None) -> Iterator[Segment]:
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
        """What waits; untimed text is spread over the speech that is left, if the answer was whole over all of it."""
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

    def _segment(self, utterance: ParsedUtterance, confidence: float | None) -> Iterator[Segment]:
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


class Speech:
    """Where a recording is loud enough to be speech, in frames of 20 ms: a rough guide to cut and to check by."""

    FRAME = 0.02  # s
    SMOOTH = 15  # frames over which loudness is averaged to find a pause
    THRESHOLD = 0.1  # of the loudness that 5 % of the frames exceed
    SILENCE = 1e-4  # loudness, of 1, below which nothing is speech
    BLOCK = 3000  # frames that are measured at once

    def __init__(self, samples: np.ndarray) -> None:
        size = round(self.FRAME * SAMPLE_RATE)
        step = self.BLOCK * size
        firsts = range(0, max(1, len(samples)), step)
        loudness = np.concatenate([self._loudness(samples[first : first + step], size) for first in firsts])
        loud = loudness > max(self.THRESHOLD * np.quantile(loudness, 0.95), self.SILENCE)
        self.duration = len(samples) / SAMPLE_RATE
        self._smooth = np.convolve(loudness, np.full(self.SMOOTH, 1 / self.SMOOTH), mode="same")[: len(loudness)]
        self._before = np.concatenate([[0.0], np.cumsum(loud) * self.FRAME])  # seconds of speech before each frame

    @staticmethod
    def _loudness(samples: np.ndarray, size: int) -> np.ndarray:
        """Of every `size` samples, one frame at least; the last one is filled up with silence."""
        missing = max(1, math.ceil(len(samples) / size)) * size - len(samples)
        frames = np.pad(samples, (0, missing)).reshape(-1, size)
        return np.sqrt(np.einsum("fs,fs->f", frames, frames) / size)

    @property
    def total(self) -> float:
        return float(self._before[-1])

    def between(self, start: float, end: float) -> float:
        """Seconds of speech."""
        first, last = (min(max(round(time / self.FRAME), 0), len(self._before) - 1) for time in (start, end))
        return float(max(self._before[last] - self._before[first], 0.0))

    def quietest(self, start: float, end: float) -> float:
        """The middle of the quietest third of a second."""
        first, last = round(start / self.FRAME), round(end / self.FRAME)
        return (first + int(np.argmin(self._smooth[first:last])) + 0.5) * self.FRAME

    def spread(self, start: float, end: float) -> Callable[[float], float]:
        """A function from a share of the speech between two times, 0 to 1, to a time."""
        first, last = (min(round(time / self.FRAME), len(self._before) - 1) for time in (start, end))
        before = self._before[first : last + 1]
        if len(before) < 2 or before[-1] == before[0]:
            return lambda share: start + share * (end - start)
        shares = (before - before[0]) / (before[-1] - before[0])
        return lambda share: float(min(start + np.interp(share, shares, np.arange(len(shares))) * self.FRAME, end))
