"""Complete transcripts of long recordings: passes of the LLM over the encoded audio, each checked against the audio.

A pass transcribes a span of the recording, and its text is placed in the audio while it is decoded. If the text ends
before the speech does, repeats itself, runs out of tokens or leaves out a stretch of speech, the next pass begins where
the placed text ends (`planner.py` says where exactly). A place that no pass gets over is skipped, and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unique_asr.decoding.engine import PENDING, Pending, Sequence
from unique_asr.longform.alignment import AlignmentConfig, SpeechFrames
from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.coverage import BREAKS, LongformReport, format_clock
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.pass_text import PassText
from unique_asr.longform.planner import Continuation, PassPlanner
from unique_asr.longform.segmentation import SegmentationConfig
from unique_asr.longform.tracking import TextTracker
from unique_asr.transcript import Progress, Segment, Word

Group = list[Word] | Pending  # the words of a segment; PENDING where the next token is
State = dict[str, Any]  # what a pass inherits from those before it: enough to go on with it later; for JSON


@dataclass
class PassContext:
    """What the passes over a recording, or over a section of it, work with."""

    encoded: Any
    sequence: Any  # a Sequence, which writes the text; of a recording whose passes run side by side, a list of them
    tracker: TextTracker  # where their text is placed
    report: LongformReport
    progress: Progress | None


class PassRunner:
    """Runs passes of the LLM over an encoded recording, one after the other.

    Args:
        model, processor: of `unique_asr.models.speech_llm`.
        prompt: the instruction for every pass; None: the processor's own.
        offset: the second of the file at which the recording begins; times count from the file's beginning.
        reads: records what the sparse steps of the sequence read.
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

    def run(
        self,
        encoded: Any,
        sequence: Sequence,
        report: LongformReport,
        progress: Progress | None = None,
        state: State | None = None,
        on_pass: Callable[[State], None] | None = None,
    ) -> Iterator[Segment | Pending]:
        """Yield segments as they are complete, and PENDING where the sequence's next token is.

        Args:
            encoded: an `EncodedAudio`.
            report: filled in on the way.
            on_pass: called with a state when a pass begins.
            state: such a state; transcription goes on with that pass, and gives the segments that it would have given.

        Raises:
            ValueError: if the state is that of another recording.
        """
        tracker = TextTracker(self.model, self.processor, encoded, self.alignment, self.config)
        frames = tracker.frames
        if len(frames.spikes) == 0:
            report.stop_reason, report.coverage = "silence", 1.0
            return
        for words in self._run_passes(PassContext(encoded, sequence, tracker, report, progress), state, on_pass):
            if words is PENDING:
                yield PENDING
                continue
            report.add_segment(frames, words[0].start, words[-1].end)
            report.add_confidence(words)
            yield self._make_segment(report.segments - 1, words)
        if progress:
            progress("decode", frames.duration, frames.duration)
        report.close_stretch()
        self._warn_of_omissions(tracker, report)

    def count_positions(self, encoded: Any) -> tuple[int, int]:
        """Return the most positions that a pass over this recording can have: of its prompt, and with its text."""
        frames = SpeechFrames(encoded, self.model.config.blank_id)
        length = min(len(frames), max(int(self.max_pass_seconds / frames.frame_seconds), 1))
        audio = _count_most(encoded.frames.cpu().numpy(), length)
        prompt = audio + sum(len(ids) for ids in self.processor.tokenize_prompt(self.prompt))
        return prompt, prompt + self.limit_tokens(_count_most(frames.spikes, length), length * frames.frame_seconds)

    def limit_tokens(self, spikes: int, seconds: float) -> int:
        """Return the most tokens that a pass over so much speech may write."""
        config = self.config
        return int(max(config.tokens_a_spike * spikes, config.tokens_a_second * seconds)) + config.spare_tokens

    @torch.no_grad()
    def embed_prompt(self, encoded: Any) -> Tensor:
        """Return the prompt with the audio's positions in it, [1, N, hidden]."""
        table = self.model.language_model.get_input_embeddings()
        before, after = (
            table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))
            for ids in self.processor.tokenize_prompt(self.prompt)
        )
        return torch.cat([before, encoded.embeds.to(before), after])[None]

    def _run_passes(
        self, context: PassContext, state: State | None, on_pass: Callable[[State], None] | None
    ) -> Iterator[Group]:
        """Groups of words, one a segment, of the whole recording."""
        yield from self._run_section(context, self._restore(state, context), on_pass)

    def _run_section(
        self, context: PassContext, planner: PassPlanner, on_pass: Callable[[State], None] | None = None
    ) -> Iterator[Group]:
        """The same of the section that a planner is for."""
        tracker, report, config = context.tracker, context.report, self.config
        while span := planner.plan():
            if on_pass:
                on_pass(self._make_state(context, tracker.frames.frame_at(span[0]), planner.limit))
            reason = yield from self._run_pass(context, *map(tracker.frames.frame_at, span))
            report.passes += 1
            report.stop_reason = reason
            spikes, seconds = tracker.measure_rest()
            if reason == "end" and (spikes < config.rest_spikes or seconds < config.rest_seconds):
                planner.complete()
                continue
            report.broken += 1
            reached = tracker.frames.seconds(tracker.cursor)
            if spikes == 0:
                self._warn(report, reached, f"{BREAKS[reason]} after the last word; dropped the rest of it")
                planner.leave_rest()
                continue
            match planner.continue_from(reached):
                case Continuation.CONTINUED:
                    self._warn(report, reached, f"{BREAKS[reason]}; went on from there")
                case Continuation.SKIPPED:
                    report.add_skipped(span[0], planner.start)

    def _run_pass(self, context: PassContext, start: int, end: int) -> Generator[Group, None, str]:
        """Groups of words, one a segment, of the frames [start, end). Returns why the pass stopped."""
        sequence, tracker, report, progress = context.sequence, context.tracker, context.report, context.progress
        frames = tracker.frames
        tracker.begin(start, end)
        limit = self.limit_tokens(frames.count(start, end), (end - start) * frames.frame_seconds)
        span = context.encoded.slice(start, end)
        with report.measure("prefill"):
            embeds = self.embed_prompt(span)
            sequence.reset()
            sequence.prefill(embeds, partial(progress, "prefill") if progress else None)
            if embeds.is_cuda:
                torch.cuda.current_stream(embeds.device).synchronize()
        if self.reads is not None:
            before = len(self.processor.tokenize_prompt(self.prompt)[0])
            seconds = (np.append(span.frames.cpu().numpy(), end - start) + start) * frames.frame_seconds
            self.reads.begin_pass(before, seconds, frames.duration, sequence.cache, self.offset)

        def report_progress() -> None:
            if progress:
                progress("decode", frames.seconds(tracker.cursor), frames.duration)

        how = report, self.config, self.segmentation, self.reads, report_progress
        text = PassText(self.processor.tokenizer, tracker, *how)
        tokens, written = sequence.tokens(limit, self.stop_ids), 0
        while text.broken is None:
            with report.measure("decode"):
                token = next(tokens, None)
            if token is PENDING:
                yield PENDING
                continue
            if token is None or token in self.stop_ids:
                break
            if self.reads is not None:
                self.reads.step(written)
            yield from text.push(token, sequence.log_probs[written])
            written += 1
        report.longest = max(report.longest, embeds.shape[1] + written)
        if text.broken is None and written < limit:
            yield from text.finish()
        yield from text.flush()
        return text.broken or ("length" if written >= limit else "end")

    def _restore(self, state: State | None, context: PassContext) -> PassPlanner:
        """A planner for the recording, or for what `state` left of it; tracker and report get their part."""
        frames, limit, start = context.tracker.frames, None, 0.0
        if state is not None:
            if state["frames"] != len(frames):
                raise ValueError("the recording is not the one that the transcription began with")
            context.tracker.restore(state["tracker"])
            vars(context.report).update(deepcopy(state["report"]))
            start, limit = state["start"] * frames.frame_seconds, state["limit"]
        return PassPlanner(frames, self.config, self.max_pass_seconds, start, frames.end, limit)

    @staticmethod
    def _make_state(context: PassContext, start: int, limit: float) -> State:
        """What `_restore` needs to go on with a pass that begins at a frame and lasts at most `limit` seconds."""
        return {
            "frames": len(context.tracker.frames),
            "start": start,
            "limit": float(limit),
            "tracker": context.tracker.make_state(),
            "report": asdict(context.report),
        }

    def _make_segment(self, index: int, words: list[Word]) -> Segment:
        text = " ".join(word.text for word in words)
        confidence = float(np.mean([word.confidence for word in words]))
        if self.offset:
            words = [replace(word, start=word.start + self.offset, end=word.end + self.offset) for word in words]
        return Segment(index, words[0].start, words[-1].end, text, words, confidence)

    def _warn_of_omissions(self, tracker: TextTracker, report: LongformReport) -> None:
        """Say what speech has no text, and what text had no speech."""
        if report.coverage < self.config.min_coverage:
            report.warnings.append(f"coverage is {100 * report.coverage:.0f} %: some of the speech has no text")
        for start, end in report.skipped:
            first, last = (format_clock(seconds + self.offset) for seconds in (start, end))
            report.warnings.append(f"{first}-{last}: skipped, no pass over it got on")
        for second, text in tracker.dropped:
            shown = text if len(text) <= 60 else text[:57] + "..."
            self._warn(report, second, f"dropped text that was not said: {shown!r}")

    def _warn(self, report: LongformReport, seconds: float, message: str) -> None:
        report.warnings.append(f"{format_clock(seconds + self.offset)}: {message}")


def _count_most(frames: np.ndarray, length: int) -> int:
    """The most of some increasing frames that any `length` consecutive ones hold."""
    return int((np.searchsorted(frames, frames + length) - np.arange(len(frames))).max()) if len(frames) else 0
