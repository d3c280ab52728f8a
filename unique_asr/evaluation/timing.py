"""How well words lie where they were said, against utterances whose times are known exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unique_asr.data import Utterance
from unique_asr.transcript import Word

TOLERANCE = 0.2  # s


@dataclass(frozen=True)
class TimingErrors:
    """Of the words that equal a word of the reference; `+` adds recordings."""

    words: int = 0
    misplaced: int = 0  # the middle of the word lies more than `TOLERANCE` outside its utterance
    starts: tuple[float, ...] = ()  # s: start of an utterance's first word minus start of the utterance

    def __add__(self, other: TimingErrors) -> TimingErrors:
        return TimingErrors(self.words + other.words, self.misplaced + other.misplaced, self.starts + other.starts)

    def to_dict(self) -> dict:
        """`start_error` is a median and holds the silence at the beginning of the utterances."""
        return {
            "words": self.words,
            "misplaced": self.misplaced / max(self.words, 1),
            "start_error": float(np.median(np.abs(self.starts))) if self.starts else None,
        }


def timing_errors(utterances: Sequence[Utterance], words: Sequence[Word]) -> TimingErrors:
    """Match the words with those of the utterances, then compare their times."""
    from rapidfuzz.distance import Levenshtein  # comes with jiwer

    reference = [
        (_plain(word), n, utterance) for utterance in utterances for n, word in enumerate(utterance.text.split())
    ]
    spoken = [word for word in words if _plain(word.text)]
    blocks = Levenshtein.opcodes([text for text, _, _ in reference], [_plain(word.text) for word in spoken])
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


def _plain(word: str) -> str:
    return re.sub(r"[^\w']", "", word.lower())
