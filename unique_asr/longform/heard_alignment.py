"""Placing written words in time by the words that a listener heard, whose times are known.

Most of the text is what was heard. So each piece of text is compared with the words heard next; words that agree have
the time of what they agree with, and those between them share the time in between.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from unique_asr.models.listening_llm import HeardWord

LOOKAHEAD = 40  # words heard beyond as many as a text has, among which it is looked for
MIN_FAR = 3  # words in a row that have to agree before words heard are taken to be left out
NEAR = 6  # words heard that a text may leave out or replace without that


@dataclass
class Placed:
    """Where words of a text lie among the words heard.

    Attributes:
        places: of each word the index of the word heard that it is; -1 where it is another or where none was heard.
        cursor: index of the first word heard after the text.
    """

    places: list[int]
    cursor: int

    @property
    def agreeing(self) -> int:
        """Number of words that were heard as they are written."""
        return sum(place >= 0 for place in self.places)


def normalize_word(word: str) -> str:
    """The letters and digits of a word, in lower case; the word itself if it has none."""
    return re.sub(r"[^\w]", "", word.lower()) or word.strip()


def place_words(words: Sequence[str], heard: Sequence[str], cursor: int) -> Placed:
    """Place a piece of text among the words heard from `cursor` on.

    Args:
        words: of the text, normalised.
        heard: all words heard, normalised.
        cursor: index of the first word heard that the text may be.
    """
    ahead = heard[cursor : cursor + 2 * len(words) + LOOKAHEAD]
    blocks = difflib.SequenceMatcher(None, words, ahead, False).get_matching_blocks()
    places, reached, written = [-1] * len(words), 0, 0
    for block in blocks:
        if not block.size:
            continue
        left_out = block.b - reached - (block.a - written)
        if left_out > NEAR and block.size < MIN_FAR:
            continue  # a word that agrees by chance
        for offset in range(block.size):
            places[block.a + offset] = cursor + block.b + offset
        reached, written = block.b + block.size, block.a + block.size
    # What the text ends with in other words than those heard takes as many of them with it.
    end = reached + (len(words) - written) if written else 0
    return Placed(places, cursor + min(end, len(ahead)))


def time_words(placed: Placed, heard: Sequence[HeardWord], cursor: int, end: float) -> list[tuple[float, float]]:
    """Give each word of a text its start and end in seconds.

    Args:
        heard: all words heard.
        cursor: index of the first word heard that the text may be, as given to `place_words`.
        end: seconds at which the speech that was heard ends.
    """
    places = placed.places
    times: list[tuple[float, float]] = [(0.0, 0.0)] * len(places)
    index = 0
    while index < len(places):
        if places[index] >= 0:
            word = heard[places[index]]
            times[index] = word.start, word.end
            index += 1
            continue
        last = index
        while last < len(places) and places[last] < 0:
            last += 1
        begin = _start(index, places, heard, cursor, end)
        stop = heard[places[last]].start if last < len(places) else _stop(placed, heard, end)
        step = max(stop - begin, 0.0) / (last - index)
        for offset in range(last - index):
            times[index + offset] = begin + offset * step, begin + (offset + 1) * step
        index = last
    return times


def _start(index: int, places: Sequence[int], heard: Sequence[HeardWord], cursor: int, end: float) -> float:
    """When the first words of a text begin, of which none was heard."""
    if index > 0:
        return heard[places[index - 1]].end
    return heard[cursor].start if cursor < len(heard) else end


def _stop(placed: Placed, heard: Sequence[HeardWord], end: float) -> float:
    """When the last words of a text end, of which none was heard."""
    return heard[placed.cursor].start if placed.cursor < len(heard) else end
