"""Passes of an LLM over what a listener heard: up to an hour in one, its text placed by the words heard.

A text that repeats itself, or goes on without anything that was heard, is broken off; the next pass begins with the
first word heard that it has not written. Where two passes in a row come to nothing, some words are taken as they were
heard. So no stretch of speech that was heard is missing from a transcript: a text may leave out `min_progress` words at
its end, as it may correct any others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import exp
from statistics import fmean
from typing import Any

import numpy as np
import torch

from unique_asr.decoding.engine import PENDING, Pending
from unique_asr.longform.coverage import LongformReport, format_clock
from unique_asr.longform.heard_alignment import Placed, normalize_word, place_words, time_words
from unique_asr.longform.loops import LoopDetector
from unique_asr.longform.segmentation import DraftWord, SegmentationConfig, Segmenter, WordStream
from unique_asr.models.listening_llm import HeardSpeech, HeardWord
from unique_asr.transcript import Progress, Segment, Word

State = dict[str, Any]  # what a pass inherits from those before it, for JSON


@dataclass(frozen=True)
class HeardPassConfig:
    """Settings of passes over words heard."""

    max_pass_seconds: float | None = None  # None: what the model was trained for
    tokens_a_token: float = 1.5  # most tokens that a pass may write for each token heard,
    spare_tokens: int = 64  # and these on top
    max_words: int = 40  # text without a sentence's end is placed in pieces of so many words
    min_words: int = 6  # sentences are placed together until they have as many
    lost_words: int = 60  # text without anything that was heard, before a pass is broken off
    min_progress: int = 8  # words heard that a pass has to get over to be of use
    skipped_words: int = 40  # words that are taken as they were heard where two passes came to nothing


@dataclass
class HeardPassText:
    """The text of one pass on its way from tokens to words with times."""

    words: WordStream
    loops: LoopDetector = field(default_factory=LoopDetector)
    drafts: list[DraftWord] = field(default_factory=list)  # that have no place yet
    ended: bool = False
    broken: str | None = None


class HeardPassRunner:
    """Runs passes of the LLM over what was heard, one after the other.

    Args:
        model, processor: of `unique_asr.models.listening_llm`.
        hotwords: names that may occur.
        offset: the second of the file at which the recording begins; times count from the file's beginning.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: HeardPassConfig | None = None,
        segmentation: SegmentationConfig | None = None,
        hotwords: Sequence[str] = (),
        offset: float = 0.0,
    ) -> None:
        self.model, self.processor, self.hotwords, self.offset = model, processor, hotwords, offset
        self.config, self.segmentation = config or HeardPassConfig(), segmentation or SegmentationConfig()
        self.stop_ids = {processor.prompt.end_token_id}

    @property
    def max_pass_seconds(self) -> float:
        """Audio in one pass, at most."""
        return self.config.max_pass_seconds or self.model.config.max_pass_seconds

    def count_positions(self, heard: HeardSpeech) -> tuple[int, int]:
        """Count the most positions that a pass can have: of its prompt, and with its text."""
        longest = 0
        for start, end in heard.split(self.max_pass_seconds):
            longest = max(longest, len(self.make_prompt(heard.select(start, end))))
        return longest, longest + self.limit_tokens(longest)

    def limit_tokens(self, heard: int) -> int:
        """The most tokens that a pass may write, for the number of tokens that were heard."""
        return int(self.config.tokens_a_token * heard) + self.config.spare_tokens

    def make_prompt(self, words: Sequence[HeardWord]) -> list[int]:
        """The token ids that the LLM reads of the words heard."""
        prompt = self.processor.prompt
        return prompt.make(prompt.tokenize_heard(words).ids, self.hotwords)

    def run(
        self,
        heard: HeardSpeech,
        sequence: Any,
        report: LongformReport,
        progress: Progress | None = None,
        state: State | None = None,
        on_pass: Callable[[State], None] | None = None,
    ) -> Iterator[Segment | Pending]:
        """Yield segments as they are complete, and PENDING where the sequence's next token is.

        Args:
            report: filled in on the way.
            on_pass: called with a state when a pass begins.
            state: such a state; transcription goes on with that pass.

        Raises:
            ValueError: the state is that of another recording.
        """
        words = heard.words
        if not words:
            report.stop_reason, report.coverage = "silence", 1.0
            return
        cursor = failed = 0
        if state is not None:
            if state["words"] != len(words):
                raise ValueError("the recording is not the one that the transcription began with")
            cursor, failed = state["cursor"], state["failed"]
            vars(report).update(deepcopy(state["report"]))
        ends = [end for _, end in heard.split(self.max_pass_seconds)]
        covered = cursor
        while cursor < len(words):
            end = next((end for end in ends if words[cursor].start < end), heard.duration)
            last = next((index for index in range(cursor, len(words)) if words[index].start >= end), len(words))
            if on_pass:
                on_pass({"words": len(words), "cursor": cursor, "failed": failed, "report": asdict(report)})
            begin = cursor
            for group in self._run_pass(heard, cursor, last, sequence, report, progress):
                if isinstance(group, int):
                    cursor = group
                    report.coverage = (covered + cursor - begin) / len(words)
                elif group is PENDING:
                    yield PENDING
                else:
                    report.segments += 1
                    yield self._make_segment(report.segments - 1, group)
            report.passes += 1
            if report.stop_reason == "end" and cursor >= last - self.config.min_progress:
                covered += cursor - begin
                cursor, failed = last, 0
                continue
            report.broken += 1
            covered += cursor - begin
            failed = failed + 1 if cursor - begin < self.config.min_progress else 0
            where = format_clock(words[min(cursor, len(words) - 1)].start + self.offset)
            if failed < 2:
                report.warnings.append(f"{where}: the text broke off ({report.stop_reason}); went on from there")
                continue
            taken = words[cursor : min(cursor + self.config.skipped_words, last)]
            report.warnings.append(f"{where}: {len(taken)} words are as they were heard: no pass got over them")
            report.segments += 1
            yield self._make_segment(report.segments - 1, [self._as_heard(word) for word in taken])
            cursor, failed = cursor + len(taken), 0
            covered += len(taken)
            report.coverage = covered / len(words)
        if progress:
            progress("decode", heard.duration, heard.duration)

    def _run_pass(
        self,
        heard: HeardSpeech,
        cursor: int,
        last: int,
        sequence: Any,
        report: LongformReport,
        progress: Progress | None,
    ) -> Generator[list[Word] | Pending | int, None, None]:
        """Yield groups of words, one a segment, of the words heard [cursor, last), and before them where the text is.

        Where it is: the index of the first word heard that it has not come to.
        """
        spoken = [normalize_word(word.text) for word in heard.words[:last]]
        ids = self.make_prompt(heard.words[cursor:last])
        limit = self.limit_tokens(len(ids))
        with report.measure("prefill"), torch.no_grad():
            table = self.model.get_input_embeddings()
            embeds = table(torch.tensor([ids], device=table.weight.device))
            sequence.reset()
            sequence.prefill(embeds, partial(progress, "prefill") if progress else None)
        text, segmenter = HeardPassText(WordStream(self.processor.tokenizer)), Segmenter(self.segmentation)
        tokens, written = sequence.tokens(limit, self.stop_ids), 0
        while text.broken is None:
            with report.measure("decode"):
                token = next(tokens, None)
            if token is PENDING:
                yield PENDING
                continue
            if token is None or token in self.stop_ids:
                break
            text.drafts += text.words.push(token, sequence.log_probs[written])
            written += 1
            if text.loops.push(token):
                text.broken = "loop"
                break
            if self._is_worth_placing(text.drafts):
                cursor, placed = self._place(text, heard, spoken, cursor)
                yield cursor
                if progress:
                    progress("decode", heard.words[min(cursor, last - 1)].start, heard.duration)
                for draft, word in placed:
                    yield from segmenter.push(word, draft.ends_sentence)
                if len(text.drafts) >= self.config.lost_words:
                    text.broken = "lost"
        report.longest = max(report.longest, len(ids) + written)
        if text.broken is None:
            text.drafts += text.words.flush()
            text.ended = True
        cursor, placed = self._place(text, heard, spoken, cursor)
        yield cursor
        for draft, word in placed:
            yield from segmenter.push(word, draft.ends_sentence)
        yield from segmenter.flush()
        report.stop_reason = text.broken or ("length" if written >= limit else "end")

    def _is_worth_placing(self, drafts: Sequence[DraftWord]) -> bool:
        if len(drafts) >= self.config.max_words:
            return True
        return len(drafts) >= self.config.min_words and drafts[-1].ends_sentence

    def _place(
        self, text: HeardPassText, heard: HeardSpeech, spoken: Sequence[str], cursor: int
    ) -> tuple[int, list[tuple[DraftWord, Word]]]:
        """Place the words that wait; return the new cursor and the words with their times.

        Words after the last one that was heard go on waiting, unless text and speech have ended: they may be of none.
        """
        drafts = text.drafts
        if not drafts:
            return cursor, []
        written = [normalize_word(draft.text) for draft in drafts]
        placed = place_words(written, spoken, cursor)
        kept = max((index + 1 for index, place in enumerate(placed.places) if place >= 0), default=0)
        left = len(spoken) - (placed.places[kept - 1] + 1 if kept else cursor)  # words heard after the last agreement
        if text.ended and left <= len(drafts) - kept + self.config.min_progress:
            text.drafts = []
        else:
            drafts, text.drafts = drafts[:kept], drafts[kept:]
            placed = Placed(placed.places[:kept], len(spoken) - left)
        times = time_words(placed, heard.words, cursor, heard.duration)
        words = []
        for draft, (start, end), place in zip(drafts, times, placed.places, strict=True):
            witnesses = [exp(fmean(draft.log_probs))] if draft.log_probs else []
            witnesses += [heard.words[place].confidence] if place >= 0 else []
            words.append((draft, Word(draft.text, start, end, float(np.mean(witnesses)) if witnesses else 0.0)))
        return placed.cursor, words

    @staticmethod
    def _as_heard(word: HeardWord) -> Word:
        return Word(word.text.strip(), word.start, word.end, word.confidence)

    def _make_segment(self, index: int, words: list[Word]) -> Segment:
        text = " ".join(word.text for word in words)
        confidence = float(np.mean([word.confidence for word in words]))
        if self.offset:
            words = [replace(word, start=word.start + self.offset, end=word.end + self.offset) for word in words]
        return Segment(index, words[0].start, words[-1].end, text, words, confidence)
