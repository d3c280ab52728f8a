"""Case and punctuation that a recogniser heard, for the words of a reference that has none."""

from __future__ import annotations

import difflib
import re

TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint"}  # Whisper's spelling: LibriSpeech's
SIMILAR = (
    0.6  # from this difflib ratio on a word in the same place is the same word in another spelling ("Lind", "Lynde")
)


def normalise(word: str) -> str:
    """The letters, digits and inner apostrophes of a word, in lower case."""
    return re.sub(r"[^a-z0-9']", "", word.lower()).strip("'")


def split_heard(text: str) -> list[tuple[str, str, str]]:
    """Split Whisper's text into (normalised word, the word without punctuation, the punctuation after it)."""
    words = []
    for token in re.split(r"[\s\-–—]+", text.replace("’", "'")):
        surface = re.sub(r"^[^\w']+|[^\w']+$", "", token)
        mark = re.search(r"[.,?!;:]", token[token.find(surface) + len(surface) :])
        word = normalise(surface)
        if word in TITLES:
            word, surface, mark = TITLES[word], TITLES[word].capitalize(), None
        if word:
            words.append((word, surface.strip("'"), mark.group() if mark else ""))
    return words


def copy_case(word: str, like: str) -> str:
    """The word, with a capital if `like` has one."""
    return word.capitalize() if like[:1].isupper() and like != "I" else word


def restore_case(words: list[str], text: str) -> tuple[list[str], list[bool]]:
    """Give words the case and punctuation of what Whisper heard.

    Args:
        words: of the reference.
        text: what Whisper wrote of the same speech.

    Returns:
        The words, none of them another than before but for case and punctuation, and whether Whisper heard each.
    """
    heard = split_heard(text)
    matcher = difflib.SequenceMatcher(None, [normalise(word) for word in words], [word for word, *_ in heard], False)
    restored, matched = list(words), [False] * len(words)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            for k in range(i_end - i):
                _, surface, mark = heard[j + k]
                exact = surface.lower() == words[i + k].lower()
                restored[i + k] = (surface if exact else copy_case(words[i + k], surface)) + mark
                matched[i + k] = True
        elif kind == "replace" and i_end - i == j_end - j:
            for k in range(i_end - i):
                word, surface, mark = heard[j + k]
                if difflib.SequenceMatcher(None, normalise(words[i + k]), word).ratio() >= SIMILAR:
                    restored[i + k] = copy_case(words[i + k], surface) + mark
    for k, word in enumerate(restored):
        if re.match(r"i\b", word):
            restored[k] = "I" + word[1:]
        elif k == 0 or restored[k - 1][-1] in ".?!":
            restored[k] = word[:1].upper() + word[1:]
    return restored, matched
