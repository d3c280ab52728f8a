"""Recordings of any length with a pretrained speech LLM: passes as long as the model knows, cut at pauses.

A model that writes times is checked against the audio: where its text ends early, loops or runs out of tokens, the next
pass begins after the last complete segment. The text of a model without times is placed by its share of the speech.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from unique_asr.attention import SparseAttentionConfig, SparsityStatistics
from unique_asr.decoding import GreedyDecoder
from unique_asr.generation import stop_ids
from unique_asr.longform import LoopDetector, Progress, clock
from unique_asr.pipeline import Audio, PipelineError, attention_config, free_memory, open_audio
from unique_asr.transcript import Segment, TranscriptionInfo, Unfinished, text_settings

from . import find, load
from .catalogue import SAMPLE_RATE
from .encoding import encode, insert
from .formats import TextStream, Utterance
from .memory import estimate, shape_of, text_tokens


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
    sparsity: dict[str, int] = field(default_factory=dict)  # of SparsityStatistics


@dataclass
class Outcome:
    """How a pass ended."""

    reason: str  # end, length or loop
    reached: float  # s from the beginning of the recording


class AdapterTranscriber:
    """A pretrained speech LLM with its settings; used as `unique_asr.pipeline.Transcriber`.

    Args:
        model: a folder, a hub id, or a (model, processor) pair.
        attention, budget, device, dtype, progress: see `unique_asr.transcribe`.
        max_pass_seconds: the longest audio that the LLM gets at once; by default what its authors say.
        prefill_chunk: positions that the LLM reads at once, which bounds the memory of the prefill.
        passes: finer settings.
    """

    def __init__(
        self,
        model: str | PathLike[str] | tuple[Any, Any],
        *,
        attention: str | SparseAttentionConfig = "unique",
        budget: int | None = 512,
        device: str = "auto",
        dtype: str = "auto",
        max_pass_seconds: float | None = None,
        prefill_chunk: int = 2048,
        passes: PassConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        adapter = find(model)
        if adapter is None:
            raise PipelineError(f"model={model}: is no speech LLM that has an adapter; see conf/model/")
        if max_pass_seconds is not None and max_pass_seconds <= 0:
            raise PipelineError(f"max_pass_seconds={max_pass_seconds}: give a positive number of seconds")
        self.adapter, self.attention = adapter, attention_config(attention, budget)
        self.passes = passes or PassConfig()
        if max_pass_seconds is not None:
            self.passes = replace(self.passes, max_pass_seconds=max_pass_seconds)
        begin = time.perf_counter()
        if isinstance(model, tuple):
            self.name = model[0].config.name_or_path or type(model[0]).__name__
            self.model, self.processor = model
        else:
            self.name = str(model)
            if progress:
                progress("load", 0, 1)
            self.model, self.processor = load(model, device, dtype)
            if progress:
                progress("load", 1, 1)
        self.load_seconds = time.perf_counter() - begin
        chunk = prefill_chunk if adapter.chunked else 1 << 30
        static = None if adapter.static else False
        self.prefill_chunk = prefill_chunk
        self.decoder = GreedyDecoder(self.model, self.attention, capacity=0, prefill_chunk=chunk, static=static)
        self.stop_ids = stop_ids(self.model, self.processor.tokenizer)

    @property
    def max_pass_seconds(self) -> float:
        return self.passes.max_pass_seconds or self.adapter.pass_seconds

    def transcribe(
        self,
        audio: Audio,
        *,
        prompt: str | None = None,
        progress: Progress | None = None,
        unfinished: Unfinished | None = None,
        on_pass: Callable[[Any], None] | None = None,
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        """Segments of one recording as they are decoded, and how they were made; see `Transcriber.transcribe`."""
        source = open_audio(audio)
        info = TranscriptionInfo(
            audio=source.name,
            duration=source.duration or 0.0,
            model=self.name,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            attention=self.attention.to_dict(),
            settings=text_settings(prompt, self.passes.max_pass_seconds, source.start, source.end, source.channel),
            timings={"load": self.load_seconds, "encode": 0.0, "prefill": 0.0, "decode": 0.0},
        )
        return self._segments(source, prompt, info, progress, unfinished, on_pass), info

    def _segments(
        self,
        source: Any,
        prompt: str | None,
        info: TranscriptionInfo,
        progress: Progress | None,
        unfinished: Unfinished | None,
        on_pass: Callable[[Any], None] | None,
    ) -> Iterator[Segment]:
        samples = np.concatenate(list(source.blocks()))
        info.duration, speech = len(samples) / SAMPLE_RATE, Speech(samples)
        info.warnings += source.warnings
        place = Place(**unfinished.state) if unfinished else Place(self.max_pass_seconds)
        info.warnings += place.warnings
        info.passes = place.passes
        number = len(unfinished.segments) if unfinished else 0
        earlier = SparsityStatistics(**place.sparsity)
        before = SparsityStatistics(**vars(self.decoder.statistics))

        def sparsity() -> SparsityStatistics:
            now = vars(self.decoder.statistics)
            counted = SparsityStatistics(**{name: now[name] - getattr(before, name) for name in now})
            counted.add(earlier)
            return counted

        def pass_begins() -> None:
            if on_pass is not None:
                warnings = info.warnings[len(source.warnings) :]
                on_pass(asdict(replace(place, passes=info.passes, warnings=warnings, sparsity=vars(sparsity()))))

        try:
            for segment in self._passes(samples, speech, prompt, info, progress, place, pass_begins):
                place.covered += speech.between(max(segment.start, place.reached), segment.end)
                place.reached = max(segment.end, place.reached)
                info.coverage = place.covered / max(speech.total, 1e-9)
                start, end = segment.start + source.start, segment.end + source.start
                yield replace(segment, id=number, start=start, end=end)
                number += 1
            if speech.total == 0:
                info.stop_reason, info.coverage = "silence", 1.0
            if progress:
                progress("decode", info.duration, info.duration)
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{info.audio}: out of memory on {info.device} ({info.dtype}); lower max_pass_seconds or prefill_chunk"
            ) from error
        finally:
            info.stop_reason = info.stop_reason or "interrupted"
            info.sparsity = sparsity().to_dict()

    def _passes(
        self,
        samples: np.ndarray,
        speech: Speech,
        prompt: str | None,
        info: TranscriptionInfo,
        progress: Progress | None,
        place: Place,
        pass_begins: Callable[[], None],
    ) -> Iterator[Segment]:
        config, has_times = self.passes, self.adapter.parser.timed
        while speech.between(place.position, info.duration) > 0:
            pass_begins()
            position = place.position
            end = self._pass_end(speech, position, place.limit)
            info.passes += 1
            words = " ".join(filter(None, (prompt, place.carried[-config.carried_characters :]))) or None
            segments: list[Segment] = []
            steps = self._pass(samples, speech, position, end, words, info, progress)
            outcome = yield from collected(steps, segments, hold=not has_times)
            info.stop_reason, reason = outcome.reason, REASONS[outcome.reason]
            if not has_times and outcome.reason != "end" and end - position > config.retry_seconds:
                place.limit = (end - position) / 2  # again in halves; nothing of it was given out
                info.warnings.append(f"{clock(position)}: {reason}; again in shorter passes")
                continue
            if not has_times:
                yield from segments
            if self.adapter.carries_text:
                place.carried = " ".join(segment.text for segment in segments)

            done = outcome.reached - position
            if outcome.reason == "end" and speech.between(outcome.reached, end) < config.rest_seconds:
                place.position, place.limit = end, self.max_pass_seconds
            elif has_times and done >= config.min_progress_seconds:
                info.warnings.append(f"{clock(outcome.reached)}: {reason}; went on from there")
                # Not the whole rest after a pass that got over a small part of its audio.
                place.limit = min(max(4 * done, config.retry_seconds), self.max_pass_seconds)
                place.position = outcome.reached
            elif has_times and min(place.limit, end - position) > config.retry_seconds:
                place.limit = config.retry_seconds
            else:
                info.warnings.append(f"{clock(position)}-{clock(end)}: {reason}; the rest of it is missing")
                place.position, place.limit = end, min(config.retry_seconds, self.max_pass_seconds)
        if not has_times and info.passes:
            info.warnings.append(
                "the model gives no times: they are estimates, which a smaller max_pass_seconds narrows"
            )
        if has_times and info.passes > 1:
            info.warnings.append("speakers are told apart within a pass only: P2-S01, of pass 2, may be any of pass 1")

    def _pass_end(self, speech: Speech, start: float, limit: float) -> float:
        """In the quietest moment near the end of an even share of what is left."""
        left = speech.duration - start
        if left <= limit:
            return speech.duration
        share = min(1.05 * left / math.ceil(left / limit), limit)
        return speech.quietest(start + share - min(self.passes.cut_seconds, share / 6), start + share)

    def _pass(
        self,
        samples: np.ndarray,
        speech: Speech,
        start: float,
        end: float,
        prompt: str | None,
        info: TranscriptionInfo,
        progress: Progress | None,
    ) -> Generator[Segment, None, Outcome]:
        """Segments of [start, end); returns the Outcome."""
        part = samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        with clocked(info, "encode"):
            embeds = self.prompt_embeds(part, prompt, partial(progress, "encode") if progress else None)
        room = self.adapter.context - embeds.shape[1]
        if room <= 0:
            raise PipelineError(
                f"{info.audio}: {(end - start) / 60:.0f} minutes are {embeds.shape[1]} positions and {self.name} knows "
                f"{self.adapter.context}; lower max_pass_seconds"
            )
        budget = min(text_tokens(self.adapter, end - start), room)
        self._check_memory(embeds.shape[1] + budget, end - start, info)
        with clocked(info, "prefill"):
            self.prefill(embeds, embeds.shape[1] + budget, partial(progress, "prefill") if progress else None)
        parser, loops = self.adapter.parser(), LoopDetector()
        stream = TextStream(self.processor.tokenizer)
        placer = Placer(start, end, speech, info.passes)
        tokens = self.decoder.tokens(budget, self.stop_ids)
        looped, given = False, 0
        while True:
            with clocked(info, "decode"):
                token = next(tokens, None)
            if token is None:
                break
            for utterance in parser.push(stream.push(token)):
                confidence = math.exp(np.mean(self.decoder.log_probs[given:]))
                given = len(self.decoder.log_probs)
                yield from placer.push(utterance, confidence)
            if progress:
                progress("decode", placer.reached, info.duration)
            looped = bool(loops.push(token))
            if looped:
                tokens.close()
                break
        reason = "loop" if looped else self.decoder.stop_reason
        if reason == "end":
            for utterance in parser.close():
                logs = self.decoder.log_probs[given:]
                yield from placer.push(utterance, math.exp(np.mean(logs)) if logs else None)
        yield from placer.close(whole=reason == "end")
        return Outcome(reason, placer.reached)

    def prompt_embeds(self, samples: np.ndarray, prompt: str | None = None, progress: Any = None) -> Tensor:
        """[1, N, hidden]: the request for samples at 16 kHz, with the audio encoded a piece at a time."""
        adapter = self.adapter
        if adapter.sample_rate != SAMPLE_RATE:
            samples = resample(torch.from_numpy(samples), SAMPLE_RATE, adapter.sample_rate).numpy()
        inputs = adapter.request(self.processor, samples, prompt)
        features = []
        for piece, done, total in encode(adapter.encoding, self.model, inputs, self.passes.encode_windows):
            features.append(piece)
            if progress:
                progress(done, total)
        return insert(adapter.encoding, self.model, torch.as_tensor(inputs["input_ids"]), features)

    def prefill(self, embeds: Tensor, capacity: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Begin a sequence of `capacity` tokens with [1, N, hidden], in chunks of about the same length.

        The cache is allocated at once: it neither grows on the way nor fails after an hour.
        """
        length = embeds.shape[1]
        if self.adapter.chunked:
            # A chunk of one token would be taken for a decode step.
            self.decoder.prefill_chunk = math.ceil(length / math.ceil(length / self.prefill_chunk))
        self.decoder.capacity = max(self.decoder.capacity, capacity)
        self.decoder.step.reserve(capacity)
        self.decoder.reset()
        self.decoder.prefill(embeds, progress)

    def _check_memory(self, tokens: int, seconds: float, info: TranscriptionInfo) -> None:
        shape, adapter = shape_of(self.model), self.adapter
        settings = {"attention": self.attention, "dtype": self.model.dtype, "prefill_chunk": self.prefill_chunk}
        needed = estimate(adapter, seconds, shape, tokens=tokens, **settings).pass_bytes
        free = free_memory(self.model.device)
        if tokens > self.decoder.cache.capacity and free is not None and needed > free:
            fits = int(seconds * free / needed * 0.9)
            raise PipelineError(
                f"{info.audio}: {seconds / 60:.0f} minutes in one pass need {needed / 1e9:.1f} GB beside the weights "
                f"and {free / 1e9:.1f} GB are free on {info.device}; try max_pass_seconds={fits} or another device"
            )


