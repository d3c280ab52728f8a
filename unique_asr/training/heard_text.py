"""Rows for a `ListeningLLM`: words heard and the transcript, from pairs of both or from texts alone.

Texts teach to copy: some stand in random order, and some of their words are made up, so that the LLM cannot guess what
comes. Pairs teach to correct: what a listener made of real and of synthetic speech, and what was said. Both teach
hotwords: names given are spelled as given where something like them was heard, and stay away elsewhere.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unique_asr.models.listening_llm import HeardPrompt, HeardWord
from unique_asr.training.corpus import draw_log_uniform, has_case
from unique_asr.training.heard_rows import HeardRow
from unique_asr.training.stages import StageConfig

STRETCH = 4, 200  # lines that are read one after the other, log-uniform
SHUFFLED_SHARE = 0.5  # of the stretches: lines in random order
MADE_UP_SHARE, MADE_UP = 0.5, 0.06  # of the stretches with words that nobody ever wrote, and of their words
UNSURE, WRONG = 0.03, 0.2  # of the words that have an alternative, and of those that it would have put right
NAMES, OTHERS = 8, 50  # hotwords of a row, at most: names that occur, and names that do not
MISHEARD = 0.7  # of the names among the hotwords that were heard as something else
CHARACTERS = 3.7  # a token, a low guess; rows that turn out too long are drawn again
ATTEMPTS = 100  # to draw a row that is not too long
SPELLINGS = ["ph f", "f ph", "c k", "k ck", "ck k", "y i", "i y", "ee ea", "ea ee", "s z", "z s", "sh ch", "t d", "d t",
             "b p", "p b", "v w", "w v", "ou u", "u oo", "o a", "a e", "e i", "er a", "th t", "x ks", "qu kw", "mn m",
             "ll l", "nn n", "rr r", "tt t", "ss s", "l ll", "n nn", "r rr", "ie y", "gh g", "j g", "g j"]  # fmt: skip


@dataclass(frozen=True)
class HeardPart:
    """A stretch of speech: the words heard, and what was said."""

    words: tuple[HeardWord, ...]
    text: str
    seconds: float


class HeardTextRowMaker:
    """Makes rows of a `ListeningLLM`; a `RowMaker`.

    Args:
        texts: lines of consecutive sentences, by file.
        recordings: consecutive parts of each recording.
        prompt: of the LLM that trains.

    Raises:
        ValueError: there is neither a text nor a recording.
    """

    def __init__(
        self, texts: Sequence[Sequence[str]], recordings: Sequence[Sequence[HeardPart]], prompt: HeardPrompt
    ) -> None:
        if not texts and not recordings:
            raise ValueError("data: nothing to learn from; check data.pairs and data.texts")
        self.texts, self.recordings, self.prompt = texts, recordings, prompt
        self.words = [word for lines in texts for line in lines[::10] for word in line.split()]
        lengths = np.array([sum(len(part.text) for part in each) for each in recordings], float)
        self.shares = lengths / lengths.sum() if len(lengths) else lengths
        said = [line for lines in texts for line in lines] + [part.text for each in recordings for part in each]
        self.names = sorted({name for line in said for name in list_names(line)})

    def make_row(self, length: int, stage: StageConfig, random: np.random.Generator) -> HeardRow:
        """See `RowMaker`."""
        for attempt in range(ATTEMPTS):
            row = self._draw(length, length * 0.95**attempt, stage, random)
            if len(row) <= length:
                return row
        raise ValueError(f"stage {stage.name}: lengths has {length}, too short for what is heard and its text")

    def _draw(self, length: int, most: float, stage: StageConfig, random: np.random.Generator) -> HeardRow:
        recorded = bool(self.recordings) and (not self.texts or random.random() < stage.recorded_share)
        limit = most * random.uniform(0.5 if length > 512 else 0.05, 1.0)
        words: list[HeardWord] = []
        said: list[str] = []
        seconds = characters = 0.0
        for part in self._draw_recorded(random) if recorded else self._draw_texts(random):
            more = len(part.text) + sum(len(word.text) + 2 * len(word.alternative) for word in part.words)
            if said and characters + more > limit * CHARACTERS:
                break
            characters += more
            words += part.words
            said.append(part.text)
            seconds += part.seconds
        hotwords: list[str] = []
        if random.random() < stage.hotwords_share:
            words, hotwords = self._give_hotwords(words, " ".join(said), random)
        before = self.prompt.make(self.prompt.tokenize_heard(words).ids, hotwords)
        none = torch.zeros(0, 1)
        return HeardRow(before, none.long(), none, [], self.prompt.tokenize_answer(" ".join(said)), seconds)

    def _draw_recorded(self, random: np.random.Generator) -> Iterator[HeardPart]:
        while True:
            parts = self.recordings[random.choice(len(self.recordings), p=self.shares)]
            yield from parts[int(random.integers(len(parts))) :]

    def _draw_texts(self, random: np.random.Generator) -> Iterator[HeardPart]:
        while True:
            lines = self.texts[int(random.integers(len(self.texts)))]
            shuffled = random.random() < SHUFFLED_SHARE
            made_up = MADE_UP if random.random() < MADE_UP_SHARE else 0.0
            first = int(random.integers(len(lines)))
            for number in range(round(draw_log_uniform(random, *STRETCH))):
                place = int(random.integers(len(lines))) if shuffled else (first + number) % len(lines)
                said = [self._make_up(random) if random.random() < made_up else word for word in lines[place].split()]
                yield HeardPart(tuple(self._hear(said, random)), " ".join(said), len(said) / 2.7)

    def _hear(self, said: Sequence[str], random: np.random.Generator) -> Iterator[HeardWord]:
        """Yield the words of a text as if they had been heard, a few of them with an alternative."""
        for word in said:
            text, alternative = word, ""
            if random.random() < UNSURE:
                alternative = misspell(word, random)
                if random.random() < WRONG:
                    text, alternative = alternative, text
            yield HeardWord(
                " " + text, 0.0, 0.0, alternative=f" {alternative}" if alternative not in ("", text) else ""
            )

    def _make_up(self, random: np.random.Generator) -> str:
        kind = random.random()
        if kind < 0.25:
            digits = str(int(random.integers(10 ** int(random.integers(1, 6)))))
            forms = [digits, f"${digits}", f"{digits}%", f"{digits},", str(1500 + int(digits) % 550)]
            return forms[int(random.integers(len(forms)))]
        one, other = (self.words[int(random.integers(len(self.words)))].strip(".,;:!?\"'") or "a" for _ in range(2))
        word = (one[: (len(one) + 1) // 2] + other[len(other) // 2 :]).lower()
        return word.capitalize() if kind < 0.8 else word

    def _give_hotwords(
        self, words: list[HeardWord], said: str, random: np.random.Generator
    ) -> tuple[list[HeardWord], list[str]]:
        """Choose hotwords, some of which occur, and let some of those have been heard as something else."""
        occurring = list_names(said)
        chosen = random.permutation(occurring)[: int(random.integers(NAMES + 1))].tolist() if occurring else []
        heard = {name: misspell(name, random) for name in chosen if random.random() < MISHEARD}
        spoiled = []
        for word in words:
            name = strip_word(word.text)
            text = word.text.replace(name, heard[name]) if name in heard else word.text
            spoiled.append(replace(word, text=text))
        count = int(random.integers(OTHERS + 1))
        others = [self.names[place] for place in random.integers(len(self.names), size=count)] if self.names else []
        others = [name for name in others if name not in said]
        return spoiled, random.permutation(chosen + others).tolist()


def strip_word(word: str) -> str:
    """Strip a word of what is not a letter or a digit at its ends, and of its 's."""
    bare = word.strip(" .,;:!?\"'()[]-—“”‘’")
    return bare.removesuffix("'s").removesuffix("’s")


