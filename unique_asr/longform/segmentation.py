"""From the LLM's tokens to words, and from words with times to segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any

from unique_asr.sentences import CLOSING, ends_sentence
from unique_asr.transcript import Word


@dataclass(frozen=True)
class SegmentationConfig:
    """Where segments end."""

    pause_seconds: float = 1.0  # a silence that ends a segment even inside a sentence
    max_segment_seconds: float = 15.0  # longer sentences are cut at a comma or at their longest pause


@dataclass
class DraftWord:
    """A word as the LLM wrote it, not yet placed in the audio."""

    text: str
    log_probs: list[float] = field(default_factory=list)  # one for each token
    ends_sentence: bool = False
    first: int = 0  # index of its first token in the text
    last: int = 0  # index of its last token


class WordStream:
    """Words from tokens as they are decoded; a word is given out when the one after it begins.

    Marks before the first word are dropped: a pass that begins inside a sentence may begin with the end of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._texts: dict[tuple[int, ...], str] = {}  # of few tokens, which recur
        self._context = self._read = 0  # ids[context:read] are shown, as context for the ids after them
        self._words: list[DraftWord] = []  # complete but the last
        self._open = False  # whether the last word can still grow
        self._begun = False  # whether a word was given out

    def push(self, token: int, log_prob: float) -> list[DraftWord]:
        """Add a token; return the words that it completes."""
        self._ids.append(token)
        shown = self._decode(self._context, self._read)
        text = self._decode(self._context, len(self._ids))
        if text.endswith("\ufffd") and len(self._ids) - self._read < 8:  # a character of several tokens
            return []
        added = text[len(shown) :]
        self._context, self._read = self._read, len(self._ids)
        if added[:1].isspace():
            self._open = False
        for index, part in enumerate(added.split()):
            if self._open and index == 0:
                self._words[-1].text += part
            else:
                self._words.append(DraftWord(part, first=len(self._ids) - 1))
        if self._words:
            self._words[-1].log_probs.append(log_prob)
            self._words[-1].last = len(self._ids) - 1
        self._open = not added[-1:].isspace() if added else self._open
        return self._complete(keep=1)

    @property
    def open_tokens(self) -> int:
        """Tokens of the words that are not given out yet."""
        return sum(len(word.log_probs) for word in self._words)

    def flush(self) -> list[DraftWord]:
        """Return the words that are left at the end of the text."""
        return self._complete(keep=0)

    def _complete(self, keep: int) -> list[DraftWord]:
        """All but the last `keep` words: the last one may grow, and tells whether the one before it ends a sentence."""
        done = self._words[: len(self._words) - keep]
        for index, word in enumerate(done):
            following = self._words[index + 1].text if index + 1 < len(self._words) else None
            word.ends_sentence = ends_sentence(word.text, following)
        del self._words[: len(done)]
        if not self._begun:
            done = list(dropwhile(lambda word: not any(map(str.isalnum, word.text)), done))
            self._begun = bool(done)
        return done

    def _decode(self, start: int, end: int) -> str:
        ids = tuple(self._ids[start:end])
        if ids not in self._texts:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            self._texts[ids] = self.tokenizer.decode(list(ids), **options)
        return self._texts[ids]


class Segmenter:
    """Groups of words, one a segment: cut after sentences and at long pauses, none longer than max_segment_seconds."""

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        self._words: list[Word] = []

    def push(self, word: Word, ends_sentence: bool) -> Iterator[list[Word]]:
        """Add a word; yield the groups that are complete."""
        if self._words and word.start - self._words[-1].end > self.config.pause_seconds:
            yield from self.flush()
        self._words.append(word)
        while len(self._words) > 1 and self._words[-1].end - self._words[0].start > self.config.max_segment_seconds:
            cut = self._cut()
            yield self._words[:cut]
            self._words = self._words[cut:]
        if ends_sentence:
            yield from self.flush()

    def flush(self) -> Iterator[list[Word]]:
        """Yield the group that is open."""
        if self._words:
            yield self._words
        self._words = []

    def _cut(self) -> int:
        """Where to cut a long sentence: at the longest pause, a comma counting as half a second, not too early."""
        earliest = self._words[0].start + self.config.max_segment_seconds / 4

        def quality(cut: int) -> tuple[bool, float]:
            before, after = self._words[cut - 1], self._words[cut]
            comma = before.text.rstrip(CLOSING).endswith((",", ";", ":", "—", "-"))
            return before.end >= earliest, after.start - before.end + 0.5 * comma

        return max(range(1, len(self._words)), key=quality)
