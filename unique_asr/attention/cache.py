"""A paged KV cache for transformers: preallocated, with the statistics of every complete page beside the keys.

Page p of a row is tokens pS .. pS + S - 1: no block table and no copies. Buffers grow in big steps. All rows have the
same length; shorter ones are padded on the left. Lengths are kept on the host; `StaticStep` adds the device's view of
one decode step, so that the step can be captured in a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from unique_asr.attention import reference
from unique_asr.attention.backend import kernels, uses_triton
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.counters import SparsityCounters
from unique_asr.attention.scores import LARGEST, SCORES
from unique_asr.attention.static_step import StaticStep, page_sizes

HEADROOM = 1024  # tokens allocated beyond the first prompt
GROWTH = 1.5  # of the capacity, each time it is full
STATISTICS_BATCH = 4096  # pages whose statistics are computed at once: bounds the memory of a long prefill


@dataclass
class PageLevel:
    """The statistics [B, K, capacity / S, width] of the pages, or of the super-pages, of a layer."""

    size: int  # tokens of a page
    statistics: tuple[Tensor, ...] = ()
    done: int = 0  # pages whose statistics are up to date


class Companion(Protocol):
    """What somebody else remembers of a layer's tokens, slot by slot."""

    def move(self, by: int, layer: PagedLayer) -> None:
        """As `PagedLayer.move`, which has moved its own."""

    def take(self, rows: Tensor, layer: PagedLayer, other: PagedLayer) -> None:
        """As `PagedLayer.take`: what the companion of `other` remembers of its rows."""

    def select(self, indices: Tensor) -> None:
        """Of rows `indices` only, in that order."""


ACTIVE = threading.local()  # .cache: the one in a static step on this thread, for the operator of compiled models