def list_names(text: str) -> list[str]:
    """List the words of a text that are written with a capital inside a sentence, each once."""
    words = text.split()
    found = dict.fromkeys(
        strip_word(word) for before, word in pairwise(words) if word[:1].isupper() and before[-1] not in ".?!:\"'”"
    )
    return [name for name in found if len(name) > 3 and name.isalpha()]


def misspell(word: str, random: np.random.Generator) -> str:
    """Write a word as another that sounds alike: one or two of its spellings changed."""
    for _ in range(int(random.integers(1, 3))):
        rules = [rule.split() for rule in SPELLINGS]
        fitting = [(old, new) for old, new in rules if old in word[1:]]
        if not fitting:
            return word + "e" if len(word) < 3 or word[-1] not in "e.,;:!?" else word[:-2] + word[-1]
        old, new = fitting[int(random.integers(len(fitting)))]
        word = word[:1] + word[1:].replace(old, new, 1)
    return word


def read_texts(paths: Sequence[str | Path]) -> list[list[str]]:
    """Read the lines of texts; a line without case gets a capital and a full stop.

    Raises:
        ValueError: a file is missing or empty.
    """
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such text")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path}: no text")
        texts.append([line if has_case(line) else f"{line[0].upper()}{line[1:]}." for line in lines])
    return texts


def write_pairs(path: Path, recordings: Sequence[tuple[str, Sequence[HeardPart]]]) -> None:
    """Write the parts of recordings, each with the name of its source, as JSON lines, compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for source, parts in recordings:
            row = {"source": source, "parts": [_describe(part) for part in parts]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_pairs(paths: Sequence[str | Path], weights: dict[str, float]) -> list[list[HeardPart]]:
    """Read what `write_pairs` wrote.

    Args:
        weights: of sources by name; a source of weight 0 is left out, one of weight 2 counts twice. 1 where unnamed.

    Raises:
        ValueError: a file is missing or is none of these; names it.
    """
    recordings = []
    for path in map(Path, paths):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    parts = [_restore(part) for part in row["parts"]]
                    recordings += [parts] * round(weights.get(row["source"], 1.0))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such pairs; scripts/recipes/hear.py makes them") from None
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a file of pairs ({str(error).splitlines()[0]})") from None
    return recordings


def _describe(part: HeardPart) -> dict[str, Any]:
    words = [[word.text, round(word.confidence, 3), word.alternative, word.span] for word in part.words]
    return {"words": words, "text": part.text, "seconds": round(part.seconds, 2)}


def _restore(part: dict[str, Any]) -> HeardPart:
    words = tuple(HeardWord(text, 0.0, 0.0, sure, other, span) for text, sure, other, span in part["words"])
    return HeardPart(words, part["text"], part["seconds"])
