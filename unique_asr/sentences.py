"""Where sentences end."""

from __future__ import annotations

import re

ABBREVIATIONS = re.compile(
    r"(mr|mrs|ms|messrs|dr|prof|rev|hon|st|mt|sr|jr|gen|col|capt|lt|sgt|maj|gov|sen|rep|pres|vs|cf|fig|vol|dept|approx)",
    re.IGNORECASE,
)
CLOSING = "\"'”’)]»"  # may follow the sign that ends a sentence


def ends_sentence(word: str, following: str | None) -> bool:
    """Return whether a sentence ends after a word, given the word after it (None at the end of the text)."""
    stem = word.rstrip(CLOSING)
    if not stem or stem[-1] not in ".?!…。？！":
        return False
    if following is None:
        return True
    if following.lstrip("\"'“‘([«—-")[:1].islower():
        return False
    if not stem.endswith(".") or stem.endswith(".."):
        return True
    stem = stem[:-1].lstrip("\"'“‘([«")
    if stem.lower() == "no" and following[:1].isdigit():
        return False
    initials = re.fullmatch(r"[A-Z](\.[A-Z])*", stem) and stem != "I"
    return not (initials or ABBREVIATIONS.fullmatch(stem))
