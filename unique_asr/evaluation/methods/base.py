"""What the rivals share: the decode step over the tokens that a method chooses.

A method ranks the tokens of the context for each KV head; the step gathers the best of them, as many as the method
reads, and attends to nothing else. Positions stay those of the whole sequence, as prefill stays dense for everybody.
These steps are plain PyTorch: they compare quality, and their speed is not the rivals'.

Rows of a batch are padded on the left. `position` [B or 1, 1, N] counts the tokens of each row from its own first one;
negative ones are padding, which nobody reads.

Shapes: B batch, K KV heads, G query heads of a group, T new tokens, N tokens, D head dim.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...attention import SparseAttentionConfig
from ...attention.cache import PagedLayer
from ...attention.huggingface import NAME, dense_attention, key_padding, unique_attention_forward
from ...attention.reference import attend, group_queries


class Method(ABC):
    """A way to choose tokens. Dataclass fields are its settings; other attributes are of one layer and one sequence."""

    name: ClassVar[str]
    watches: ClassVar[bool] = False  # wants to know what attention the tokens got that were read

    def begin(self, config: SparseAttentionConfig) -> None:
        """A new sequence. Raises ValueError if the budget is too small for the method."""
        self.config = config
        self.prompt = 0  # tokens written before the first decode step, padding included

    def observe(self, query: Tensor, keys: Tensor, position: Tensor, scaling: float, sparse: bool) -> None:  # noqa: B027
        """Queries [B, K, G, T, D] of the last T of keys [B, K, N, D]; `sparse`: this step chooses tokens."""

    @abstractmethod
    def rank(self, query: Tensor, keys: Tensor, position: Tensor) -> tuple[Tensor, int]:
        """Ranks [B or 1, K or 1, N] of the tokens, -inf for what must not be read, and how many to read at most."""

    def attended(self, tokens: Tensor, weights: Tensor) -> None:  # noqa: B027
        """What the step read: tokens [B, K, n], and the attention [B, K, G, n] that they got, if the method watches."""


@dataclass(frozen=True)
class RivalConfig(SparseAttentionConfig):
    """The settings of a cache whose decode steps read what `method` chooses, `budget` tokens of each KV head."""

    method: Method = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        copy.copy(self.method).begin(self)  # refuses a budget that it cannot work with


def rival_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As `unique_attention_forward`, which it is for every cache that no rival reads."""
    layer: PagedLayer | None = getattr(key, "paged_layer", None)
    if layer is None or not isinstance(layer.config, RivalConfig):
        return unique_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if layer.step is not None:
        raise ValueError(f"attention={layer.config.method.name} has no captured step: decode with static=False")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    new = query.shape[2]
    if layer.length == new:  # the first tokens of a sequence
        layer.method = copy.copy(layer.config.method)
        layer.method.begin(layer.config)
    method: Method = layer.method
    sparse = new == 1 and layer.sparse_at(layer.length)
    if new > 1:
        method.prompt = layer.length
    position = positions(attention_mask, layer.length, key.device)
    if layer.sparse_layer:
        method.observe(query.unflatten(1, (key.shape[1], -1)), key, position, scaling, sparse)
    if not sparse:
        if new == 1:
            layer.count_step(layer.length)
        return dense_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return rival_step(layer, method, query, key, value, position, scaling).flatten(1, 2).unsqueeze(1), None


def positions(attention_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[B or 1, 1, N]; of a mask, which all layers get, only once."""
    if attention_mask is None:
        return torch.arange(length, device=device).view(1, 1, -1)
    if not hasattr(attention_mask, "positions"):
        padding = ~key_padding(attention_mask)[0]
        attention_mask.positions = torch.arange(length, device=device) - padding.sum(dim=-1).view(-1, 1, 1)
    return attention_mask.positions


def rival_step(
    layer: PagedLayer, method: Method, query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float
) -> Tensor:
    """One decode step over the tokens chosen: [B, H, 1, D] -> [B, K, G, D]."""
    queries = group_queries(query, keys.shape[1])
    ranks, count = method.rank(queries, keys, position)
    count = min(count, keys.shape[2])
    best = ranks.masked_fill(position < 0, -torch.inf).expand(*keys.shape[:3]).topk(count, dim=-1)
    tokens, reads = best.indices, best.values.unsqueeze(2) > -torch.inf  # [B, K, n], [B, K, 1, n]: fewer in short rows
    index = tokens.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    read = keys.gather(2, index)
    if method.watches:
        logits = torch.matmul(queries.float(), read.float().transpose(-1, -2)) * scaling
        method.attended(tokens, logits.masked_fill(~reads, -torch.inf).softmax(dim=-1))
    count_tokens(layer, count)
    return attend(queries, read, values.gather(2, index), scaling, reads)


def count_tokens(layer: PagedLayer, tokens: int) -> None:
    """Count a sparse step that read so many tokens of each KV head, in pages that they would fill."""
    layer.count_step(layer.length)
    rows, size = layer.keys.shape[0] * layer.keys.shape[1], layer.config.page_size
    layer.counters.pages_read += rows * (-(-tokens // size) - layer.config.pages)


@contextmanager
def rivals_active() -> Iterator[None]:
    """Within the block, caches with a `RivalConfig` are read by its method; every other cache as before."""
    AttentionInterface.register(NAME, rival_attention_forward)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, unique_attention_forward)
