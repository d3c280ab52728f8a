"""What a pass of a known model takes on the device, before its prompt is made: tokens, and memory."""

from __future__ import annotations

import torch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.decoding.memory import DecoderShape, Memory, estimate_memory
from unique_asr.models.pretrained.catalogue import KnownModel

PROMPT_TOKENS = 256  # of text around the audio, at most
SPARE_TOKENS = 256  # of the answer, for short audio


def limit_text_tokens(known_model: KnownModel, seconds: float) -> int:
    """Return the most tokens that the answer to a pass may have."""
    return int(known_model.text_tokens_a_second * seconds) + SPARE_TOKENS


def estimate_prompt_tokens(known_model: KnownModel, seconds: float) -> int:
    """Return the most positions of the prompt of a pass."""
    return int((known_model.tokens_a_second + known_model.marker_tokens_a_second) * seconds) + PROMPT_TOKENS


def estimate_pass_tokens(known_model: KnownModel, seconds: float) -> int:
    """Return the most positions of a pass, prompt and answer together."""
    return estimate_prompt_tokens(known_model, seconds) + limit_text_tokens(known_model, seconds)


def estimate_pass_memory(
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
    """Estimate the memory for `seconds` of audio in one pass; see `unique_asr.decoding.memory.estimate_memory`.

    Args:
        shape: of the LLM; by default that of the first checkpoint.
        tokens: positions of the pass, if they are known.
    """
    return estimate_memory(
        shape or known_model.checkpoints[0],
        estimate_prompt_tokens(known_model, seconds),
        tokens or estimate_pass_tokens(known_model, seconds),
        int(known_model.tokens_a_second * seconds),
        attention,
        dtype,
        prefill_chunk if known_model.chunked else None,
        batch,
        device,
    )
