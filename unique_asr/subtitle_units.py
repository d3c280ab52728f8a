"""The text of segments as units with times: what subtitles never break, and what a break after each one costs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from unique_asr.sentences import ABBREVIATIONS, CLOSING, ends_sentence
from unique_asr.transcript import Segment

WIDE_COLUMNS = 2.5  # of a Chinese, Japanese or Korean character: 16 of them fill a line of 42
SLOWEST_SPEECH = 5.0  # columns a second: where the times of words are unknown, a segment is not spread further
ZERO_WIDTH_JOINER = "\u200d"
SMALL_KANA = "ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ"  # never begin a line

# English words that a break stands before rather than after, and those that belong to what follows them.
LEADING = re.compile(
    r"(and|or|but|nor|so|because|although|though|unless|until|while|whereas|if|when|where|which|who|whom|whose|that|than"
    r"|as|in|on|at|by|for|from|with|without|of|to|into|onto|about|after|before|between|through|during|over|under)"
)
BINDING = re.compile(
    r"(a|an|the|my|your|his|her|its|our|their|this|these|those|i|we|he|she|they|it|you|no|not|very|is|are|was|were|be"
    r"|been|am|have|has|had|do|does|did|will|would|can|could|shall|should|may|might|must|i['’]m|it['’]s|don['’]t)"
)


@dataclass
class Unit:
    """What stands on one line: a word, or a character of a script without spaces.

    Attributes:
        start, end: seconds.
        width: columns.
        spaced: whether a space stands before it, unless it begins a line.
        speaker: who says it, if that is known.
        break_cost: of ending a cue or a line after it: 0 at the end of a sentence, 1 after a comma, 6 inside a phrase.
    """

    text: str
    start: float
    end: float
    width: float
    spaced: bool
    speaker: str | None = None
    break_cost: float = 0.0

    @property
    def label(self) -> str:
        """What stands before the speaker's text."""
        return f"{self.speaker}: " if self.speaker else ""

    @property
    def label_width(self) -> float:
        """Columns of the label."""
        return measure_width(self.label)


def measure_width(text: str) -> float:
    """Return the columns of a text: its characters, wide ones as WIDE_COLUMNS, combining ones as none."""
    return sum(map(_count_columns, text))


def make_units(segments: Sequence[Segment], max_width: float, fastest: float) -> list[Unit]:
    """Return the units of all segments in order; none begins before the one before it ends.

    Args:
        max_width: columns of a line; longer words are cut.
        fastest: columns a second: a segment that another one overlaps keeps the time that this needs.
    """
    ordered = sorted((segment for segment in segments if segment.text.split()), key=lambda segment: segment.start)
    units: list[Unit] = []
    for index, segment in enumerate(ordered):
        added = _cut(segment, max_width)
        reached = units[-1].end if units else 0.0
        start, end = max(segment.start, reached), max(segment.end, reached)
        if index + 1 < len(ordered) and (following := ordered[index + 1].start) < end:
            needed = sum(unit.width for unit in added) / fastest
            end = min(end, max(following, start + needed))
        _fit(added, segment, start, end)
        units += added
        _price_breaks(added)
    return units


def _cut(segment: Segment, max_width: float) -> list[Unit]:
    """The units of a segment, at the times of its words."""
    tokens = segment.text.split()
    times = _time_characters(segment, "".join(tokens))
    label = measure_width(f"{segment.speaker}: ") if segment.speaker else 0.0
    units, place = [], 0
    for token in tokens:
        for number, piece in enumerate(_split(token, max(max_width - label, 4.0))):
            first, last = times[place], times[place + len(piece) - 1]
            place += len(piece)
            units.append(Unit(piece, first[0], last[1], measure_width(piece), number == 0, segment.speaker))
    return units


