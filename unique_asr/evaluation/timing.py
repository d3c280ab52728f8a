"""How well words lie where they were said, compared with utterances whose times are known exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unique_asr.data import Utterance
from unique_asr.transcript import Word

TOLERANCE = 0.2  # s that the middle of a word may lie outside its utterance


@dataclass(frozen=True)
class TimingErrors:
    """Errors of the words that match a word of the reference; `+` adds those of another recording."""

    words: int = 0  # that match
    misplaced: int = 0  # of these; their middle lies more than `TOLERANCE` outside their utterance
    starts: tuple[float, ...] = ()  # s: start of an utterance's first word minus start of the utterance

    def __add__(self, other: TimingErrors) -> TimingErrors:
        return TimingErrors(self.words + other.words, self.misplaced + other.misplaced, self.starts + other.starts)

    def to_dict(self) -> dict:
        """List the measures by name: `words`, the share `misplaced`, and `start_error`.

        The last is the median distance in seconds of first words from the start of their utterance; the silence at the
        beginning of an utterance is part of it.
        """
        return {
            "words": self.words,
            "misplaced": self.misplaced / max(self.words, 1),
            "start_error": float(np.median(np.abs(self.starts))) if self.starts else None,
        }


def measure_timing(utterances: Sequence[Utterance], words: Sequence[Word]) -> TimingErrors:
    """Match the words of a transcript with those of the utterances by edit distance, and compare their times."""
    from rapidfuzz.distance import Levenshtein  # comes with jiwer

    reference = [
        (_simplify(word), n, utterance) for utterance in utterances for n, word in enumerate(utterance.text.split())
    ]
    spoken = [word for word in words if _simplify(word.text)]
    blocks = Levenshtein.opcodes([text for text, _, _ in reference], [_simplify(word.text) for word in spoken])
    matched = misplaced = 0
    starts = []
    for block in blocks:
        if block.tag != "equal":
            continue
        pairs = zip(reference[block.src_start : block.src_end], spoken[block.dest_start : block.dest_end], strict=True)
        for (_, position, utterance), word in pairs:
            middle = (word.start + word.end) / 2
            matched += 1
            misplaced += not utterance.start - TOLERANCE <= middle <= utterance.end + TOLERANCE
            if position == 0:
                starts.append(word.start - utterance.start)
    return TimingErrors(matched, misplaced, tuple(starts))


def _simplify(word: str) -> str:
    return re.sub(r"[^\w']", "", word.lower())
