"""What a language model without audio learns from: stretches of texts.

The second half of a stretch counts as what inference decodes token by token after a prefill of the first half, so a
mask with `queries: decoded` is for the second half.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unique_asr.training.decoders import GraphedDecoder, PlainDecoder
from unique_asr.training.speech_batches import send
from unique_asr.training.stages import StageConfig


class TextMaterial:
    """Draws micro-batches of a stage's `tokens` in rows of its `lengths`; the loss is that of every next token.

    Args:
        files: texts in UTF-8.

    Raises:
        ValueError: there are no files, or one is missing.
    """

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
        """Tokens of all files."""
        return sum(map(len, self.ids))

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None, mark_decoded: bool = False
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """See `Material`; measures are `llm` and `tokens`."""
        if not stage.lengths or max(stage.lengths) > stage.tokens:
            raise ValueError(
                f"stage {stage.name}: lengths is {stage.lengths}; give the tokens of a row, at most `tokens`"
            )
        length = stage.lengths[0] if len(stage.lengths) == 1 else int(self.random.choice(stage.lengths))
        device = self.model.get_input_embeddings().weight.device
        ids = send(torch.stack([self._draw(stage, length) for _ in range(stage.tokens // length)]), device)
        embeds = self.model.get_input_embeddings()(ids)
        run = decoder or PlainDecoder(self.model.get_decoder())
        decoded = (torch.arange(length, device=device) >= length // 2).expand(len(ids), -1)
        states = run(embeds, decoded.contiguous()) if mark_decoded else run(embeds)
        logits = self.model.get_output_embeddings()(states[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        return loss, {"llm": loss.detach(), "tokens": ids.numel()}

    def _draw(self, stage: StageConfig, length: int) -> Tensor:
        """Ids [length] of a stretch, all of them equally likely."""
        spare = np.array([max(len(ids) - length + 1, 0) for ids in self.ids])
        if not spare.sum():
            raise ValueError(f"stage {stage.name}: lengths has {length}, longer than every text in text.files")
        chosen = int(self.random.choice(len(spare), p=spare / spare.sum()))
        first = int(self.random.integers(spare[chosen]))
        self.drawn.append((self.files[chosen], first, length))
        return self.ids[chosen][first : first + length]

    def collect_random_states(self) -> dict[str, Any]:
        """See `Material`."""
        return {"text": self.random.bit_generator.state}

    def restore_random_states(self, states: dict[str, Any]) -> None:
        """See `Material`."""
        self.random.bit_generator.state = states["text"]

    def clear_drawn(self) -> None:
        """See `Material`."""
        self.drawn.clear()

    def describe(self) -> list[dict[str, Any]]:
        """See `Material`."""
        return [{"file": str(file), "token": first, "length": length} for file, first, length in self.drawn]