def _time_characters(segment: Segment, characters: str) -> list[tuple[float, float]]:
    """Start and end of each character: its share of its word, or of the segment if it has no words with times."""
    words = ["".join(word.text.split()) for word in segment.words]
    if "".join(words) == characters:
        times = []
        for word, text in zip(segment.words, words):
            times += _share(text, word.start, max(word.end, word.start))
        return times
    seconds = min(max(segment.end - segment.start, 0.0), measure_width(characters) / SLOWEST_SPEECH)
    return _share(characters, segment.start, segment.start + seconds)


def _share(text: str, start: float, end: float) -> list[tuple[float, float]]:
    """Start and end of each character of a text by its width."""
    total, done, times = measure_width(text) or 1.0, 0.0, []
    for character in text:
        before = done
        done += _count_columns(character)
        times.append((start + (end - start) * before / total, start + (end - start) * done / total))
    return times


def _fit(units: Sequence[Unit], segment: Segment, start: float, end: float) -> None:
    """Move the units of a segment to the part of its time that others leave it, and put them in order."""
    if end < segment.end or start >= segment.end:  # squeezed as a whole; else only what lies before `start`
        scale = (end - start) / max(segment.end - segment.start, 1e-6)
        for unit in units:
            unit.start, unit.end = (start + scale * (time - segment.start) for time in (unit.start, unit.end))
    reached = start
    for unit in units:
        unit.start = max(unit.start, reached)
        unit.end = max(unit.end, unit.start)
        reached = unit.end


def _split(token: str, max_width: float) -> Iterator[str]:
    """A word, or the pieces between which it may be broken: Chinese and Japanese characters, and at its full width."""
    piece = ""
    for character in token:
        if piece and (_may_break(piece[-1], character) or _is_too_wide(piece, character, max_width)):
            yield piece
            piece = ""
        piece += character
    yield piece


def _is_too_wide(piece: str, character: str, max_width: float) -> bool:
    columns = _count_columns(character)
    return columns > 0 and measure_width(piece) + columns > max_width


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters that no space parts."""
    if not (_is_unspaced(before) or _is_unspaced(after)) or before == ZERO_WIDTH_JOINER:
        return False
    begins = (
        unicodedata.category(after) in ("Pe", "Pf", "Po", "Pd", "Mn", "Mc", "Me", "Lm", "Cf") or after in SMALL_KANA
    )
    return not begins and unicodedata.category(before) not in ("Ps", "Pi")


def _is_unspaced(character: str) -> bool:
    """Whether it is a wide character of a script without spaces; Korean has them."""
    hangul = "\u1100" <= character <= "\u11ff" or "\u3130" <= character <= "\u318f" or "\uac00" <= character <= "\ud7a3"
    return unicodedata.east_asian_width(character) in "WF" and not hangul


def _count_columns(character: str) -> float:
    if " " <= character <= "~":
        return 1.0
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0.0
    return WIDE_COLUMNS if unicodedata.east_asian_width(character) in "WF" else 1.0


def _price_breaks(units: Sequence[Unit]) -> None:
    """Set what a break costs after each unit of a segment."""
    for unit, following in pairwise(units):
        unit.break_cost = _price_break(unit, following)
    if units:
        units[-1].break_cost = 0.0 if ends_sentence(units[-1].text, None) else 0.5


def _price_break(unit: Unit, following: Unit) -> float:
    word, after = unit.text.rstrip(CLOSING), following.text
    if ends_sentence(unit.text, after):
        return 0.0
    if word.endswith((",", ";", ":", "—", "–", "、", "，", "；", "：")):
        return 1.0
    plain, plain_after = word.lower().strip("\"'“‘([«"), after.lower().rstrip(CLOSING + ".,;:?!")
    pause = min(3.0, 6.0 * max(0.0, following.start - unit.end))
    if BINDING.fullmatch(plain) or LEADING.fullmatch(plain):
        return 6.0 - pause
    if ABBREVIATIONS.fullmatch(plain.rstrip(".")) or (word[:1].isupper() and after[:1].isupper()):
        return 5.5 - pause  # a title, or a name of several words
    if LEADING.fullmatch(plain_after):
        return max(0.5, 2.5 - pause)
    return 4.0 - pause
