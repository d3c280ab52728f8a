"""What the LLM reads before it writes: hotwords, the words heard, and what the listener was unsure of.

    <|im_start|> [hotwords <repo_name>] heard <reponame> transcript <|im_end|>

An alternative stands behind the words that it may replace: `words <file_sep> alternative <filename>`. The marks are
special tokens that the LLM's vocabulary has and that no text contains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unique_asr.models.listening_llm.heard import HeardWord

MARKS = {
    "start": "<|im_start|>",
    "end": "<|im_end|>",
    "hotwords": "<repo_name>",
    "transcript": "<reponame>",
    "alternative": "<file_sep>",
    "alternative_end": "<filename>",
}


@dataclass
class HeardTokens:
    """The words heard as the LLM's tokens, M of them.

    Attributes:
        ids: [M] as the LLM reads them, marks and alternatives included.
        owner: [M] the index of the word that each token is of; -1 for marks and alternatives.
    """

    ids: np.ndarray
    owner: np.ndarray


class HeardPrompt:
    """Makes the LLM's prompt of what was heard.

    Args:
        tokenizer: the LLM's, which has all `MARKS`.

    Raises:
        ValueError: the vocabulary lacks a mark.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        if missing := [mark for mark in MARKS.values() if mark not in vocabulary]:
            raise ValueError(f"the LLM's vocabulary lacks {missing[0]}, which marks a part of the prompt")
        self.marks = {name: vocabulary[mark] for name, mark in MARKS.items()}

    @property
    def end_token_id(self) -> int:
        """The token that ends a transcript."""
        return self.marks["end"]

    def tokenize(self, text: str) -> list[int]:
        """Turn a text into tokens, without marks."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize_answer(self, text: str) -> list[int]:
        """Turn a transcript into the tokens that the LLM is to write, the end included."""
        return [*self.tokenize(_lead(text)), self.end_token_id]

    def tokenize_heard(self, words: Sequence[HeardWord]) -> HeardTokens:
        """Turn words into tokens; what is read is the text of all of them, cut where an alternative stands."""
        ids: list[int] = []
        owner: list[int] = []
        index = first = 0
        while index < len(words):
            word = words[index]
            if not word.alternative:
                index += 1
                continue
            last = min(index + word.span, len(words))
            self._add(words, first, last, ids, owner)
            inside = [self.marks["alternative"], *self.tokenize(_lead(word.alternative)), self.marks["alternative_end"]]
            ids += inside
            owner += [-1] * len(inside)
            index = first = last
        self._add(words, first, len(words), ids, owner)
        return HeardTokens(np.array(ids, np.int64), np.array(owner, np.int64))

    def _add(self, words: Sequence[HeardWord], first: int, last: int, ids: list[int], owner: list[int]) -> None:
        """Add the tokens of the words [first, last), read as one text."""
        if first == last:
            return
        texts = [_lead(word.text) if index == 0 else word.text for index, word in enumerate(words[first:last])]
        encoded = self.tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = np.cumsum([len(text) for text in texts])
        starts = np.array([end - 1 for _, end in encoded["offset_mapping"]], np.int64)  # a token's last character
        ids += encoded["input_ids"]
        owner += (np.searchsorted(ends, starts, side="right") + first).tolist()

    def make(self, heard: Sequence[int], hotwords: Sequence[str] = ()) -> list[int]:
        """Make the token ids that the LLM reads before it writes.

        Args:
            heard: `HeardTokens.ids`.
            hotwords: names that may occur.
        """
        names = [*self.tokenize(_lead(", ".join(hotwords))), self.marks["hotwords"]] if hotwords else []
        return [self.marks["start"], *names, *map(int, heard), self.marks["transcript"]]


def _lead(text: str) -> str:
    """A text with one space before it, so that its first word has the token that it has inside a text."""
    return " " + text.strip()
