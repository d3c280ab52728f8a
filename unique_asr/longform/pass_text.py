"""The text of one pass on its way from tokens to segments: words, their places in the audio, and where segments end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.loops import LoopDetector
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.segmentation import DraftWord, SegmentationConfig, Segmenter, WordStream
from unique_asr.longform.tracking import TextTracker
from unique_asr.transcript import Word


class PassText:
    """Tokens of one pass in, groups of words with times out, one group a segment.

    Words are placed a sentence or some at a time. `broken` says why it is of no use to go on: "loop", "gap" or "lost",
    see `unique_asr.transcript.STOP_REASONS`.

    Args:
        on_placed: called whenever words were looked for in the audio.
    """

    def __init__(
        self,
        tokenizer: Any,
        tracker: TextTracker,
        report: LongformReport,
        config: LongformConfig,
        segmentation: SegmentationConfig,
        reads: PageReads | None,
        on_placed: Callable[[], None],
    ) -> None:
        self.tracker, self.report, self.config, self.reads, self.on_placed = tracker, report, config, reads, on_placed
        self.words, self.loops, self.segmenter = WordStream(tokenizer), LoopDetector(), Segmenter(segmentation)
        self.broken: str | None = None
        self._drafts: list[DraftWord] = []  # that were not looked for in the audio yet

    def push(self, token: int, log_prob: float) -> Iterator[list[Word]]:
        """Yield the segments that a token completes."""
        self._drafts += self.words.push(token, log_prob)
        if repeated := self.loops.push(token):
            yield from self._place()
            if self.tracker.waiting_tokens + self.words.open_tokens >= repeated / 2:
                self.broken = "loop"
                return
            self.loops.reset()  # it was said so
        elif self._is_worth_placing():
            yield from self._place()
        if self.tracker.gap:
            self.broken = "gap"
        elif self.tracker.is_lost():
            self.broken = "lost"

    def finish(self) -> Iterator[list[Word]]:
        """Yield the segments that are complete because the text is; it may turn out that it left speech out."""
        self._drafts += self.words.flush()
        yield from self._place()
        if self.tracker.gap:
            self.broken = "gap"
        else:
            yield from self._cut(self.tracker.finish())

    def flush(self) -> Iterator[list[Word]]:
        """Yield the segment that is open."""
        yield from self.segmenter.flush()

    def _is_worth_placing(self) -> bool:
        drafts = self._drafts
        if len(drafts) >= self.config.max_align_words:
            return True
        if not drafts or not drafts[-1].ends_sentence:
            return False
        return sum(max(len(word.log_probs), 1) for word in drafts) >= self.config.min_align_tokens

    def _place(self) -> Iterator[list[Word]]:
        drafts, self._drafts = self._drafts, []
        with self.report.measure("align"):
            placed = self.tracker.place(drafts) if drafts else []
        self.on_placed()
        yield from self._cut(placed)

    def _cut(self, placed: list[tuple[DraftWord, Word]]) -> Iterator[list[Word]]:
        for draft, word in placed:
            if self.reads is not None:
                self.reads.place(draft.first, draft.last, word.start, word.end)
            yield from self.segmenter.push(word, draft.ends_sentence)
