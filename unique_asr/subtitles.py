"""Segments to cues: what a subtitle shows at once, for how long, and where its lines break.

The limits are those of Netflix's Timed Text Style Guide: lines of 42 columns, two of them, five sixths of a second to
seven seconds, two frames between cues, at most 20 characters a second where the pauses allow it. A line ends after
punctuation or before a conjunction or preposition, and does not part an article from its noun.

The text is a row of units with times, words as a rule. The cheapest way to cut the row into cues is found from its end:
each cue costs something, more if it ends inside a phrase, holds a pause, or is not to be seen long enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from unique_asr.subtitle_units import Unit, make_units, measure_width
from unique_asr.transcript import Segment

GAP_SECONDS = 0.084  # between cues: two frames of 24 a second
CHAINED_SECONDS = 0.5  # less than 12 frames between cues look like a flicker: the first one stays until the next
READING_SPEED = 20.0  # columns a second
MIN_LINE_WIDTH = 16  # columns: a label of a speaker and a word

# Costs. The unit is about a comma: a cue that ends there costs 1 more than one that ends with its sentence.
CUE = 3.0
SENTENCE_INSIDE = 4.0  # more than CUE: a sentence gets a cue of its own unless that were too short to read
SPEAKER_INSIDE = 6.0
PAUSE_INSIDE = 6.0  # for each second over 0.3
FRAGMENT = 2.0  # part of a sentence, on a cue of less than FRAGMENT_WIDTH columns or a line of less than LONE_WIDTH
FRAGMENT_WIDTH = 16
LONE_WIDTH = 10  # about a word
SHORT = 30.0  # times the share of the shortest duration that is lacking
HURRIED = 8.0  # times the share of the reading time that is lacking
HOPELESS = 40.0  # more inside a cue is not looked at


@dataclass(frozen=True)
class SubtitleLimits:
    """How much a cue may hold, and how long it is shown.

    Args:
        max_line_width: columns of a line: characters, of which a Chinese, Japanese or Korean one counts as 2.5.
        max_lines: lines of a cue.
        max_cue_seconds, min_cue_seconds: the longest and the shortest time that a cue is shown.

    Raises:
        ValueError: if one does not fit; the message names the option of the command line.
    """

    max_line_width: int = 42
    max_lines: int = 2
    max_cue_seconds: float = 7.0
    min_cue_seconds: float = 0.84

    def __post_init__(self) -> None:
        for name, least, what in (
            ("max_line_width", MIN_LINE_WIDTH, f"columns, {MIN_LINE_WIDTH} or more"),
            ("max_lines", 1, "lines, 1 or more"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"output.{name}={value}: give a whole number of {what}")
        for name, least in (("max_cue_seconds", 1.0), ("min_cue_seconds", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < float("inf"):
                raise ValueError(f"output.{name}={value}: give seconds, {least:g} or more")
        if self.min_cue_seconds > self.max_cue_seconds:
            raise ValueError(
                f"output.min_cue_seconds={self.min_cue_seconds}: is more than max_cue_seconds={self.max_cue_seconds}"
            )


@dataclass(frozen=True)
class Cue:
    """What is shown at once, between two times in seconds that are whole milliseconds."""

    start: float
    end: float
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines, as subtitle formats hold them."""
        return "\n".join(self.lines)


def build_cues(
    segments: Sequence[Segment], limits: SubtitleLimits | None = None, duration: float | None = None
) -> list[Cue]:
    """Return the cues of a transcript, in order and without overlap.

    Words that have times are shown when they are said. In a segment without them, or whose words are not its text, they
    get a share of its time by their width. A label of a speaker stands before each cue and each change inside one.

    Args:
        duration: end of the recording in seconds, if it is known; no cue goes on after it and the last segment.
    """
    limits = limits or SubtitleLimits()
    units = make_units(segments, limits.max_line_width, READING_SPEED)
    end = max([duration, *(unit.end for unit in units)]) if duration and units else None
    groups = _group(units, limits, end)
    times = _time(groups, limits, end)
    return [Cue(start / 1000, stop / 1000, _break_lines(group, limits)) for group, (start, stop) in zip(groups, times)]


def _group(units: Sequence[Unit], limits: SubtitleLimits, end: float | None) -> list[list[Unit]]:
    """The units of each cue: the cheapest of all ways to cut the row."""
    best = [0.0] * (len(units) + 1)  # cost of what begins with a unit
    following = [len(units)] * (len(units) + 1)  # where the cue after it begins
    for first in range(len(units) - 1, -1, -1):
        best[first], following[first] = min(
            (cost + best[last], last) for last, cost in _price_cues(units, first, limits, end)
        )
    groups, first = [], 0
    while first < len(units):
        groups.append(list(units[first : following[first]]))
        first = following[first]
    return groups