class PagedLayer(CacheLayerMixin):
    """Keys and values [B, K, capacity, D] of one layer, and the statistics of its pages.

    Statistics are brought up to date by the attention function, which knows the padding: for complete pages only, as
    the page being written is read anyway.
    """

    is_croppable = True

    def __init__(self, config: SparseAttentionConfig, statistics: SparsityCounters, capacity: int = 0):
        super().__init__()
        self.config = config
        self.score = SCORES[config.score]
        self.counters = statistics
        self.closes_step = False  # the last paged layer counts the step, the others only their pages
        self.requested = capacity
        self.length = 0  # tokens written
        self.levels = [PageLevel(size) for size in page_sizes(config)]
        self.step: StaticStep | None = None
        self.sparse_layer = config.budget is not None
        self.keeps_selection = False  # set it before the first step, which may be captured
        self.selected: Tensor | None = None  # int32 [B, K, k - 1]: pages of the last sparse step, if they are kept
        self.companion: Companion | None = None
        self.index = 0  # in the cache

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """What is stored of the pages: [B, K, capacity / S, width] each, see `scores`."""
        return self.levels[0].statistics

    @property
    def pages_done(self) -> int:
        """Pages whose statistics are up to date."""
        return self.levels[0].done

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        if self.sparse_layer:
            buffers = self.score.buffers(key_states.shape[-1], self.dtype, self.config.statistics_dtype)
            for level in self.levels:
                level.statistics = tuple(
                    key_states.new_empty(*key_states.shape[:2], 0, width, dtype=dtype) for width, dtype in buffers
                )
        self.triton = key_states.shape == value_states.shape and uses_triton(self.config.backend, self.device)
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
        for level in self.levels:
            pages = capacity // level.size
            level.statistics = tuple(grown(statistic, level.done, pages) for statistic in level.statistics)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns views of all keys and values. The keys carry this layer as `paged_layer`.

        In a static step the attention function writes, and what is returned is the new token alone.
        """
        if self.step is not None:
            key_states.paged_layer = self
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        self.length = end
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        keys.paged_layer = self
        return keys, values

    def write_token(self, key: Tensor, value: Tensor) -> None:
        """Write the token [B, K, 1, D] of a static step, and bring the page that holds it up to date.

        Until the page is complete its statistics cover slots that are still empty; they are not used before.
        """
        if self.triton:
            lengths = self.step.lengths(len(key))
            more = {"super_statistics": self.levels[1].statistics} if len(self.levels) > 1 else {}
            kernels().append(
                key, value, self.keys, self.values, self.statistics, lengths, self.score.name, self.step.starts, **more
            )
            return
        self.keys.index_copy_(2, self.step.position, key)
        self.values.index_copy_(2, self.step.position, value)
        if self.step.sparse and self.sparse_layer:
            self.update_touched_pages()

    def update_statistics(self, valid: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Bring the statistics of every complete page up to date; `valid` [B, N] is False for padding.

        `starts` [B] says the same of padding that is all on the left, which is the only one that the kernels know.
        """
        for level in self.levels:
            complete = self.length // level.size
            if level.done < complete and self.triton and (valid is None or starts is not None):
                span = level.done, complete
                kernels().write_page_statistics(self.keys, level.statistics, *span, self.score.name, starts)
                level.done = complete
            while level.done < complete:
                last = min(complete, level.done + STATISTICS_BATCH)
                tokens = slice(level.done * level.size, last * level.size)
                mask = None if valid is None else valid[:, tokens]
                new = reference.page_statistics(self.keys[:, :, tokens], level.size, self.score, mask)
                for statistic, values in zip(level.statistics, self.score.stored(new, self.config.statistics_dtype)):
                    statistic[:, :, level.done : last] = values
                level.done = last

    @property
    def behind(self) -> bool:
        """Whether a complete page waits for its statistics."""
        return any(level.done < self.length // level.size for level in self.levels)

    def update_touched_pages(self) -> None:
        """Recompute the pages that hold the token of a static step, complete or not."""
        for level, (page, slots) in zip(self.levels, self.step.touched):
            new = reference.page_statistics(self.keys.index_select(2, slots), level.size, self.score)
            for statistic, values in zip(level.statistics, self.score.stored(new, self.config.statistics_dtype)):
                raw(statistic).index_copy_(2, page, raw(values))

    def keep_selection(self, pages: Tensor) -> None:
        """Copy the complete pages [B, K, k - 1] that a step reads to an address that stays, if they are kept."""
        if self.keeps_selection:
            if self.selected is None:
                self.selected = torch.empty_like(pages, dtype=torch.int32)
            self.selected.copy_(pages)

    def count_step(self, length: int) -> None:
        """Count one decode step of all rows at a context of `length` tokens, the new one included."""
        self.counters.add(self.counted(length), times=self.keys.shape[0])
        if self.closes_step:
            self.counters.steps += 1
            self.counters.sparse_steps += self.sparse_at(length)

    def counted(self, length: int, prompt: int | None = None) -> SparsityCounters:
        """Pages and bytes that such a step reads of one row, which had a prompt of `prompt` tokens."""
        heads, size = self.keys.shape[1], self.config.page_size
        token_bytes = (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        pages = -(-length // size)
        dense_bytes = length * token_bytes
        if self.sparse_at(length):
            tokens = self.config.budget - (pages * size - length)
            page_bytes = sum(statistic.shape[-1] * statistic.element_size() for statistic in self.statistics)
            scored = pages - 1
            if len(self.levels) > 1:
                supers = (length - 1) // self.config.super_page_size
                scored = supers + min(scored, (self.config.super_count + 1) * self.config.fan)
            read = self.pages_read(length, prompt), tokens * token_bytes + scored * page_bytes
        else:
            read = pages, dense_bytes
        return SparsityCounters(
            pages_read=heads * read[0],
            pages_total=heads * pages,
            bytes_read=heads * read[1],
            bytes_dense=heads * dense_bytes,
        )

    def pages_read(self, length: int, prompt: int | None = None) -> int:
        """Pages that a step which selects reads of each KV head, at a context of `length` tokens."""
        return self.config.pages

    def sparse_at(self, length: int) -> bool:
        """Whether a decode step at this context length selects pages."""
        return self.sparse_layer and not self.config.reads_all(length)

    def get_seq_length(self) -> int:
        """0 in a static step, whose mask is made here, so that a compiled model does not depend on the length."""
        return self.length if self.step is None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget the tokens and keep the buffers."""
        self.length = 0
        for level in self.levels:
            level.done = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer")
        self.length = max(0, self.length + tokens_to_remove)
        for level in self.levels:
            level.done = min(level.done, self.length // level.size)

    def _buffers(self) -> Iterator[tuple[Tensor, int]]:
        """[B, K, capacity / S, width] each, and S, the slots that an entry is of."""
        yield self.keys, 1
        yield self.values, 1
        for level in self.levels:
            for statistic in level.statistics:
                yield raw(statistic), level.size

    def move(self, by: int) -> None:
        """Move all tokens `by` slots to the right, or to the left: what would be left of slot 0 is forgotten.

        `by` is a multiple of every size of pages. Slots that become free on the left are padding of every row.
        """
        former = self.length
        self.reserve(former + by)
        self.length += by
        for buffer, size in self._buffers():
            moved(buffer, by // size, former // size)
        for level in self.levels:
            level.done = max(0, level.done + by // level.size)
        if self.companion is not None:
            self.companion.move(by, self)

    def take(self, rows: Tensor, other: PagedLayer) -> None:
        """Put all rows of another layer into `rows` of this one, so that they end together.

        The lengths differ by a multiple of every size of pages, and the statistics of `other` are up to date.
        """
        offset = self.length - other.length
        for (buffer, size), (new, _) in zip(self._buffers(), other._buffers(), strict=True):
            count, first = other.length // size, offset // size
            buffer[rows, :, first : first + count] = new[:, :, :count]
        if self.companion is not None:
            self.companion.take(rows, self, other)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows that are in use of every buffer."""
        if not self.is_initialized:
            return
        self.keys = grown(function(self.keys[:, :, : self.length]), self.length, self.capacity)
        self.values = grown(function(self.values[:, :, : self.length]), self.length, self.keys.shape[2])
        for level in self.levels:
            used = [(function(raw(each)[:, :, : level.done]).view(each.dtype), each) for each in level.statistics]
            level.statistics = tuple(grown(rows, level.done, each.shape[2]) for rows, each in used)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda buffer: buffer[indices])
        if self.companion is not None:
            self.companion.select(indices)

    def offload(self):
        raise NotImplementedError("PagedCache keeps its layers on their device: offloading is not supported")


def raw(statistic: Tensor) -> Tensor:
    """Statistics of 8 bits as bytes, for operations that PyTorch has for few dtypes."""
    return statistic.view(torch.uint8) if statistic.dtype in LARGEST else statistic


def grown(buffer: Tensor, used: int, size: int) -> Tensor:
    """A zeroed buffer of `size` entries in dimension 2 with the first `used` of `buffer` copied into it."""
    new = buffer.new_zeros(*buffer.shape[:2], size, buffer.shape[-1])
    new[:, :, :used] = buffer[:, :, :used]
    return new


def moved(buffer: Tensor, by: int, used: int) -> None:
    """Move the first `used` entries of dimension 2 by `by` places, in place."""
    kept = slice(max(0, -by), used)
    if kept.start < used:
        buffer[:, :, kept.start + by : used + by] = buffer[:, :, kept].clone()


def pages_every_layer(config: PreTrainedConfig) -> bool:
    """Whether all layers of a model have full attention, which a static step needs; sliding ones are not paged."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class PagedCache(Cache):
    """A transformers cache whose full-attention layers are paged; sliding and other layers stay what they were.

    `capacity` is the number of tokens allocated at the first write, a little more than the prompt by default. What
    `attention` leaves open (`combine`) is as in the paper: only `sparse_attention` and the decoders ask the model.

        cache = PagedCache(model.config, SparseAttentionConfig(budget=512))
        model.generate(**inputs, past_key_values=cache)     # the model switched with `sparse_attention`
        print(cache.counters)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attention: SparseAttentionConfig | None = None,
        capacity: int = 0,
        counters: SparsityCounters | None = None,
    ):
        self.attention = attention or SparseAttentionConfig()
        if self.attention.combine is None:
            self.attention = replace(self.attention, combine="max")
        self.counters = SparsityCounters() if counters is None else counters
        self._config = config
        layers = DynamicCache(config=config).layers
        self.paged_layers: list[PagedLayer] = []
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[index] = PagedLayer(self.attention, self.counters, capacity)
                layers[index].sparse_layer &= index >= self.attention.dense_layers
                layers[index].index = index
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
        if tokens <= self.capacity:
            return
        for layer in self.paged_layers:
            if layer.is_initialized:
                layer.reserve(tokens)
            else:
                layer.requested = max(layer.requested, tokens)

    def reset(self) -> None:
        """Forget the tokens; pages keep their buffers."""
        # Sliding layers are made anew: transformers 5.17's reset leaves zeros in them.
        for index, fresh in enumerate(DynamicCache(config=self._config).layers):
            if isinstance(self.layers[index], PagedLayer):
                self.layers[index].reset()
            else:
                self.layers[index] = fresh

    def move(self, by: int) -> None:
        """See `PagedLayer.move`; for models with full attention in every layer."""
        if by:
            for layer in self.paged_layers:
                layer.move(by)

    def take(self, rows: Tensor, other: PagedCache, starts: Tensor) -> None:
        """See `PagedLayer.take`: int64 `rows` [R]; `starts` [R] is the padding on the left of the rows of `other`."""
        other.update_statistics(starts)
        for layer, its in zip(self.paged_layers, other.paged_layers, strict=True):
            layer.take(rows, its)

    @contextmanager
    def static_step(self, position: Tensor, sparse: bool, starts: Tensor | None = None) -> Iterator[None]:
        """Within the block `update` and the attention function run one static step, at `position` (int64 [1]).

        `starts` (int64 [B]) is the padding on the left of every row. Lengths on the host stay: call `advance` after
        every run, or replay, of the step.
        """
        if len(self.paged_layers) != len(self.layers):
            raise ValueError("a static decode step needs full attention in every layer")
        step = StaticStep(position, sparse, self.attention, self.capacity, starts)
        former = getattr(ACTIVE, "cache", None)
        ACTIVE.cache = self
        for layer in self.paged_layers:
            layer.step = step
        try:
            yield
        finally:
            ACTIVE.cache = former
            for layer in self.paged_layers:
                layer.step = None

    def sparse_at(self, length: int) -> bool:
        """Whether a decode step at this context length selects pages in any layer."""
        return any(layer.sparse_at(length) for layer in self.paged_layers)

    def counted(self, length: int, prompt: int | None = None, rows: int = 1) -> SparsityCounters:
        """One decode step at a context of `length` tokens, the new one included, after a prompt of `prompt`."""
        step = SparsityCounters(steps=1, sparse_steps=int(self.sparse_at(length)))
        for layer, layers in self._kinds.values():
            step.add(layer.counted(length, prompt), times=rows * layers)
        return step

    @cached_property
    def _kinds(self) -> dict[tuple, tuple[PagedLayer, int]]:
        """A layer of each kind, and how many of it there are."""
        kinds: dict[tuple, tuple[PagedLayer, int]] = {}
        for layer in self.paged_layers:
            kind = layer.sparse_layer, layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
            kinds[kind] = layer, kinds.get(kind, (layer, 0))[1] + 1
        return kinds

    def update_statistics(self, starts: Tensor | None = None) -> None:
        """Bring the page statistics of every layer up to date; `starts` [B] is the padding on the left of every row."""
        layers = [layer for layer in self.paged_layers if layer.sparse_layer]
        valid = None
        if starts is not None and any(layer.behind for layer in layers):
            valid = torch.arange(self.length, device=starts.device) >= starts.unsqueeze(1)
        for layer in layers:
            layer.update_statistics(valid, starts)

    def advance(self) -> None:
        """Account for one static step on the host: its token, its pages and the counters."""
        for layer in self.paged_layers:
            layer.length += 1
            if layer.sparse_at(layer.length):
                for level in layer.levels:
                    level.done = layer.length // level.size
        self.counters.add(self.counted(self.length, rows=self.paged_layers[0].keys.shape[0]))
