"""The units of the CTC head: frequent tokens of the LLM's vocabulary, lower case, without punctuation.

A whole vocabulary has tens of thousands of tokens that training speech never contains, and the head cannot learn to
hear those. So it writes a few thousand frequent ones, and rarer words as several of them ("pr" "ud" "ent" "ly"). Each
unit is a token of the LLM, which reads them as it reads text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SPACES = "Ġ▁"  # how tokenizers of bytes and of sentences write the space before a word


def normalize_ctc_text(text: str) -> str:
    """Keep lower-case ASCII letters and apostrophes, words separated by a space; digits and all else are left out."""
    plain = unicodedata.normalize("NFKD", text.replace("\u2019", "'")).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z' ]+", " ", plain).split()
    return " ".join(word for word in words if word.strip("'"))


def choose_ctc_vocabulary(tokenizer: Any, texts: Iterable[str] = (), size: int | None = None) -> list[int]:
    """List token ids in increasing order: the `size` most frequent in `texts` and every single letter; all for None."""
    pattern = re.compile(f"[{SPACES}]?[a-z']+")
    allowed = {token: index for token, index in tokenizer.get_vocab().items() if pattern.fullmatch(token)}
    if size is None:
        return sorted(allowed.values())
    words: Counter[str] = Counter()
    for text in texts:
        words.update(normalize_ctc_text(text).split())
    tokens: Counter[int] = Counter()
    for word, count in words.items():
        for token in tokenizer(" " + word, add_special_tokens=False)["input_ids"]:
            tokens[token] += count
    letters = {index for token, index in allowed.items() if len(token.lstrip(SPACES)) == 1}
    frequent = [index for index, _ in tokens.most_common() if index in allowed.values()]
    return sorted(letters | set(frequent[:size]))


class CTCUnits:
    """Cuts words into units, each time the longest that fits."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        """vocabulary: token -> id of the units."""
        first = [token for token in vocabulary if token[0] in SPACES]
        self.space = first[0][0] if first else ""
        self.vocabulary = vocabulary
        self.longest = max(map(len, vocabulary), default=0)
        self._cut: dict[str, list[int]] = {}

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Cut a text into units, and give for each the index of its white-space separated word.

        A word without letters has no unit.
        """
        ids: list[int] = []
        words: list[int] = []
        for index, word in enumerate(text.split()):
            if word not in self._cut:
                self._cut[word] = [
                    unit for part in normalize_ctc_text(word).split() for unit in self._cut_word(self.space + part)
                ]
            ids += self._cut[word]
            words += [index] * len(self._cut[word])
        return ids, words

    def _cut_word(self, word: str) -> list[int]:
        units = []
        while word:
            for length in range(min(self.longest, len(word)), 0, -1):
                if word[:length] in self.vocabulary:
                    units.append(self.vocabulary[word[:length]])
                    break
            word = word[length:]  # a character that no unit has is skipped
        return units
