"""What the rivals share: the decode step over the tokens that a method chooses.

A method says for each KV head which tokens of the context a step reads, and the step attends to nothing else. Positions
stay those of the whole sequence, as prefill stays dense for everybody. These steps are plain PyTorch, which masks what
is not read: they compare quality, and their speed is not the rivals'. They can be captured in CUDA graphs.

Rows of a batch are padded on the left. `position` [B or 1, 1, N] counts the tokens of each row from its own first one;
negative ones are padding, or slots that are not written yet, which nobody reads. `last` (int64 [1]) is the slot of the
newest token, the same in every row.

Shapes: B batch, K KV heads, G query heads of a group, T new tokens, N slots, D head dim.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.cache import PagedLayer, moved
from unique_asr.attention.dense import dense_attention
from unique_asr.attention.huggingface import NAME, key_padding, unique_attention_forward
from unique_asr.attention.reference import attend_biased, attention_weights, group_queries
from unique_asr.attention.static_step import StaticStep


class Method(ABC):
    """A way to choose tokens. Dataclass fields are its settings; other attributes are of one layer.

    What it remembers of a sequence lies in buffers over the slots of the cache, and every step writes them by its own
    slot: a captured step finds them again, and a step that runs twice (a capture's warm-up, or one that was taken back)
    writes the same again. Rows begin anew beside others, and slots move (`unique_asr.attention.cache.Companion`).
    """

    name: ClassVar[str]
    watches: ClassVar[bool] = False  # wants to know what attention the tokens got
    slots: int  # of the cache, when its buffers were made
    kept: ClassVar[tuple[str, ...]] = ()  # its buffers [B, K, slots / S, width]

    def begin(self, config: SparseAttentionConfig) -> None:
        """Take the settings. Raises ValueError if the budget is too small for the method."""
        self.config = config

    def reset(self, keys: Tensor) -> None:  # noqa: B027
        """A new sequence in the slots [B, K, N, D]; make the buffers, or keep those that fit."""

    def grow(self, keys: Tensor) -> None:  # noqa: B027
        """More slots for the sequence."""

    def prompt(self, query: Tensor, keys: Tensor, position: Tensor, scaling: float) -> None:  # noqa: B027
        """Queries [B, K, G, T, D] of the last T of keys [B, K, N, D], all of them written."""

    def observe(self, query: Tensor, keys: Tensor, position: Tensor, last: Tensor) -> None:  # noqa: B027
        """The query [B, K, G, D] of a decode step, whether it reads everything or chooses."""

    @abstractmethod
    def choose(self, query: Tensor, keys: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """bool [B or 1, K or 1, N]: the tokens that a decode step reads; padding does not matter."""

    def attended(self, weights: Tensor, read: Tensor, last: Tensor) -> None:  # noqa: B027
        """The attention [B, K, G, N] of a decode step, and what was read [B or 1, K or 1, N], if the method watches."""

    def reads(self, length: int, prompt: int | None = None) -> int:
        """Tokens that a step reads of each KV head at a context of `length` tokens, in a row without padding.

        prompt: tokens of the row's prompt; None: of the prompt that all rows had.
        """
        return self.config.budget

    def pages_read(self, length: int, prompt: int | None = None) -> int:
        """Pages that they would fill."""
        return -(-self.reads(length, prompt) // self.config.page_size)

    def fit(self, layer: PagedLayer) -> None:
        """Have room for all slots of the layer."""
        if self.slots != layer.capacity:
            self.grow(layer.keys)
            self.slots = layer.capacity

    def buffers(self) -> Iterator[tuple[Tensor, int]]:
        """What is `kept`, and S."""
        for name in self.kept:
            buffer = getattr(self, name)
            yield buffer, self.slots // buffer.shape[2]

    def move(self, by: int, layer: PagedLayer) -> None:
        self.fit(layer)
        for buffer, size in self.buffers():
            moved(buffer, by // size, (layer.length - by) // size)

    def take(self, rows: Tensor, layer: PagedLayer, other: PagedLayer) -> None:
        self.fit(layer)
        for (buffer, size), (new, _) in zip(self.buffers(), other.companion.buffers(), strict=True):
            count, first = -(-other.length // size), (layer.length - other.length) // size
            buffer[rows, :, first : first + count] = new[:, :, :count]

    def select(self, indices: Tensor) -> None:
        for name in self.kept:
            setattr(self, name, getattr(self, name)[indices])


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
    if layer is None or not isinstance(layer.config, RivalConfig) or not layer.sparse_layer:
        return unique_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    new, step = query.shape[2], layer.step
    how = {"dropout": dropout, "scaling": scaling, **kwargs}
    if step is not None:
        layer.write_token(key, value)
        method, keys, values = method_of(layer), layer.keys, layer.values
        position, last, sparse = static_positions(step), step.position, step.sparse
    else:
        method, keys, values = method_of(layer, new_sequence=layer.length == new), key, value
        position = positions(attention_mask, layer.length, key.device)
        if new > 1:
            method.prompt(query.unflatten(1, (key.shape[1], -1)), key, position, scaling)
            return dense_attention(module, query, key, value, attention_mask, **how)
        layer.count_step(layer.length)
        last, sparse = torch.full((1,), layer.length - 1, device=key.device), layer.sparse_at(layer.length)
    queries = group_queries(query, keys.shape[1])
    bias = tokens_read(method, queries, keys, position, last, scaling, sparse)
    if step is None and not sparse:
        return dense_attention(module, query, key, value, attention_mask, **how)
    return attend_biased(queries, keys, values, scaling, bias).flatten(1, 2).unsqueeze(1), None


def method_of(layer: PagedLayer, new_sequence: bool = False) -> Method:
    """The layer's own method, with room for all of its slots."""
    if not hasattr(layer, "method"):
        layer.method = copy.copy(layer.config.method)
        layer.method.begin(layer.config)
        layer.pages_read, layer.companion = layer.method.pages_read, layer.method
        new_sequence = True
    if new_sequence:
        layer.method.reset(layer.keys)
        layer.method.slots = layer.capacity
    layer.method.fit(layer)
    return layer.method


def positions(attention_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[B or 1, 1, N]; of a mask, which all layers get, only once."""
    if attention_mask is None:
        return torch.arange(length, device=device).view(1, 1, -1)
    if not hasattr(attention_mask, "positions"):
        padding = ~key_padding(attention_mask)[0]
        attention_mask.positions = torch.arange(length, device=device) - padding.sum(dim=-1).view(-1, 1, 1)
    return attention_mask.positions


def static_positions(step: StaticStep) -> Tensor:
    """[B or 1, 1, N] over all slots, computed once for all layers."""
    if not hasattr(step, "positions"):
        slot = torch.arange(step.capacity, device=step.position.device).view(1, 1, -1)
        place = slot if step.starts is None else slot - step.starts.view(-1, 1, 1)
        step.positions = place.masked_fill(slot > step.position, -1)
    return step.positions


def tokens_read(
    method: Method, queries: Tensor, keys: Tensor, position: Tensor, last: Tensor, scaling: float, sparse: bool
) -> Tensor:
    """Of one decode step, with queries [B, K, G, D]: 0 for the tokens that are read, -inf for the others, [B, K, N]."""
    method.observe(queries, keys, position, last)
    read = position >= 0
    if sparse:
        read = read & method.choose(queries, keys, position, last)
    bias = torch.zeros(read.shape, device=keys.device).masked_fill(~read, -torch.inf).expand(keys.shape[:3])
    if method.watches:
        method.attended(attention_weights(queries, keys, scaling, bias), read, last)
    return bias


class Active:
    """How many blocks of `rivals_active` are under way, in all threads."""

    blocks = 0
    lock = threading.Lock()


@contextmanager
def rivals_active() -> Iterator[None]:
    """Within the block, caches with a `RivalConfig` are read by its method; every other cache as before."""
    with Active.lock:
        Active.blocks += 1
        AttentionInterface.register(NAME, rival_attention_forward)
    try:
        yield
    finally:
        with Active.lock:
            Active.blocks -= 1
            if not Active.blocks:
                AttentionInterface.register(NAME, unique_attention_forward)
