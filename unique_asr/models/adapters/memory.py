"""What a pass takes on the device, before it is decoded: weights, KV cache, page statistics, audio, and scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.cache import page_sizes
from unique_asr.attention.reference import PARTIAL_SUM
from unique_asr.attention.scores import SCORES

from .catalogue import Adapter, Checkpoint

PROMPT_TOKENS = 256  # of text around the audio, at most
SPARE_TOKENS = 256  # of the answer, for short audio


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    cache: int  # keys and values
    statistics: int  # of their pages
    audio: int  # embeddings, and the copy of them in the prompt
    scratch: int  # of the largest operation on a prefill chunk

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.statistics + self.audio + self.scratch

    @property
    def pass_bytes(self) -> int:
        """What comes on top of a loaded model."""
        return self.total - self.weights


def text_tokens(adapter: Adapter, seconds: float) -> int:
    """The most tokens that the answer to a pass may have."""
    return int(adapter.text_tokens_a_second * seconds) + SPARE_TOKENS


def prompt_tokens(adapter: Adapter, seconds: float) -> int:
    """Positions of the prompt of a pass."""
    return int((adapter.tokens_a_second + adapter.marker_tokens_a_second) * seconds) + PROMPT_TOKENS


def pass_tokens(adapter: Adapter, seconds: float) -> int:
    """Positions of a pass, prompt and answer together."""
    return prompt_tokens(adapter, seconds) + text_tokens(adapter, seconds)


def estimate(
    adapter: Adapter,
    seconds: float,
    shape: Checkpoint | None = None,
    attention: SparseAttentionConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    prefill_chunk: int = 2048,
    tokens: int | None = None,
    batch: int = 1,
) -> Memory:
    """Memory for `seconds` of audio in one pass; `tokens` are its positions if they are known."""
    shape, attention = shape or adapter.checkpoints[0], attention or SparseAttentionConfig()
    tokens = tokens or pass_tokens(adapter, seconds)
    capacity = -(-tokens // PARTIAL_SUM) * PARTIAL_SUM
    heads = batch * shape.layers * shape.kv_heads
    statistics = 0
    if attention.budget is not None:
        buffers = SCORES[attention.score].buffers(shape.head_dim, dtype, attention.statistics_dtype)
        page = sum(width * each.itemsize for width, each in buffers)
        statistics = sum(heads * (capacity // size) * page for size in page_sizes(attention))
    positions = min(prefill_chunk if adapter.chunked else tokens, tokens)
    feed_forward = batch * positions * (3 * shape.feed_forward + 6 * shape.hidden) * dtype.itemsize
    # Behind a mask, which every chunk but the first has, `sdpa` repeats keys and values for the heads of a group.
    repeated = 2 * batch * shape.heads * min(prompt_tokens(adapter, seconds), tokens) * shape.head_dim * dtype.itemsize
    masked = adapter.chunked and shape.heads != shape.kv_heads
    audio = int(adapter.tokens_a_second * seconds)
    return Memory(
        weights=int(shape.parameters * 1e9 * dtype.itemsize),
        cache=2 * heads * capacity * shape.head_dim * dtype.itemsize,
        statistics=statistics,
        audio=2 * batch * audio * shape.hidden * dtype.itemsize,
        scratch=max(feed_forward, repeated if masked else 0),
    )


def shape_of(model: Any) -> Checkpoint:
    """What memory depends on, of a loaded model."""
    config = model.config.get_text_config(decoder=True)
    return Checkpoint(
        hub_id=getattr(config, "name_or_path", ""),
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
    )
