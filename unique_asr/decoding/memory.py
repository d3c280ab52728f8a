"""What decoding takes on a device, before it begins, and what is free there. All in bytes.

`estimate_memory` is the one estimate: of a sequence alone and of an engine, of our speech LLM and of known models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unique_asr.attention import PagedCache, SparseAttentionConfig
from unique_asr.attention.huggingface import BATCHED_TOKENS
from unique_asr.attention.reference import PARTIAL_SUM
from unique_asr.attention.scores import SCORES
from unique_asr.attention.static_step import page_sizes


@dataclass(frozen=True)
class DecoderShape:
    """What memory depends on: the shape of an LLM."""

    hub_id: str
    parameters: float  # billions
    layers: int  # of the LLM
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    feed_forward: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a model and the decoding of some sequences take."""

    weights: int
    cache: int  # keys and values
    statistics: int  # of pages and super-pages
    audio: int  # embeddings, and the copy of them in the prompt
    scratch: int  # of the largest operation on a prefill chunk

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.weights + self.cache + self.statistics + self.audio + self.scratch

    @property
    def pass_bytes(self) -> int:
        """Bytes that come on top of a loaded model."""
        return self.total - self.weights


def read_shape(model: Any) -> DecoderShape:
    """Return the shape of a loaded model's LLM."""
    config = model.config.get_text_config(decoder=True)
    return DecoderShape(
        hub_id=getattr(config, "name_or_path", ""),
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden=config.hidden_size,
        feed_forward=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )


def estimate_memory(
    shape: DecoderShape,
    prompt: int,
    tokens: int,
    audio: int,
    attention: SparseAttentionConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    prefill_chunk: int | None = 2048,
    batch: int = 1,
    device: str = "cuda",
) -> Memory:
    """Estimate the memory of a model that decodes `batch` sequences side by side.

    Args:
        prompt: positions of the longest prompt.
        tokens: positions of the longest sequence, prompt and text.
        audio: positions of the prompt that are audio, whose embeddings are kept beside it.
        prefill_chunk: positions that are read at once; None where a prompt is read as a whole.
        device: its type, "cuda" or "cpu".
    """
    attention = attention or SparseAttentionConfig()
    capacity = -(-tokens // PARTIAL_SUM) * PARTIAL_SUM
    heads = batch * shape.layers * shape.kv_heads
    statistics = 0
    if attention.budget is not None:
        buffers = SCORES[attention.score].buffers(shape.head_dim, dtype, attention.statistics_dtype)
        page = sum(width * each.itemsize for width, each in buffers)
        statistics = sum(heads * (capacity // size) * page for size in page_sizes(attention))
    positions = min(prefill_chunk or tokens, tokens)
    feed_forward = batch * positions * (3 * shape.feed_forward + 6 * shape.hidden) * dtype.itemsize
    repeated = padding = 0
    flash = device == "cuda" and dtype.itemsize == 2 and (batch == 1 or prompt > BATCHED_TOKENS)
    if prefill_chunk is not None and not flash:
        # Behind a mask, which every chunk but the first has, `sdpa` repeats keys and values for the heads of a group.
        if shape.heads != shape.kv_heads:
            repeated = 2 * batch * shape.heads * min(prompt, tokens) * shape.head_dim * dtype.itemsize
        # A byte for each position that a row may not read.
        padding = batch * positions * min(prompt, tokens) if batch > 1 else 0
    return Memory(
        weights=int(shape.parameters * 1e9 * dtype.itemsize),
        cache=2 * heads * capacity * shape.head_dim * dtype.itemsize,
        statistics=statistics,
        audio=2 * batch * audio * shape.hidden * dtype.itemsize,
        scratch=max(feed_forward, repeated) + padding,
    )


def measure_cache(cache: PagedCache) -> int:
    """Return the bytes that a cache has allocated: keys, values, and statistics of pages and super-pages."""
    layers = [layer for layer in cache.paged_layers if layer.is_initialized]
    statistics = sum(each.nbytes for layer in layers for level in layer.levels for each in level.statistics)
    return statistics + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def measure_free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if device.type == "cpu" and available else None
