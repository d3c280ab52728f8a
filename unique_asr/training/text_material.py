"""What a language model without audio learns from: stretches of texts.

The second half of a stretch is what inference would decode token by token, after a prefill of the first; so that is
what a mask with `queries: decoded` is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unique_asr.training.decoders import GraphedDecoder, PlainDecoder
from unique_asr.training.speech_batches import send

if TYPE_CHECKING:
    from unique_asr.training.trainer import StageConfig


class TextMaterial:
    """Draws micro-batches of `tokens` in rows of `length`, and computes their loss: every next token's."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: Sequence[str | Path], seed: int = 0
    ) -> None:
        self.model, self.files = model, [Path(file) for file in files]
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"text.files: {file}: no such text")
        if not self.files:
            raise ValueError("text.files is missing: text.model learns from texts, text.files=[FILE]")
        self.ids = [
            tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
            for file in self.files
        ]
        self.random = np.random.default_rng(seed)
        self.drawn: list[tuple[Path, int, int]] = []  # files, first tokens and lengths since `clear_drawn`

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None, mark_decoded: bool = False
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        length = stage.length
        if not 0 < length <= stage.tokens:
            raise ValueError(f"stage {stage.name}: length is {length}; give the tokens of a row, at most `tokens`")
        device = self.model.get_input_embeddings().weight.device
        ids = send(torch.stack([self._stretch(stage) for _ in range(stage.tokens // length)]), device)
        embeds = self.model.get_input_embeddings()(ids)
        run = decoder or PlainDecoder(self.model.get_decoder())
        decoded = (torch.arange(length, device=device) >= length // 2).expand(len(ids), -1)
        states = run(embeds, decoded.contiguous()) if mark_decoded else run(embeds)
        logits = self.model.get_output_embeddings()(states[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        return loss, {"llm": loss.detach(), "tokens": ids.numel()}

    def _stretch(self, stage: StageConfig) -> Tensor:
        """Of any file, the longer the likelier."""
        spare = np.array([max(len(ids) - stage.length + 1, 0) for ids in self.ids])
        if not spare.sum():
            raise ValueError(f"stage {stage.name}: length is {stage.length}, longer than every text in text.files")
        chosen = int(self.random.choice(len(spare), p=spare / spare.sum()))
        first = int(self.random.integers(spare[chosen]))
        self.drawn.append((self.files[chosen], first, stage.length))
        return self.ids[chosen][first : first + stage.length]

    def collect_random_states(self) -> dict[str, Any]:
        return {"text": self.random.bit_generator.state}

    def restore_random_states(self, states: dict[str, Any]) -> None:
        self.random.bit_generator.state = states["text"]

    def clear_drawn(self) -> None:
        self.drawn.clear()

    def describe(self) -> list[dict[str, Any]]:
        return [{"file": str(file), "token": first, "length": length} for file, first, length in self.drawn]
