"""What a speech LLM learns from: recordings joined to items, heard or encoded, and what it should write of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus, TrainingItem, draw_log_uniform
from unique_asr.training.decoders import GraphedDecoder
from unique_asr.training.losses import compute_ctc_loss, compute_llm_loss
from unique_asr.training.positions import drop_positions, embed_heard
from unique_asr.training.speech_batches import SpeechBatch, SpeechBatcher
from unique_asr.training.stages import StageConfig

TOKENS_A_SECOND = 9.0  # of fast speech: the LLM's positions and the transcript together


class SpeechMaterial:
    """Draws micro-batches of items and computes their losses.

    Utterances that were heard before (`listening.py`) have their positions; of all others the audio is augmented and
    encoded.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        corpus: Corpus,
        augment: AugmentConfig,
        seed: int = 0,
    ) -> None:
        self.model, self.processor, self.corpus = model, processor, corpus
        self.batcher = SpeechBatcher(model, processor, augment, seed)
        self.drawn: list[list[TrainingItem]] = []  # of the micro-batches since `clear_drawn`

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None, mark_decoded: bool = False
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """See `Material`; measures are `ctc`, `llm`, `seconds` and `tokens`."""
        items, shape = self.draw_items(stage)
        self.drawn.append(items)
        if all(utterance.heard is not None for item in items for _, utterance, _ in item.pieces):
            return self._heard_loss(stage, items, shape, decoder, mark_decoded)
        batch = self.batcher.make_batch(items, transcripts=stage.llm_weight > 0)
        frames_train = stage.trains_frames
        self.model.projector.train(frames_train)
        with torch.set_grad_enabled(frames_train):
            frames = self.model.encode_windows(batch.features)
        self.model.projector.eval()
        measures: dict[str, Tensor | float] = {"seconds": batch.seconds}
        loss = frames.logits.new_zeros((), dtype=torch.float32)
        if stage.ctc_weight and frames_train and bool((batch.windows == 1).any()):
            measures["ctc"] = compute_ctc_loss(frames, batch)
            loss = loss + stage.ctc_weight * measures["ctc"]
        if stage.llm_weight:
            with torch.set_grad_enabled(frames_train):
                positions = self.model.make_positions(frames, batch.spans)
            del frames
            embeds = self.model.embed_positions(positions)
            recording = torch.repeat_interleave(batch.windows)
            counts = torch.zeros_like(batch.windows).index_add_(0, recording, positions.counts.cpu())
            audio = list(embeds.split(counts.tolist()))
            measures["llm"], measures["tokens"] = self._llm_loss(stage, audio, batch, shape, decoder, mark_decoded)
            loss = loss + stage.llm_weight * measures["llm"]
        if not loss.requires_grad:
            raise ValueError(
                f"stage {stage.name}: nothing to learn from; CTC needs `seconds` below one window and the encoder or"
                " the projector in `train`, the LLM needs `llm_weight`"
            )
        return loss, {name: value.detach() if isinstance(value, Tensor) else value for name, value in measures.items()}

    def _heard_loss(
        self,
        stage: StageConfig,
        items: Sequence[TrainingItem],
        shape: tuple[int, int] | None,
        decoder: GraphedDecoder | None,
        mark_decoded: bool,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        if stage.trains_frames or not stage.llm_weight:
            raise ValueError(f"stage {stage.name}: what was heard before trains the LLM alone; give it `llm_weight`")
        loss, tokens = self._llm_loss(
            stage, self._embed(items), self.batcher.make_texts(items), shape, decoder, mark_decoded
        )
        seconds = sum(item.seconds for item in items)
        return stage.llm_weight * loss, {"llm": loss.detach(), "tokens": tokens, "seconds": seconds}

    def _embed(self, items: Sequence[TrainingItem]) -> list[Tensor]:
        """Positions [M, hidden] of each item, from what was heard of its utterances."""
        parts = [[utterance.heard for _, utterance, _ in item.pieces] for item in items]
        embedded = iter(embed_heard(self.model, [part for own in parts for part in own]))
        return [torch.cat([next(embedded) for _ in own]) for own in parts]

    def _llm_loss(
        self,
        stage: StageConfig,
        audio: list[Tensor],
        batch: SpeechBatch,
        shape: tuple[int, int] | None,
        decoder: GraphedDecoder | None,
        mark_decoded: bool,
    ) -> tuple[Tensor, int]:
        page_size = stage.schedule.last.sparse.page_size if stage.pack else None
        return compute_llm_loss(
            self.model,
            drop_positions(audio, stage.position_dropout),
            batch,
            shape,
            decoder,
            mark_decoded,
            stage.slips,
            page_size,
            stage.slips_share,
        )

    def draw_items(self, stage: StageConfig) -> tuple[list[TrainingItem], tuple[int, int] | None]:
        """The items of a micro-batch, and the number of rows and their length in tokens; None: a row for each item."""
        low, high = stage.seconds
        if self.corpus.random.random() < stage.short_share:
            low, high = min(5.0, low), min(29.0, high)
        windows = self.processor.window_seconds
        seconds, shape = draw_log_uniform(self.corpus.random, low, high), None
        if stage.tokens:
            length = min(2 ** math.ceil(math.log2(seconds * TOKENS_A_SECOND)), stage.tokens)
            if stage.pack:
                return self._row(stage, low, min(length / TOKENS_A_SECOND, high)), (1, stage.tokens)
            rows, longest = stage.tokens // length, min(length / TOKENS_A_SECOND, high)
            lengths = self.corpus.random.uniform(max(longest / 2, low), longest, rows).tolist()
            shape = rows, length
        elif high <= windows:
            lengths = self.corpus.random.uniform(low, high, stage.windows).tolist()
        else:
            lengths = [seconds] * max(1, round(stage.windows * windows / max(seconds, windows)))
        return [self.corpus.draw_item(seconds, stage.cased_share) for seconds in lengths], shape

    def _row(self, stage: StageConfig, low: float, high: float) -> list[TrainingItem]:
        """Items of `low` .. `high` seconds that fill a row together, those for its end ever shorter."""
        items: list[TrainingItem] = []
        room = stage.tokens
        while not items or room >= low * TOKENS_A_SECOND:
            longest = min(room / TOKENS_A_SECOND, high)
            seconds = self.corpus.random.uniform(max(longest / 2, low), longest)
            items.append(self.corpus.draw_item(seconds, stage.cased_share))
            room -= self.count_tokens(items[-1])
        return items

    def count_tokens(self, item: TrainingItem) -> int:
        """Tokens that the LLM reads of an item; an estimate, that of fast speech, for what was not heard before."""
        heard = [utterance.heard for _, utterance, _ in item.pieces]
        if any(found is None for found in heard):
            return math.ceil(item.seconds * TOKENS_A_SECOND)
        text = self.batcher.make_texts([item])
        return len(text.before[0]) + sum(len(candidates) for candidates, _ in heard) + len(text.after[0])

    def collect_random_states(self) -> dict[str, Any]:
        """See `Material`."""
        return {"corpus": self.corpus.random.bit_generator.state, "batcher": self.batcher.random.get_state()}

    def restore_random_states(self, states: dict[str, Any]) -> None:
        """See `Material`."""
        self.corpus.random.bit_generator.state = states["corpus"]
        self.batcher.random.set_state(states["batcher"])

    def clear_drawn(self) -> None:
        """See `Material`."""
        self.drawn.clear()

    def describe(self) -> list[list[dict[str, Any]]]:
        """See `Material`."""
        return describe_items(self.drawn)


def describe_items(drawn: Sequence[Sequence[TrainingItem]]) -> list[list[dict[str, Any]]]:
    """The utterances of every item of some micro-batches, as JSON values."""
    return [
        [
            {"source": source.name, "start": utterance.start, "end": utterance.end, "text": utterance.text}
            for source, utterance, _ in item.pieces
        ]
        for items in drawn
        for item in items
    ]