def collected(
    steps: Generator[Segment, None, Outcome], segments: list[Segment], hold: bool
) -> Generator[Segment, None, Outcome]:
    """Put the segments of a pass into a list, give them out too unless `hold`, and return the pass's outcome."""
    while True:
        try:
            segment = next(steps)
        except StopIteration as stop:
            return stop.value
        segments.append(segment)
        if not hold:
            yield segment


class Placer:
    """From utterances of a pass to segments of the recording: times inside the pass, never running backwards."""

    def __init__(self, start: float, end: float, speech: Speech, number: int) -> None:
        self.start, self.end, self.speech, self.number = start, end, speech, number
        self.reached = start
        self._waiting: tuple[Utterance, float | None] | None = None  # without an end until the next one begins
        self._untimed: list[tuple[Utterance, float | None]] = []

    def push(self, utterance: Utterance, confidence: float | None) -> Iterator[Segment]:
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


class Speech:
    """Where a recording is loud enough to be speech, in frames of 20 ms: a rough guide to cut and to check by."""

    FRAME = 0.02  # s
    SMOOTH = 15  # frames over which loudness is averaged to find a pause
    THRESHOLD = 0.1  # of the loudness that 5 % of the frames exceed
    SILENCE = 1e-4  # loudness, of 1, below which nothing is speech

    def __init__(self, samples: np.ndarray) -> None:
        size = round(self.FRAME * SAMPLE_RATE)
        whole = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size) if len(samples) else np.zeros((1, size))
        loudness = np.sqrt(np.einsum("fs,fs->f", whole, whole) / size)
        loud = loudness > max(self.THRESHOLD * np.quantile(loudness, 0.95), self.SILENCE)
        self.duration = len(samples) / SAMPLE_RATE
        self._smooth = np.convolve(loudness, np.full(self.SMOOTH, 1 / self.SMOOTH), mode="same")[: len(loudness)]
        self._before = np.concatenate([[0.0], np.cumsum(loud) * self.FRAME])  # seconds of speech before each frame

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


@contextmanager
def clocked(info: TranscriptionInfo, stage: str) -> Iterator[None]:
    """Add the seconds of a block to a stage of the timings."""
    begin = time.perf_counter()
    yield
    info.timings[stage] += time.perf_counter() - begin


REASONS = {
    "end": "the text ended before the speech",
    "length": "the token limit was reached",
    "loop": "the text began to repeat itself",
}
