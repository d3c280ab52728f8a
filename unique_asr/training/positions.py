"""The audio positions of an LLM whose listener writes tokens: the expected embedding of a few likely ones each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unique_asr.models import SpeechLLMForConditionalGeneration
from unique_asr.training.speech_batches import send


@torch.no_grad()
def embed_heard(model: SpeechLLMForConditionalGeneration, heard: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Positions [M, hidden] of each row, from its candidates [M, A] and their weights [M, A]; M may be 0."""
    table = model.get_input_embeddings().weight
    counts = [len(candidates) for candidates, _ in heard]
    if not sum(counts):
        return [table.new_zeros(0, table.shape[1]) for _ in heard]
    widest = max(candidates.shape[1] for candidates, _ in heard)
    candidates, weights = (
        torch.cat([nn.functional.pad(row[which], (0, widest - row[which].shape[1])).to(dtype) for row in heard])
        for which, dtype in ((0, torch.long), (1, torch.float32))
    )
    expected = model.listener.embed_expected(
        send(weights, table.device).to(table.dtype), send(candidates, table.device), table
    )
    return list(expected.split(counts))


def drop_positions(positions: Sequence[Tensor], share: float) -> list[Tensor]:
    """The same positions, a random `share` of them zero."""
    if not share:
        return list(positions)
    return [each * (torch.rand(len(each), 1, device=each.device) >= share) for each in positions]
