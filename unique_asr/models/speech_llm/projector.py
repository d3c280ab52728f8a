"""From encoder frames to positions of the LLM.

The projector maps stacked encoder frames into the LLM's embedding space, where a CTC head reads them as tokens:
logit(v) = c . E_v / |E_v|, with E the LLM's own embedding table. Most frames are blank, so the frames between two
spikes merge into one position: its expected token embedding plus a learned linear map of the mean hidden state, which
carries what the CTC head could not decide. Ten minutes of speech are 7,500 frames and about 2,400 positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unique_asr.models.speech_llm.configuration import SpeechLLMConfig


@dataclass
class Frames:
    """The projector's output for W windows of T frames."""

    hidden: Tensor  # [W, T, projector_size]
    ctc: Tensor  # [W, T, text hidden] states that are compared with the embeddings of tokens
    logits: Tensor  # [W, T, C + 1] over the C CTC tokens and, last, the blank
    states: Tensor | None = None  # [W, F, audio hidden] the encoder's output, if a listener needs it


@dataclass
class Positions:
    """M merged positions of W windows, in order: what the LLM's embeddings are made of."""

    expected: Tensor  # [M, text hidden] expected token embedding of what was heard
    hidden: Tensor  # [M, size] the state that the residual maps
    frames: Tensor  # [M] first frame of each position in its window
    counts: Tensor  # [W] positions of each window


class Residual(nn.Linear):
    """A linear layer that starts at zero: the LLM first reads what the CTC head reads, then learns to use the rest."""


def make_context(size: int, layers: int, dropout: float) -> nn.Module:
    """Make pre-norm transformer layers [W, T, size] -> [W, T, size]; the encoder's states carry positions already."""
    layer = nn.TransformerEncoderLayer(
        size, max(1, size // 64), 4 * size, dropout, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(size), enable_nested_tensor=False)


class Projector(nn.Module):
    """LayerNorm and a two-layer MLP over stacked frames, with a CTC head tied to the LLM's token embeddings.

    Transformer layers between the two let the encoder stay frozen: what a frame spells depends on its neighbours.
    """

    def __init__(self, config: SpeechLLMConfig) -> None:
        super().__init__()
        self.stack_factor = config.stack_factor
        self.merge = config.merge
        self.merge_frames = config.merge_frames
        stacked = config.audio_config.hidden_size * config.stack_factor
        text_size = config.text_config.hidden_size
        self.norm = nn.LayerNorm(stacked)
        self.up = nn.Linear(stacked, config.projector_size)
        self.context = nn.Identity()
        if config.context_layers:
            self.context = make_context(config.projector_size, config.context_layers, config.context_dropout)
        self.down = nn.Linear(config.projector_size, text_size)
        self.blank = nn.Linear(config.projector_size, 1)
        listens = config.merge == "decoder"
        self.residual = Residual(config.audio_config.d_model if listens else config.projector_size, text_size)

    def forward(self, encoder_states: Tensor, directions: Tensor) -> Frames:
        """Project the encoder's states.

        Args:
            encoder_states: [W, F, audio hidden].
            directions: unit vectors of the embeddings of the CTC tokens, [C, text hidden].

        Returns:
            Frames [W, F // stack_factor, ...].
        """
        *batch, frames, size = encoder_states.shape
        frames -= frames % self.stack_factor
        stacked = encoder_states[..., :frames, :].reshape(*batch, frames // self.stack_factor, size * self.stack_factor)
        hidden = self.context(nn.functional.gelu(self.up(self.norm(stacked))))
        ctc = self.down(hidden)
        return Frames(hidden, ctc, self.compute_ctc_logits(hidden, ctc, directions))

    def compute_ctc_logits(self, hidden: Tensor, ctc: Tensor, directions: Tensor) -> Tensor:
        """Compute the logits [W, T, C + 1] of the CTC tokens and, last, of the blank."""
        return torch.cat([ctc @ directions.T, self.blank(hidden)], dim=-1)

    def make_positions(self, frames: Frames, keep: Tensor, embeddings: Tensor) -> Positions:
        """Merge the kept frames of each window into positions.

        Args:
            frames: of W windows.
            keep: bool [W, T], with one run of True in each window.
            embeddings: of the CTC tokens, [C, text hidden]. The expected embedding of a position is their mean,
                weighted by how likely they are; the weights sum to at most 1.
        """
        windows, length = keep.shape
        index = torch.arange(length, device=keep.device)
        first_kept = keep.int().argmax(-1, keepdim=True)
        start = keep.clone()
        if self.merge == "ctc":
            best = frames.logits.argmax(-1)
            spike = best != frames.logits.shape[-1] - 1
            spike[:, 1:] &= best[:, 1:] != best[:, :-1]
            origin = torch.maximum(torch.where(spike, index, 0).cummax(-1).values, first_kept)
            start &= spike | ((index - origin) % self.merge_frames == 0)
        group = start.flatten().cumsum(0)[keep.flatten()] - 1
        counts = start.sum(-1)
        total_positions = int(counts.sum())

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(total_positions, *values.shape[1:]).index_add_(0, group, values)

        logits = frames.logits[keep]
        posterior = logits.float().softmax(-1)
        speech = total(1 - posterior[:, -1])
        tokens = total(posterior[:, :-1]) / speech.clamp_min(1.0)[:, None]
        hidden = total(frames.hidden[keep].float()) / total(torch.ones_like(logits[:, 0], dtype=torch.float32))[:, None]
        expected = tokens.to(embeddings.dtype) @ embeddings
        return Positions(expected, hidden, index.expand(windows, -1)[start], counts)

    def embed(self, positions: Positions) -> Tensor:
        """Make the LLM's input embeddings [M, text hidden]."""
        return positions.expected + self.residual(positions.hidden.to(self.residual.weight.dtype))
