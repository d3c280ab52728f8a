"""A paged KV cache for transformers: preallocated, with the statistics of every complete page beside the keys.

Page p of a row is tokens pS .. pS + S - 1: no block table and no copies. Buffers grow in big steps. Lengths are kept on
the host; `StaticStep` adds the device's view of one decode step, so that the step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from unique_asr.attention import reference
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.scores import SCORES
from unique_asr.attention.stats import SparsityStatistics

HEADROOM = 1024  # tokens allocated beyond the first prompt
GROWTH = 1.5  # of the capacity, each time it is full
STATISTICS_BATCH = 4096  # pages whose statistics are computed at once: bounds the memory of a long prefill


@dataclass
class StaticStep:
    """One decode step whose shapes and addresses never change: what all layers share, computed from the position."""

    position: Tensor  # int64 [1]: where the step writes its token
    sparse: bool  # selected pages, or everything up to `position`
    newest: Tensor  # int64 [1]: the page of `position`
    slots: Tensor  # int64 [S]: the positions of that page
    page_bias: Tensor  # float32 [1, P]: see `reference.page_bias`
    selected_bias: Tensor  # float32 [budget]: -inf past `position` in the selected pages, the newest last
    dense_bias: Tensor  # float32 [capacity]: -inf past `position`

    @classmethod
    def at(cls, position: Tensor, sparse: bool, config: SparseAttentionConfig, capacity: int) -> StaticStep:
        def bias(keep: Tensor) -> Tensor:
            return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -torch.inf)

        size, budget = config.page_size, config.budget or 0
        newest = position // size
        candidates = torch.arange(capacity // size, device=position.device) < newest
        slot = torch.arange(budget, device=position.device) - (budget - size)  # of the newest page, if not negative
        return cls(
            position=position,
            sparse=sparse,
            newest=newest,
            slots=newest * size + torch.arange(size, device=position.device),
            page_bias=reference.page_bias(candidates.unsqueeze(0), config, newest),
            selected_bias=bias(slot <= position % size),
            dense_bias=bias(torch.arange(capacity, device=position.device) <= position),
        )


class PagedLayer(CacheLayerMixin):
    """Keys and values [B, K, capacity, D] of one layer, and the statistics [B, K, capacity / S, width] of its pages.

    Statistics are brought up to date by the attention function, which knows the padding: for complete pages only, as
    the page being written is read anyway.
    """

    is_croppable = True

    def __init__(self, config: SparseAttentionConfig, statistics: SparsityStatistics, capacity: int = 0):
        super().__init__()
        self.config = config
        self.score = SCORES[config.score]
        self.counters = statistics
        self.closes_step = False  # the last paged layer counts the step, the others only their pages
        self.requested = capacity
        self.length = 0  # tokens written
        self.pages_done = 0  # pages whose statistics are up to date
        self.statistics: tuple[Tensor, ...] = ()
        self.step: StaticStep | None = None
        self.sparse_layer = config.budget is not None

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self.keys.shape[2] if self.is_initialized else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        if self.sparse_layer:
            widths = self.score.widths(key_states.shape[-1])
            self.statistics = tuple(key_states.new_empty(*key_states.shape[:2], 0, width) for width in widths)
        self.is_initialized = True

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; what is written stays."""
        if tokens <= self.capacity:
            return
        if self.capacity == 0:
            tokens = max(tokens, self.requested or tokens + HEADROOM)
        else:
            tokens = max(tokens, int(self.capacity * GROWTH))
        unit = reference.PARTIAL_SUM
        capacity = -(-tokens // unit) * unit
        self.keys = grown(self.keys, self.length, capacity)
        self.values = grown(self.values, self.length, capacity)
        pages = capacity // self.config.page_size
        self.statistics = tuple(grown(statistic, self.pages_done, pages) for statistic in self.statistics)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns views of all keys and values. The keys carry this layer as `paged_layer`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.step is None:
            start, end = self.length, self.length + key_states.shape[2]
            self.reserve(end)
            self.length = end
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        else:
            self.keys.index_copy_(2, self.step.position, key_states)
            self.values.index_copy_(2, self.step.position, value_states)
            keys, values = self.keys[:], self.values[:]
        keys.paged_layer = self
        return keys, values

    def update_statistics(self, valid: Tensor | None = None) -> None:
        """Bring the statistics of every complete page up to date; `valid` [B, N] is False for padding."""
        size = self.config.page_size
        complete = self.length // size
        while self.pages_done < complete:
            last = min(complete, self.pages_done + STATISTICS_BATCH)
            tokens = slice(self.pages_done * size, last * size)
            mask = None if valid is None else valid[:, tokens]
            new = reference.page_statistics(self.keys[:, :, tokens], size, self.score, mask)
            for statistic, values in zip(self.statistics, new):
                statistic[:, :, self.pages_done : last] = values
            self.pages_done = last

    def update_touched_page(self) -> None:
        """The same inside a static step: recompute the page that holds the step's token, complete or not.

        Until the page is complete its statistics cover slots that are still empty; they are not used before.
        """
        new = reference.page_statistics(self.keys.index_select(2, self.step.slots), self.config.page_size, self.score)
        for statistic, values in zip(self.statistics, new):
            statistic.index_copy_(2, self.step.newest, values)

    def count_step(self, length: int) -> None:
        """Count one decode step at a context of `length` tokens, the new one included."""
        rows = self.keys.shape[0] * self.keys.shape[1]
        size = self.config.page_size
        token_bytes = (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        pages = -(-length // size)
        dense_bytes = length * token_bytes
        if self.sparse_at(length):
            tokens = self.config.budget - (pages * size - length)
            page_bytes = sum(statistic.shape[-1] * statistic.element_size() for statistic in self.statistics)
            read = self.config.pages, tokens * token_bytes + (pages - 1) * page_bytes
        else:
            read = pages, dense_bytes
        counters = self.counters
        counters.pages_read += rows * read[0]
        counters.pages_total += rows * pages
        counters.bytes_read += rows * read[1]
        counters.bytes_dense += rows * dense_bytes
        if self.closes_step:
            counters.steps += 1
            counters.sparse_steps += self.sparse_at(length)

    def sparse_at(self, length: int) -> bool:
        """Whether a decode step at this context length selects pages."""
        return self.sparse_layer and not self.config.reads_all(length)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget the tokens and keep the buffers."""
        self.length = self.pages_done = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer")
        self.length = max(0, self.length + tokens_to_remove)
        self.pages_done = min(self.pages_done, self.length // self.config.page_size)

    def _map_rows(self, function) -> None:
        """Apply `function` to the rows that are in use of every buffer."""
        if not self.is_initialized:
            return
        self.keys = grown(function(self.keys[:, :, : self.length]), self.length, self.capacity)
        self.values = grown(function(self.values[:, :, : self.length]), self.length, self.keys.shape[2])
        self.statistics = tuple(
            grown(function(statistic[:, :, : self.pages_done]), self.pages_done, statistic.shape[2])
            for statistic in self.statistics
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda buffer: buffer[indices])

    def offload(self):
        raise NotImplementedError("PagedCache keeps its layers on their device: offloading is not supported")


def grown(buffer: Tensor, used: int, size: int) -> Tensor:
    """A zeroed buffer of `size` entries in dimension 2 with the first `used` of `buffer` copied into it."""
    new = buffer.new_zeros(*buffer.shape[:2], size, buffer.shape[-1])
    new[:, :, :used] = buffer[:, :, :used]
    return new


class PagedCache(Cache):
    """A transformers cache whose full-attention layers are paged; sliding and other layers stay what they were.

    `capacity` is the number of tokens allocated at the first write, a little more than the prompt by default.

        cache = PagedCache(model.config, SparseAttentionConfig(budget=512))
        model.generate(**inputs, past_key_values=cache)     # the model switched with `sparse_attention`
        print(cache.statistics)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attention: SparseAttentionConfig | None = None,
        capacity: int = 0,
        statistics: SparsityStatistics | None = None,
    ):
        self.attention = attention or SparseAttentionConfig()
        self.statistics = SparsityStatistics() if statistics is None else statistics
        layers = DynamicCache(config=config).layers
        self.paged_layers: list[PagedLayer] = []
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[index] = PagedLayer(self.attention, self.statistics, capacity)
                layers[index].sparse_layer &= index >= self.attention.dense_layers
                self.paged_layers.append(layers[index])
        if not self.paged_layers:
            raise ValueError(f"{type(config).__name__} has no full-attention layer: there is nothing to read by pages")
        self.paged_layers[-1].closes_step = True
        super().__init__(layers=layers)

    @property
    def length(self) -> int:
        """Tokens written."""
        return self.paged_layers[0].length

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self.paged_layers[0].capacity

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        for layer in self.paged_layers:
            if layer.is_initialized:
                layer.reserve(tokens)
            else:
                layer.requested = max(layer.requested, tokens)

    @contextmanager
    def static_step(self, position: Tensor, sparse: bool) -> Iterator[None]:
        """Within the block `update` and the attention function run one static step, at `position` (int64 [1]).

        Lengths on the host stay: call `advance` after every run, or replay, of the step.
        """
        if len(self.paged_layers) != len(self.layers):
            raise ValueError("a static decode step needs full attention in every layer")
        step = StaticStep.at(position, sparse, self.attention, self.capacity)
        for layer in self.paged_layers:
            layer.step = step
        try:
            yield
        finally:
            for layer in self.paged_layers:
                layer.step = None

    def update_statistics(self) -> None:
        """Bring the page statistics of every layer up to date."""
        for layer in self.paged_layers:
            if layer.sparse_layer:
                layer.update_statistics()

    def advance(self) -> None:
        """Account for one static step on the host: its token, its pages and the counters."""
        for layer in self.paged_layers:
            layer.length += 1
            layer.count_step(layer.length)
            if layer.sparse_at(layer.length):
                layer.pages_done = layer.length // layer.config.page_size
