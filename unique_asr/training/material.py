"""The contract of what a model learns from."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from unique_asr.training.decoders import GraphedDecoder
from unique_asr.training.stages import StageConfig


class Material(Protocol):
    """What a model learns from: `SpeechMaterial`, `HeardMaterial`, `PretrainedMaterial`, `TextMaterial`."""

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None, mark_decoded: bool
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Draw a micro-batch and compute its loss.

        Args:
            decoder: runs the LLM in place of its own forward pass; None: its own.
            mark_decoded: tell the LLM which tokens inference decodes one by one, for a mask of those alone.

        Returns:
            The loss (scalar, with gradients) and measures of it: `ctc`, `llm`, `seconds` of audio, `tokens` of the LLM.
        """

    def collect_random_states(self) -> dict[str, Any]:
        """Everything that decides what is drawn next, for a checkpoint."""

    def restore_random_states(self, states: dict[str, Any]) -> None:
        """Draw on as the material did that gave `states`."""

    def clear_drawn(self) -> None:
        """Drop the log of drawn items; losses were finite."""

    def describe(self) -> list[Any]:
        """The items drawn since `clear_drawn`, as JSON values, for a report of a loss that is not finite."""