def _price_cues(
    units: Sequence[Unit], first: int, limits: SubtitleLimits, end: float | None
) -> Iterator[tuple[int, float]]:
    """Where a cue that begins with a unit may end, and what it costs then."""
    begin, inside, width = units[first], 0.0, 0.0
    lines, column = 0, 0.0  # as many words on a line as fit: the fewest lines
    whole = first == 0 or units[first - 1].break_cost == 0  # whether it begins with its sentence
    for index in range(first, len(units)):
        unit = units[index]
        before = units[index - 1] if index > first else None
        changes = before is None or unit.speaker != before.speaker
        if before is not None:
            inside += PAUSE_INSIDE * max(0.0, unit.start - before.end - 0.3)
            inside += SPEAKER_INSIDE * changes + SENTENCE_INSIDE * (before.break_cost == 0)
        added = unit.width + unit.spaced * (not changes)
        if changes:
            lines, column = lines + 1, unit.label_width + unit.width
        elif column + added > limits.max_line_width:
            lines, column = lines + 1, unit.width
        else:
            column += added
        width += added + changes * unit.label_width
        too_much = lines > limits.max_lines or unit.end - begin.start > limits.max_cue_seconds or inside > HOPELESS
        if too_much and index > first:
            return
        following = units[index + 1].start - GAP_SECONDS if index + 1 < len(units) else end
        shown = limits.max_cue_seconds
        if following is not None:
            shown = min(shown, following - begin.start)
        cost = CUE + inside + unit.break_cost
        cost += _lack(shown, limits.min_cue_seconds, SHORT) + _lack(shown, width / READING_SPEED, HURRIED)
        if width < FRAGMENT_WIDTH and not (whole and unit.break_cost == 0):
            cost += FRAGMENT
        yield index + 1, cost


def _lack(shown: float, needed: float, weight: float) -> float:
    """What it costs that a cue is seen for less time than it needs."""
    return weight * max(0.0, 1 - shown / needed) if needed > 0 else 0.0


def _time(groups: Sequence[Sequence[Unit]], limits: SubtitleLimits, end: float | None) -> list[tuple[int, int]]:
    """Start and end of each cue in milliseconds.

    A cue begins with its first word: later only if the one before it would be too short otherwise, earlier only at the
    end of the recording. It ends after its last word: late enough to be read, if the next one lets it, and not shortly
    before the next one.
    """
    gap, shortest = round(1000 * GAP_SECONDS), round(1000 * limits.min_cue_seconds)
    longest, chained = round(1000 * limits.max_cue_seconds), round(1000 * CHAINED_SECONDS)
    starts = [max(0, round(1000 * group[0].start)) for group in groups]
    for index in range(1, len(starts)):  # there is no room before the next one: that one is late
        starts[index] = max(starts[index], starts[index - 1] + max(shortest, 1) + gap)
    last = round(1000 * end) if end is not None else None
    if last is not None and starts:  # there is no room before the end: it is early
        starts[-1] = max(min(starts[-1], last - shortest), starts[-2] + max(shortest, 1) + gap if starts[1:] else 0)
    times = []
    for index, (group, start) in enumerate(zip(groups, starts)):
        needed = max(shortest, round(1000 * _count_columns(group) / READING_SPEED))
        stop = max(round(1000 * max(unit.end for unit in group)), start + needed)
        limit = start + longest
        if index + 1 < len(starts):
            following = starts[index + 1] - gap
            if following - stop < chained - gap:
                stop = following
            limit = min(limit, following)
        elif last is not None:
            limit = min(limit, max(last, start + shortest))
        times.append((start, max(min(stop, limit), start + 1)))
    return times


def _count_columns(group: Sequence[Unit]) -> float:
    """The columns of a cue, each speaker's text on one line."""
    changes = [index for index in range(1, len(group)) if group[index].speaker != group[index - 1].speaker]
    return sum(measure_width(line) for line in _join(group, changes))


def _break_lines(group: Sequence[Unit], limits: SubtitleLimits) -> tuple[str, ...]:
    """The text of a cue on as few lines as hold it, broken at phrases and about equally long."""
    count = len(group)
    mean = _count_columns(group) / limits.max_lines

    @cache
    def fill(first: int) -> tuple[int, float, tuple[int, ...]]:
        """The fewest lines for what begins with a unit, what their breaks cost, and where they begin."""
        if first == count:
            return 0, 0.0, ()
        choices = []
        labelled = first == 0 or group[first].speaker != group[first - 1].speaker
        width = group[first].label_width * labelled
        for index in range(first, count):
            unit = group[index]
            if index > first and unit.speaker != group[index - 1].speaker:
                break
            width += unit.width + unit.spaced * (index > first)
            if width > limits.max_line_width and index > first:
                break
            lines, cost, breaks = fill(index + 1)
            uneven = 4 * ((width - mean) / limits.max_line_width) ** 2 + 0.001 * width * (first == 0)
            after = unit.break_cost * (index + 1 < count)
            cost += uneven + after
            if width < LONE_WIDTH and (after or (first and group[first - 1].break_cost)):
                cost += FRAGMENT
            choices.append((lines + 1, cost, (first, *breaks)))
        return min(choices)

    return tuple(_join(group, fill(0)[2]))


def _join(group: Sequence[Unit], begins: Sequence[int]) -> Iterator[str]:
    """The lines that begin with these units."""
    edges = sorted({0, *begins, len(group)})
    for first, last in pairwise(edges):
        labelled = first == 0 or group[first].speaker != group[first - 1].speaker
        words = [f" {unit.text}" if unit.spaced else unit.text for unit in group[first:last]]
        yield (group[first].label if labelled else "") + "".join(words).lstrip()
