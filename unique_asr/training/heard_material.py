"""What the LLM learns from without audio: rows of what was heard and of its text, drawn ahead of the steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel

from unique_asr.training.decoders import GraphedDecoder
from unique_asr.training.heard_rows import HeardRow, RowMaker
from unique_asr.training.losses import compute_llm_loss
from unique_asr.training.positions import drop_positions, embed_heard
from unique_asr.training.speech_batches import SpeechBatch
from unique_asr.training.stages import StageConfig

AHEAD = 4  # micro-batches that each worker process has ready


class RowStream(IterableDataset):
    """Endless micro-batches: (length of the rows in tokens, rows). Each depends on the seed and its number alone.

    So any number of worker processes gives the same micro-batches in the same order, from any number on.

    Args:
        seed: one number for each process that trains.
        first: number of the first micro-batch.
    """

    def __init__(self, maker: RowMaker, stage: StageConfig, seed: int, first: int = 0) -> None:
        self.maker, self.stage, self.seed, self.first = maker, stage, seed, first

    def __iter__(self) -> Iterator[tuple[int, list[HeardRow]]]:
        worker = get_worker_info()
        number, step = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        while True:
            yield self.draw(number)
            number += step

    def draw(self, number: int) -> tuple[int, list[HeardRow]]:
        """Micro-batch `number`: rows of one of the stage's `lengths`, `tokens` in all, but one row at least."""
        random = np.random.default_rng([self.seed, number])
        length = int(random.choice(self.stage.lengths))
        count = max(1, self.stage.tokens // length)
        return length, [self.maker.make_row(length, self.stage, random) for _ in range(count)]


class HeardMaterial:
    """Draws micro-batches of rows and computes the loss of their answers' tokens; the LLM alone trains.

    Args:
        model: a speech LLM, or a language model if no row has positions.
        workers: processes that draw rows ahead of the steps; 0: this one draws them as they are needed.
    """

    def __init__(self, model: PreTrainedModel, maker: RowMaker, seed: int = 0, workers: int = 0) -> None:
        self.model, self.maker, self.seed, self.workers = model, maker, seed, workers
        self.number = 0  # of the next micro-batch
        self.drawn: list[HeardRow] = []  # since `clear_drawn`
        self._stage: StageConfig | None = None
        self._stream: Iterator[tuple[int, list[HeardRow]]] | None = None

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None, mark_decoded: bool = False
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """See `Material`; measures are `llm`, `tokens` and `seconds`."""
        length, rows = self._next(stage)
        self.drawn += rows
        positions = embed_heard(self.model, [(row.candidates, row.weights) for row in rows])
        none, seconds = torch.zeros(0, dtype=torch.long), sum(row.seconds for row in rows)
        batch = SpeechBatch(
            features={},
            spans=none.view(0, 2),
            windows=none,
            ctc_targets=[],
            before=[row.before for row in rows],
            after=[row.after + row.answer for row in rows],
            labels=[len(row.answer) for row in rows],
            seconds=seconds,
        )
        loss, tokens = compute_llm_loss(
            self.model,
            drop_positions(positions, stage.position_dropout),
            batch,
            (len(rows), length),
            decoder,
            mark_decoded,
            stage.slips,
            slips_share=stage.slips_share,
        )
        return loss, {"llm": loss.detach(), "tokens": tokens, "seconds": seconds}

    def _next(self, stage: StageConfig) -> tuple[int, list[HeardRow]]:
        if not stage.lengths or stage.trains_frames:
            raise ValueError(
                f"stage {stage.name}: what was heard trains the LLM alone, in rows of some tokens; give `lengths` and "
                "no other part in `train`"
            )
        if self._stream is None or self._stage is not stage:
            self._stage, self._stream = stage, self._start(stage)
        self.number += 1
        return next(self._stream)

    def _start(self, stage: StageConfig) -> Iterator[tuple[int, list[HeardRow]]]:
        """Micro-batches from `number` on."""
        stream = RowStream(self.maker, stage, self.seed, self.number)
        if not self.workers:
            return iter(stream)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warn about every worker
        own = torch.Generator()  # the loader would draw from torch's global one, and a resumed run once more
        return iter(DataLoader(stream, batch_size=None, num_workers=self.workers, prefetch_factor=AHEAD, generator=own))

    def collect_random_states(self) -> dict[str, Any]:
        """See `Material`."""
        return {"number": self.number}

    def restore_random_states(self, states: dict[str, Any]) -> None:
        """See `Material`."""
        self.number, self._stream = states["number"], None

    def clear_drawn(self) -> None:
        """See `Material`."""
        self.drawn.clear()

    def describe(self) -> list[dict[str, Any]]:
        """See `Material`."""
        return [{"before": row.before, "heard": row.candidates.tolist(), "answer": row.answer} for row in self.drawn]
