"""What a pass takes on the device, before it is decoded: weights, KV cache, page statistics, audio, and scratch."""

from __future__ import annotations

import torch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.decoding.memory import DecoderShape, Memory, decoding_memory, shape_of
from unique_asr.models.pretrained.catalogue import KnownModel

__all__ = ["Memory", "estimate", "pass_tokens", "prompt_tokens", "shape_of", "text_tokens"]

PROMPT_TOKENS = 256  # of text around the audio, at most
SPARE_TOKENS = 256  # of the answer, for short audio


def text_tokens(known_model: KnownModel, seconds: float) -> int:
    """The most tokens that the answer to a pass may have."""
    return int(known_model.text_tokens_a_second * seconds) + SPARE_TOKENS


def prompt_tokens(known_model: KnownModel, seconds: float) -> int:
    """Positions of the prompt of a pass."""
    return int((known_model.tokens_a_second + known_model.marker_tokens_a_second) * seconds) + PROMPT_TOKENS


def pass_tokens(known_model: KnownModel, seconds: float) -> int:
    """Positions of a pass, prompt and answer together."""
    return prompt_tokens(known_model, seconds) + text_tokens(known_model, seconds)


def estimate(
    known_model: KnownModel,
    seconds: float,
    shape: DecoderShape | None = None,
    attention: SparseAttentionConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    prefill_chunk: int = 2048,
    tokens: int | None = None,
    batch: int = 1,
    device: str = "cuda",
) -> Memory:
    """Memory for `seconds` of audio in one pass; `tokens` are its positions if they are known."""
    return decoding_memory(
        shape or known_model.checkpoints[0],
        prompt_tokens(known_model, seconds),
        tokens or pass_tokens(known_model, seconds),
        int(known_model.tokens_a_second * seconds),
        attention,
        dtype,
        prefill_chunk if known_model.chunked else None,
        batch,
        device,
    )
