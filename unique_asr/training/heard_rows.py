"""Rows of what a listener heard, or would have heard of a text, and of the text that the LLM is to write of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unique_asr.models import SpeechLLMProcessor
from unique_asr.models.speech_llm.ctc import normalize_ctc_text
from unique_asr.training.corpus import LOWER_CASE, Source, TrainingUtterance
from unique_asr.training.stages import StageConfig

SHORT = 512  # tokens; rows of at most so many may be nearly empty, longer ones are at least half full
TOKENS_A_POSITION = 2.2  # of the positions and of the answer together
ATTEMPTS = 100  # to draw a row that is not too long


@dataclass
class HeardRow:
    """What the LLM reads and writes of one stretch of speech.

    Attributes:
        before, after: token ids around the positions; where the words heard are plain tokens they belong to `before`.
        candidates: int64 [M, A], the likely tokens of each of M positions; M may be 0.
        weights: float32 [M, A], their shares.
        answer: token ids that the LLM is to write, the one that ends it included.
        seconds: length of the speech.
    """

    before: list[int]
    candidates: Tensor
    weights: Tensor
    after: list[int]
    answer: list[int]
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.before) + len(self.candidates) + len(self.after) + len(self.answer)


class RowMaker(Protocol):
    """Makes rows; another format of what is heard is another class of this kind."""

    def make_row(self, length: int, stage: StageConfig, random: np.random.Generator) -> HeardRow:
        """A row of at most `length` tokens that depends on these arguments alone.

        Raises ValueError if no row is as short as that.
        """


class HeardRowMaker:
    """Rows of a listener's positions, as the speech LLM reads them.

    Args:
        texts: sources of texts as a listener would hear them, drawn by their weights.
        recordings: sources of recordings that were heard; each recording is as likely as any other of equal weight.
    """

    def __init__(self, texts: Sequence[Source], recordings: Sequence[Source], processor: SpeechLLMProcessor) -> None:
        texts = [source for source in texts if source.has_utterances(cased=True) and source.weight]
        recordings = [source for source in recordings if source.has_utterances(cased=True) and source.weight]
        if not texts and not recordings:
            raise ValueError("data: nothing was heard and there are no texts; check data.heard and data.texts")
        self.texts = _weigh(texts, [source.weight for source in texts])
        self.recordings = _weigh(recordings, [source.weight * len(source.recordings) for source in recordings])
        self.processor = processor

    def make_row(self, length: int, stage: StageConfig, random: np.random.Generator) -> HeardRow:
        """See `RowMaker`."""
        for _ in range(ATTEMPTS):
            row = self._finish(self._draw(length, stage, random), stage, random)
            if len(row) <= length:
                return row
        raise ValueError(f"stage {stage.name}: lengths has {length}, too short for what is heard and its text")

    def _draw(self, length: int, stage: StageConfig, random: np.random.Generator) -> list[TrainingUtterance]:
        """Utterances of about `length` tokens at most, all from recordings or all from texts."""
        limit = length * random.uniform(0.5 if length > SHORT else 0.05, 1.0)
        recorded = bool(self.recordings) and (not self.texts or random.random() < stage.recorded_share)
        utterances: list[TrainingUtterance] = []
        tokens = 0.0
        while tokens < limit:
            for utterance in self._draw_stretch(recorded, random):
                tokens += TOKENS_A_POSITION * len(utterance.heard[0])
                if utterances and tokens > limit:
                    break
                utterances.append(utterance)
        return utterances

    def _draw_stretch(self, recorded: bool, random: np.random.Generator) -> Iterable[TrainingUtterance]:
        sources, shares = self.recordings if recorded else self.texts
        return sources[random.choice(len(sources), p=shares)].draw_stretch(True, random)

    def _finish(
        self, utterances: Sequence[TrainingUtterance], stage: StageConfig, random: np.random.Generator
    ) -> HeardRow:
        cased = random.random() < stage.cased_share
        before, after = self.processor.tokenize_prompt(None if cased else LOWER_CASE)
        text = " ".join(utterance.text for utterance in utterances)
        answer = self.processor.tokenizer(text if cased else normalize_ctc_text(text), add_special_tokens=False)[
            "input_ids"
        ]
        widest = max(utterance.heard[0].shape[1] for utterance in utterances)
        candidates, weights = (
            torch.cat(
                [
                    torch.nn.functional.pad(utterance.heard[which], (0, widest - utterance.heard[which].shape[1]))
                    for utterance in utterances
                ]
            )
            for which in (0, 1)
        )
        seconds = sum(utterance.seconds for utterance in utterances)
        end = self.processor.end_token_id
        return HeardRow(before, candidates.long(), weights.float(), after, [*answer, end], seconds)


def _weigh(sources: Sequence[Source], weights: Sequence[float]) -> tuple[list[Source], np.ndarray] | None:
    """The sources and the probability of each; None without any."""
    return (list(sources), np.array(weights) / sum(weights)) if sources else None
