"""Encoding the tensors of a processor into audio embeddings, a bounded piece at a time; all at once gives the same.

A family cuts the audio inputs where its encoder does not look across: Whisper's windows are rows, Qwen3-ASR attends
within windows of 8 s, VibeVoice carries its convolutions' state itself. The others encode a pass as one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

Inputs = dict[str, Tensor]


class AudioEncoding:
    """How a family encodes audio; this one as a single piece. names: the processor's tensors for the encoder."""

    names: tuple[str, ...] = ("input_features", "input_features_mask")

    def cut_pieces(self, model: Any, inputs: Inputs, windows: int) -> list[Inputs]:
        """Cut the audio inputs into pieces of about `windows` encoder windows."""
        return [{name: inputs[name] for name in self.names if name in inputs}]

    def embed(self, model: Any, piece: Inputs) -> Tensor:
        """Compute the embeddings [N, hidden] of the audio positions of a piece."""
        output = model.get_audio_features(**piece).pooler_output
        return output.reshape(-1, output.shape[-1])

    def get_audio_token(self, config: Any) -> int:
        """Get the placeholder of an audio position from the model's configuration."""
        return config.audio_token_id


class WindowRows(AudioEncoding):
    """Each row of the inputs is a window of its own, as in Whisper's encoder."""

    def cut_pieces(self, model: Any, inputs: Inputs, windows: int) -> list[Inputs]:
        rows = len(inputs[self.names[0]])
        whole = super().cut_pieces(model, inputs, windows)[0]
        parts = (slice(start, start + windows) for start in range(0, rows, windows))
        return [{name: value[part] if len(value) == rows else value for name, value in whole.items()} for part in parts]


class MossRows(WindowRows):
    """Rows with a padding mask."""

    names = ("input_features", "input_features_mask", "padding_mask")


class Qwen3Windows(AudioEncoding):
    """An encoder that attends within windows of `n_window_infer` mel frames; [1, mel, T] is cut at multiples."""

    def cut_pieces(self, model: Any, inputs: Inputs, windows: int) -> list[Inputs]:
        mask = inputs["input_features_mask"]
        if len(mask) > 1:
            raise ValueError("audio is encoded one recording at a time; give a batch to generate() itself")
        config = model.config.audio_config
        unit = 2 * config.n_window  # frames of a convolution's chunk, to which rows are padded
        end = -(-int(mask.sum()) // unit) * unit
        size = windows * config.n_window_infer
        parts = (slice(start, min(start + size, end)) for start in range(0, end, size))
        features = inputs["input_features"]
        return [{"input_features": features[..., part], "input_features_mask": mask[:, part]} for part in parts]


class Qwen2AudioRows(WindowRows):
    """A model without `get_audio_features`; this is what its `forward` does with the inputs."""

    names = ("input_features", "feature_attention_mask")

    def embed(self, model: Any, piece: Inputs) -> Tensor:
        tower, features = model.model.audio_tower, piece["input_features"]
        lengths, positions = tower._get_feat_extract_output_lengths(piece["feature_attention_mask"].sum(-1))
        frames = torch.arange((features.shape[-1] - 2) // 2 + 1, device=features.device)
        embeds = features.new_zeros(len(features), len(frames), 1)
        mask = (frames < lengths[:, None]).long()
        mask = create_bidirectional_mask(config=tower.config, inputs_embeds=embeds, attention_mask=mask)
        hidden = tower(features, attention_mask=mask).last_hidden_state
        hidden = model.model.multi_modal_projector(hidden)
        return hidden[torch.arange(hidden.shape[1], device=hidden.device) < positions[:, None]]


class GranitePiece(AudioEncoding):
    """A model whose mask selects among the projector's positions, which come in groups."""

    def embed(self, model: Any, piece: Inputs) -> Tensor:
        output = model.get_audio_features(piece["input_features"].to(model.dtype)).pooler_output
        mask = piece.get("input_features_mask")
        return output.flatten(0, 1) if mask is None else output[mask.bool()]


class VibeVoicePiece(AudioEncoding):
    """An encoder that works on 60 s at a time by itself; without its noise for training, so that runs repeat."""

    names = ("input_values", "padding_mask")

    def embed(self, model: Any, piece: Inputs) -> Tensor:
        config = model.config.acoustic_tokenizer_encoder_config
        noise, config.vae_std = config.vae_std, 0.0
        try:
            return super().embed(model, piece)
        finally:
            config.vae_std = noise


class Phi4Piece(AudioEncoding):
    """The audio branch of an embedding layer that inserts its vectors itself."""

    names = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")

    def embed(self, model: Any, piece: Inputs) -> Tensor:
        sizes = piece["audio_embed_sizes"]
        total = int(sizes.sum())
        token = self.get_audio_token(model.config)
        ids = torch.full((1, total), token, device=model.device)
        embeds = torch.zeros(1, total, model.config.hidden_size, dtype=model.dtype, device=model.device)
        return model.model.embed_tokens_extend(ids, embeds, **piece)[0]

    def get_audio_token(self, config: Any) -> int:
        return config.audio_config.audio_token_id


def encode(encoding: AudioEncoding, model: Any, inputs: Inputs, windows: int) -> Iterator[tuple[Tensor, int, int]]:
    """Encode a pass piece by piece.

    Args:
        encoding: of the family of the model.
        model: of transformers.
        inputs: tensors of the processor.
        windows: encoder windows of a piece.

    Yields:
        Audio embeddings [N, hidden] of a piece, the number of pieces that are done, and the number of all.
    """
    pieces = encoding.cut_pieces(model, inputs, windows)
    for done, piece in enumerate(pieces, start=1):
        moved = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in piece.items()
        }
        yield encoding.embed(model, moved), done, len(pieces)


def insert_audio(encoding: AudioEncoding, model: Any, input_ids: Tensor, features: list[Tensor]) -> Tensor:
    """Put audio embeddings in the place of the placeholders of a prompt.

    Args:
        encoding: of the family of the model.
        model: of transformers.
        input_ids: of the prompt, [1, N].
        features: what `encode` yields, each [M, hidden].

    Returns:
        Embeddings [1, N, hidden].

    Raises:
        ValueError: there are more or fewer placeholders than audio positions.
    """
    ids = input_ids.to(model.device)
    places = ids == encoding.get_audio_token(model.config)
    embeds = model.get_input_embeddings()(ids.masked_fill(places, 0))
    found = sum(map(len, features))
    if int(places.sum()) != found:
        raise ValueError(
            f"the prompt has {int(places.sum())} places for audio and the encoder gave {found} positions: "
            "lower max_pass_seconds, the processor cuts what is longer than it knows"
        )
    return embeds.index_put((places,), torch.cat(features).to(embeds))
