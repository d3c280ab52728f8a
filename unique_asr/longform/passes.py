"""Complete transcripts of long recordings: passes of the LLM over the encoded audio, each checked against the audio.

A pass transcribes a span of the recording and its text is aligned as it is decoded. If the text ends before the speech
does, loops, runs out of tokens or leaves out a stretch of speech, the next pass begins where the aligned text ends. A
place that no pass gets over is skipped, and reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unique_asr.decoding.engine import PENDING, Pending, Sequence
from unique_asr.longform.alignment import AlignmentConfig, SpeechFrames
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.segmentation import DraftWord, SegmentationConfig, Segmenter, WordStream
from unique_asr.longform.tracking import TextTracker
from unique_asr.transcript import Segment, Word

Progress = Callable[[str, float, float], None]  # stage, done, total
Group = list[Word] | Pending  # the words of a segment; PENDING where the next token is
State = dict[str, Any]  # what a pass inherits from those before it: enough to go on with it later; for JSON


@dataclass(frozen=True)
class LongformConfig:
    """Spikes are CTC spikes, about one token of speech each, three a second."""

    max_pass_seconds: float | None = None  # None: what the model was trained for
    cut_seconds: float = 30.0  # a pass that is not the last one ends in the longest pause of its last seconds
    retry_pass_seconds: float = 30.0  # a pass that made no progress is tried again on this much audio
    skip_seconds: float = 10.0  # audio that is skipped when that fails too
    min_progress_seconds: float = 2.0  # less than this is no progress
    rest_seconds: float = 2.0  # speech after the end of the text that is worth another pass: seconds,
    rest_spikes: int = 6  # and spikes
    gap_spikes: int = 40  # speech that a text may leave out before the pass is broken off to go back
    lost_tokens: int = 120  # text that may fit nowhere nearby before the pass is broken off to go back
    returns: int = 2  # times that passes go back to the same place; the second time, on less audio
    tokens_a_second: float = 5.0  # token budget of a pass: the larger of these two,
    tokens_a_spike: float = 2.0
    spare_tokens: int = 64  # and these on top
    min_align_tokens: int = 8  # sentences are aligned together until they have as many
    max_align_words: int = 40  # text without a sentence's end is aligned in pieces of as many words
    min_coverage: float = 0.95  # less is worth a warning
    search_spikes: int = 240  # how far ahead a text is looked for that does not fit nearby


@dataclass
class Place:
    """Where passes begin."""

    start: int  # frame
    limit: float  # seconds of audio that the first pass may have
    retried: bool = False  # whether it is the second one over the same audio


@dataclass
class LongformReport:
    """How a transcription went; complete once its segments are exhausted."""

    stop_reason: str = ""  # of the last pass: end, length, loop, gap, lost; silence if there was no speech
    passes: int = 0
    broken: int = 0  # passes that did not get to their end: the next one went on from where they came to, or went back
    longest: int = 0  # positions of the longest pass, prompt and text
    coverage: float = 0.0  # share of the recording's spikes that lie in a segment so far
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0, "align": 0.0})
    skipped: list[tuple[float, float]] = field(default_factory=list)  # seconds that no pass got over
    segments: int = 0
    covered: int = 0  # spikes in a segment
    counted: int = 0  # frames: the spikes before this one are counted

    def skip(self, start: float, end: float) -> None:
        if self.skipped and self.skipped[-1][1] == start:
            start = self.skipped.pop()[0]
        self.skipped.append((start, end))

    def add(self, later: LongformReport) -> None:
        """Passes over the audio that follows."""
        self.stop_reason = later.stop_reason or self.stop_reason
        self.passes += later.passes
        self.broken += later.broken
        self.longest = max(self.longest, later.longest)
        self.warnings += later.warnings
        for start, end in later.skipped:
            self.skip(start, end)
        for stage, seconds in later.timings.items():
            self.timings[stage] += seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timings[stage] += time.perf_counter() - begin


@dataclass
class Work:
    """What passes over a recording, or over a section of it, work with."""

    encoded: Any
    sequence: Any  # a Sequence, which writes the text; of a recording whose passes run side by side, a list of them
    tracker: TextTracker  # where their text is placed
    report: LongformReport
    progress: Progress | None


class LoopDetector:
    """Finds repetition at the end of a token sequence, of any period up to max_period, at a small cost a token."""

    def __init__(self, max_period: int = 30, min_copies: int = 4, min_tokens: int = 24) -> None:
        self.max_period = max_period
        self.needed = [max(min_tokens, (min_copies - 1) * period) for period in range(1, max_period + 1)]
        self.reset()

    def reset(self) -> None:
        self._history: list[int] = []  # the last token first
        self._matches: dict[int, int] = {}  # by period less 1: the last tokens that equal the one a period before

    def push(self, token: int) -> int:
        """The number of tokens in the repetition, 0 if there is none or it is still short."""
        equal = [index for index, before in enumerate(self._history) if before == token]
        self._matches = {index: self._matches.get(index, 0) + 1 for index in equal}
        self._history = [token, *self._history[: self.max_period - 1]]
        return next((n + index + 1 for index, n in self._matches.items() if n >= self.needed[index]), 0)


class LongformTranscriber:
    """Transcribes an encoded recording with any decoder.

    `prompt` is the processor's instruction for every pass; `offset` the second of the file at which the recording
    begins: times count from the file's beginning. `reads` records what the decoder's sparse steps read.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: LongformConfig | None = None,
        alignment: AlignmentConfig | None = None,
        segmentation: SegmentationConfig | None = None,
        prompt: str | None = None,
        offset: float = 0.0,
        reads: PageReads | None = None,
    ) -> None:
        self.model, self.processor, self.prompt, self.offset, self.reads = model, processor, prompt, offset, reads
        self.config = config or LongformConfig()
        self.alignment = alignment or AlignmentConfig()
        self.segmentation = segmentation or SegmentationConfig()
        eos = processor.tokenizer.eos_token_id
        self.stop_ids = {processor.end_token_id} | ({eos} if isinstance(eos, int) else set())

    @property
    def max_pass_seconds(self) -> float:
        return self.config.max_pass_seconds or self.model.config.max_pass_seconds

    @torch.no_grad()
    def prompt_embeds(self, encoded: Any) -> Tensor:
        """[1, N, hidden]: the prompt with the audio's positions in it."""
        table = self.model.language_model.get_input_embeddings()
        before, after = (
            table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))
            for ids in self.processor.tokenize_prompt(self.prompt)
        )
        return torch.cat([before, encoded.embeds.to(before), after])[None]

    def token_budget(self, spikes: int, seconds: float) -> int:
        config = self.config
        return int(max(config.tokens_a_spike * spikes, config.tokens_a_second * seconds)) + config.spare_tokens

    def capacity(self, encoded: Any) -> int:
        """The most tokens, prompt and text, that a pass over this recording can need."""
        frames = SpeechFrames(encoded, self.model.config.blank_id)
        length = self._pass_frames(frames, self.max_pass_seconds)
        positions = encoded.frames.cpu().numpy()
        prompt = sum(len(ids) for ids in self.processor.tokenize_prompt(self.prompt))
        budget = self.token_budget(_most_within(frames.spikes, length), length * frames.frame_seconds)
        return prompt + _most_within(positions, length) + budget

    def transcribe(
        self,
        encoded: Any,
        sequence: Sequence,
        report: LongformReport,
        progress: Progress | None = None,
        state: State | None = None,
        on_pass: Callable[[State], None] | None = None,
    ) -> Iterator[Segment | Pending]:
        """Segments as they are complete, and PENDING where the next token is; `report` is filled in.

        on_pass: called with a state when a pass begins. Given such a state, transcription goes on with that pass, and
        its segments are those that it would have given.
        """
        tracker = TextTracker(self.model, self.processor, encoded, self.alignment, self.config)
        frames = tracker.frames
        spikes = frames.spikes
        if len(spikes) == 0:
            report.stop_reason, report.coverage = "silence", 1.0
            return
        for words in self._passes(Work(encoded, sequence, tracker, report, progress), state, on_pass):
            if words is PENDING:
                yield PENDING
                continue
            start, end = words[0].start, words[-1].end
            confidence = float(np.mean([word.confidence for word in words]))
            text = " ".join(word.text for word in words)
            low, high = (round(time / frames.frame_seconds) for time in (start, end))
            report.covered += frames.count(max(low, report.counted), high + 1)
            report.counted = max(high + 1, report.counted)
            report.coverage = report.covered / len(spikes)
            report.segments += 1
            yield self._segment(report.segments - 1, text, words, confidence)
        if progress:
            progress("decode", frames.duration, frames.duration)
        if report.coverage < self.config.min_coverage:
            report.warnings.append(f"coverage is {100 * report.coverage:.0f} %: some of the speech has no text")
        for start, end in report.skipped:
            report.warnings.append(f"{self._clock(start)}-{self._clock(end)}: skipped, no pass over it got on")
        for second, text in tracker.dropped:
            shown = text if len(text) <= 60 else text[:57] + "..."
            report.warnings.append(f"{self._clock(second)}: dropped text that was not said: {shown!r}")

    def _segment(self, index: int, text: str, words: list[Word], confidence: float) -> Segment:
        if self.offset:
            words = [replace(word, start=word.start + self.offset, end=word.end + self.offset) for word in words]
        return Segment(index, words[0].start, words[-1].end, text, words, confidence)

    def _clock(self, seconds: float) -> str:
        return clock(seconds + self.offset)

    def _passes(self, work: Work, state: State | None, on_pass: Callable[[State], None] | None) -> Iterator[Group]:
        """Groups of words, one a segment, of the whole recording."""
        place = self._restored(state, work)
        yield from self._passes_over(work, place, len(work.tracker.frames), on_pass)

    def _restored(self, state: State | None, work: Work) -> Place:
        """Where to begin, with what earlier passes left in `state` given to the tracker and the report."""
        if state is None:
            return Place(0, self.max_pass_seconds)
        if state["frames"] != len(work.tracker.frames):
            raise ValueError("the recording is not the one that the transcription began with")
        work.tracker.restore(state["tracker"])
        vars(work.report).update(deepcopy(state["report"]))
        return Place(state["start"], state["limit"], state["retried"])

    @staticmethod
    def _state(place: Place, work: Work) -> State:
        """What `_restored` needs to go on from a place."""
        values = {"start": int(place.start), "retried": place.retried, "limit": float(place.limit)}
        text = {"tracker": work.tracker.state(), "report": asdict(work.report)}
        return {"frames": len(work.tracker.frames), **values, **text}

    def _passes_over(
        self, work: Work, place: Place, stop: int, on_pass: Callable[[State], None] | None = None
    ) -> Iterator[Group]:
        """The same from a place to the frame `stop`."""
        tracker, report, frames, config = work.tracker, work.report, work.tracker.frames, self.config
        start, limit, retried = place.start, place.limit, place.retried
        while (first := frames.next_spike(start)) < stop:
            end = self._pass_end(frames, start, stop, limit)
            if first >= end:
                start = end
                continue
            if on_pass:
                on_pass(self._state(Place(start, limit, retried), work))
            reason = yield from self._pass(work, start, end)
            report.passes += 1
            report.stop_reason = reason
            spikes, seconds = tracker.rest()
            if reason == "end" and (spikes < config.rest_spikes or seconds < config.rest_seconds):
                start, retried, limit = end, False, self.max_pass_seconds
                continue
            report.broken += 1
            reached = frames.seconds(tracker.cursor)
            if spikes == 0:
                report.warnings.append(
                    f"{self._clock(reached)}: {_REASONS[reason]} after the last word; dropped the rest of it"
                )
                start = end
                continue
            done = reached - frames.seconds(start)
            if done >= config.min_progress_seconds:
                # Not the whole rest after a pass that got over a small part of its audio.
                limit = min(max(4 * done, config.retry_pass_seconds), self.max_pass_seconds)
                report.warnings.append(f"{self._clock(reached)}: {_REASONS[reason]}; went on from there")
                start, retried = self._between(frames, tracker.cursor), False
            elif not retried and frames.seconds(end) - frames.seconds(start) > config.retry_pass_seconds:
                limit, retried = config.retry_pass_seconds, True
            else:
                skip = start + int(config.skip_seconds / frames.frame_seconds)
                end = min(max(frames.pause(skip, skip + skip - start), tracker.cursor + 1), stop)
                limit, retried = config.retry_pass_seconds, True
                report.skip(frames.seconds(start), frames.seconds(end))
                start = end

    def _pass(self, work: Work, start: int, end: int) -> Generator[Group, None, str]:
        """Groups of words, one a segment, of the frames [start, end). Returns why the pass stopped."""
        sequence, tracker, report, progress = work.sequence, work.tracker, work.report, work.progress
        frames = tracker.frames
        tracker.begin(start, end)
        budget = self.token_budget(frames.count(start, end), (end - start) * frames.frame_seconds)
        with report.timed("prefill"):
            span = work.encoded.slice(start, end)
            embeds = self.prompt_embeds(span)
            sequence.reset()
            sequence.prefill(embeds, partial(progress, "prefill") if progress else None)
            if embeds.is_cuda:
                torch.cuda.current_stream(embeds.device).synchronize()
        words, loops, segmenter = WordStream(self.processor.tokenizer), LoopDetector(), Segmenter(self.segmentation)
        pending: list[DraftWord] = []
        reads = self.reads
        if reads is not None:
            before = len(self.processor.tokenize_prompt(self.prompt)[0])
            seconds = (np.append(span.frames.cpu().numpy(), end - start) + start) * frames.frame_seconds
            reads.begin_pass(before, seconds, frames.duration, sequence.cache, self.offset)

        def cut(placed: list[tuple[DraftWord, Word]]) -> Iterator[list[Word]]:
            for draft, word in placed:
                if reads is not None:
                    reads.place(draft.first, draft.last, word.start, word.end)
                yield from segmenter.push(word, draft.ends_sentence)

        def place(drafts: list[DraftWord]) -> Iterator[list[Word]]:
            with report.timed("align"):
                placed = tracker.place(drafts) if drafts else []
            drafts.clear()
            if progress:
                progress("decode", frames.seconds(tracker.cursor), frames.duration)
            yield from cut(placed)

        reason, written = "end", 0
        tokens = sequence.tokens(budget, self.stop_ids)
        while True:
            with report.timed("decode"):
                token = next(tokens, None)
            if token is PENDING:
                yield PENDING
                continue
            if token is None or token in self.stop_ids:
                reason = "length" if written >= budget else "end"
                break
            if reads is not None:
                reads.step(written)
            pending += words.push(token, sequence.log_probs[written])
            written += 1
            if repeated := loops.push(token):
                yield from place(pending)
                if tracker.waiting_tokens + words.held_tokens >= repeated / 2:
                    reason = "loop"
                    break
                loops.reset()
            elif self._worth_aligning(pending):
                yield from place(pending)
            if tracker.gap:
                reason = "gap"
                break
            if tracker.lost():
                reason = "lost"
                break
        report.longest = max(report.longest, embeds.shape[1] + written)
        if reason == "end":
            yield from place(pending + words.flush())
            reason = "gap" if tracker.gap else "end"
        if reason == "end":
            yield from cut(tracker.finish())
        yield from segmenter.flush()
        return reason

    def _worth_aligning(self, pending: list[DraftWord]) -> bool:
        if len(pending) >= self.config.max_align_words:
            return True
        if not pending or not pending[-1].ends_sentence:
            return False
        return sum(max(len(word.log_probs), 1) for word in pending) >= self.config.min_align_tokens

    @staticmethod
    def _pass_frames(frames: SpeechFrames, seconds: float) -> int:
        return min(len(frames), max(int(seconds / frames.frame_seconds), 1))

    def _pass_end(self, frames: SpeechFrames, start: int, stop: int, seconds: float) -> int:
        """The end of a pass of at most `seconds`: in the longest pause near the end of an even share of what is left
        before the frame `stop`.
        """
        most, left = self._pass_frames(frames, seconds), stop - start
        if left <= most:
            return stop
        share = min(int(1.05 * left / np.ceil(left / most)), most)
        search = min(int(self.config.cut_seconds / frames.frame_seconds), share // 6)
        return frames.pause(start + share - search, start + share)

    @staticmethod
    def _between(frames: SpeechFrames, cursor: int) -> int:
        """Halfway to the next speech: where a pass that goes on begins."""
        return (cursor + frames.next_spike(cursor)) // 2


_REASONS = {
    "end": "the text ended before the speech",
    "length": "the token budget ran out",
    "loop": "the text began to repeat itself",
    "gap": "the text left out speech",
    "lost": "the text was not what was said",
}


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _most_within(frames: np.ndarray, length: int) -> int:
    """The most of some increasing frames that any `length` consecutive ones hold."""
    return int((np.searchsorted(frames, frames + length) - np.arange(len(frames))).max()) if len(frames) else 0
