"""What a listener heard of a recording: words with times, and what it was unsure of."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class HeardWord:
    """A word as the listener wrote it, punctuation included.

    Attributes:
        text: with the space before it, if there is one.
        start, end: seconds from the beginning of the recording.
        confidence: probability that the listener gave it, 0 to 1.
        alternative: what the next best hypothesis has in its place; empty if they agree, or if that has nothing there.
        span: number of words that the alternative stands for, this one and those after it.
    """

    text: str
    start: float
    end: float
    confidence: float = 1.0
    alternative: str = ""
    span: int = 1


@dataclass
class HeardSpeech:
    """The words of a recording, in order.

    Attributes:
        words: with times from the beginning of the recording.
        cuts: seconds at which windows ended, which are quiet moments; the last one is the end of the recording.
    """

    words: list[HeardWord] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Seconds that were listened to."""
        return self.cuts[-1] if self.cuts else 0.0

    @property
    def text(self) -> str:
        """The words as one line."""
        return "".join(word.text for word in self.words).strip()

    def select(self, start: float, end: float) -> list[HeardWord]:
        """Select the words that begin at or after `start` and before `end`, in seconds."""
        return [word for word in self.words if start <= word.start < end]

    def split(self, seconds: float) -> Iterator[tuple[float, float]]:
        """Split the recording into passes of at most so many seconds, about equally long; each ends with a window.

        Yields:
            The beginning and the end of a pass, in seconds.
        """
        start = 0.0
        while start < self.duration:
            left = self.duration - start
            passes = -(-left // seconds)
            share = left / passes
            ends = [cut for cut in self.cuts if start < cut <= start + seconds]
            end = min(ends, key=lambda cut: abs(cut - start - share)) if ends and passes > 1 else None
            if end is None:
                end = self.duration if passes == 1 else start + seconds
            yield start, end
            start = end


def mark_alternatives(words: Sequence[HeardWord], others: Sequence[Sequence[str]]) -> list[HeardWord]:
    """Note at each word what other hypotheses have in its place; of several, the first one counts.

    Args:
        words: of the best hypothesis.
        others: words of the other hypotheses, each with the space before it, best first.
    """
    marked = list(words)
    taken = [False] * len(words)
    for other in others:
        matcher = difflib.SequenceMatcher(None, [word.text for word in words], list(other), False)
        for kind, first, last, begin, end in matcher.get_opcodes():
            if kind != "replace" or any(taken[first:last]):
                continue
            taken[first:last] = [True] * (last - first)
            marked[first] = replace(marked[first], alternative="".join(other[begin:end]), span=last - first)
    return marked
