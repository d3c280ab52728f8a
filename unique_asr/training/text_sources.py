"""Texts as a listener would hear them: training without audio, for models with `merge: decoder`.

A listener's position is the expected embedding of a few likely tokens. So a text in the listener's tokens, with some
words wrong and some positions blurred, is what a recording of it would give. Some words are made up, so that the LLM
learns to copy what it never read, and some stretches have their sentences in random order, so that it cannot guess the
next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from unique_asr.models.speech_llm.compose import list_listener_tokens
from unique_asr.models.speech_llm.listener import Listener
from unique_asr.models.speech_llm.processing import SAMPLE_RATE
from unique_asr.training.corpus import Source, TrainingUtterance, draw_log_uniform, has_case

WORDS_A_SECOND = 2.7  # of speech that was read aloud
STRETCH = 4, 200  # lines that are read one after the other, log-uniform
SHUFFLED_SHARE = 0.4  # of the stretches: sentences in random order
WRONG, LOST, TWICE = 0.004, 0.001, 0.003  # share of the words
BLURRED, BLUR = 0.08, 0.5  # share of the positions, and the most that such a one takes from another token
MADE_UP_SHARE, MADE_UP = 0.5, 0.06  # share of the stretches with words that nobody ever wrote, and of their words


class ListenerTokens:
    """Turns a text into the listener's tokens.

    Args:
        tokenizer: folder of the Whisper model that the listener came from.

    Raises:
        ValueError: the tokenizer is another one.
    """

    def __init__(self, tokenizer: str | Path, listener: Listener) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        whisper = self.tokenizer.convert_tokens_to_ids("<|endoftext|>") is not None
        choices = [list_listener_tokens(self.tokenizer, ascii_only) for ascii_only in (True, False)] if whisper else []
        kept = next((tokens for tokens in choices if len(tokens) == len(listener.pieces)), None)
        if kept is None:
            raise ValueError(
                f"{tokenizer}: its tokenizer is not the listener's, which has {len(listener.pieces)} tokens; give the "
                "Whisper model that the listener came from"
            )
        self.places = {token: place for place, token in enumerate(kept)}
        self.stop = listener.stop

    def __call__(self, text: str) -> list[int]:
        ids = self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
        return [self.places[token] for token in ids if token in self.places]


class TextSource(Source):
    """The lines of a file, consecutive sentences, as endless utterances that a listener has heard.

    A line without case gets a capital and a full stop.

    Args:
        tokens: gives a text's tokens, all below `tokens.stop`.

    Raises:
        ValueError: the file is empty.
    """

    def __init__(self, path: Path, tokens: ListenerTokens, weight: float) -> None:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path}: no text")
        self.lines = [line if has_case(line) else f"{line[0].upper()}{line[1:]}." for line in lines]
        self.words = [word for line in lines[::10] for word in line.split()]
        self.tokens = tokens
        recordings = [[self._utterance(line) for line in self.lines]]
        super().__init__(path.stem, torch.zeros(0, dtype=torch.int16), recordings, weight)

    def draw_stretch(self, cased: bool, random: np.random.Generator) -> Iterator[TrainingUtterance]:
        """Lines as they might be heard, from a random one on or in random order; case is always known."""
        shuffled = random.random() < SHUFFLED_SHARE
        made_up = MADE_UP if random.random() < MADE_UP_SHARE else 0.0
        first = int(random.integers(len(self.lines)))
        for number in range(round(draw_log_uniform(random, *STRETCH))):
            place = int(random.integers(len(self.lines))) if shuffled else (first + number) % len(self.lines)
            text = self.lines[place]
            if made_up:
                text = " ".join(self._made_up(random) if random.random() < made_up else word for word in text.split())
            yield self._utterance(text, self._heard(self._misheard(text, random), random))

    @staticmethod
    def _utterance(text: str, heard: tuple[Tensor, Tensor] | None = None) -> TrainingUtterance:
        return TrainingUtterance(0, round(len(text.split()) / WORDS_A_SECOND * SAMPLE_RATE), text, text, heard)

    def _word(self, random: np.random.Generator) -> str:
        return self.words[int(random.integers(len(self.words)))]

    def _made_up(self, random: np.random.Generator) -> str:
        kind = random.random()
        if kind < 0.25:
            digits = str(int(random.integers(10 ** int(random.integers(1, 6)))))
            forms = [digits, f"${digits}", f"{digits}%", f"{digits},", str(1500 + int(digits) % 550)]
            return forms[int(random.integers(len(forms)))]
        one, other = (self._word(random).strip(".,;:!?\"'") or "a" for _ in range(2))
        word = (one[: (len(one) + 1) // 2] + other[len(other) // 2 :]).lower()
        return word.capitalize() if kind < 0.8 else word

    def _misheard(self, text: str, random: np.random.Generator) -> str:
        words: list[str] = []
        for word in text.split():
            chance = random.random()
            if chance < WRONG:
                words.append(self._word(random))
            elif chance >= WRONG + LOST:
                words += [word] * (2 if chance < WRONG + LOST + TWICE else 1)
        return " ".join(words)

    def _heard(self, text: str, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens [M, 2] and weights [M, 2] of a text; at some positions another token has a share."""
        ids = np.array(self.tokens(text), dtype=np.int64)
        count = len(ids)
        near, any_token = ids[random.integers(max(count, 1), size=count)], random.integers(self.tokens.stop, size=count)
        other = np.where(random.random(count) < 0.3, near, any_token)
        share = (random.random(count) < BLURRED) * random.random(count) * BLUR
        tokens, weights = np.stack([ids, other], 1), np.stack([1 - share, share], 1)
        return torch.from_numpy(tokens), torch.from_numpy(weights).float()


def read_text_sources(
    paths: Sequence[str | Path], tokenizer: str | Path | None, listener: Listener, weights: dict[str, float]
) -> list[TextSource]:
    """Make a source of each file, named by the file without its suffix.

    Args:
        tokenizer: folder of the Whisper model that the listener came from.
        weights: by source name; others weigh 1.

    Raises:
        ValueError: a file or the tokenizer is missing, or the tokenizer is not the listener's.
    """
    if not tokenizer:
        raise ValueError("data.listener_tokenizer is missing: data.texts needs the Whisper model of the listener")
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such text")
    tokens = ListenerTokens(tokenizer, listener)
    return [TextSource(path, tokens, weights.get(path.stem, 1.0)) for path in map(Path, paths)]
