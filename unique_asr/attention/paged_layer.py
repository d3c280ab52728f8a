"""One layer of a paged cache: keys and values in one block each, page statistics beside them, and the layer's selector.

Page p of a row is tokens pS .. pS + S - 1: no block table and no copies. Buffers grow in big steps.

Shapes: B batch, K KV heads, N tokens, S page size, k pages of the budget, D head dim; a slot is the place of a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from unique_asr.attention import reference
from unique_asr.attention.backend import load_kernels, uses_triton
from unique_asr.attention.buffers import grow_buffer, make_buffer, shift_entries, view_as_bytes, writable_in_any_mode
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.counters import SparsityCounters, StepCounting
from unique_asr.attention.page_selector import PageSelector
from unique_asr.attention.selector import Selector
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.statistics import make_levels

HEADROOM = 1024  # tokens allocated beyond the first prompt
GROWTH = 1.5  # of the capacity, each time it is full
LONGEST_DRAFT = 64  # tokens that speculative decoding verifies at once
NOT_SWITCHED = (
    "a decode step over a PagedCache reads all of it where the model has no UNIQUE attention, or has it no more: "
    "use the cache within the block of sparse_attention"
)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PagedLayer(CacheLayerMixin):
    """Keys and values [B, K, capacity, D] of one layer, the statistics of its pages, and its selector.

    Statistics are brought up to date by the steps, which know the padding: for complete pages only, as the page being
    written is read anyway.

    Args:
        config: of the cache.
        counters: to which its steps are added.
        capacity: tokens allocated at the first write; 0: `HEADROOM` more than are written.
    """

    is_croppable = True

    def __init__(self, config: SparseAttentionConfig, counters: SparsityCounters, capacity: int = 0):
        super().__init__()
        self.config = config
        self.counting = StepCounting(counters)  # that of the cache, for all its layers
        self.initial_capacity = capacity
        self.length = 0  # tokens written
        self.forgotten = 0  # slots from `length` up to here may hold tokens of an earlier sequence
        self._written = 0  # tokens of the last forward pass, until its step is counted
        self.levels = make_levels(config)
        self.selector: Selector = (
            PageSelector(config)
            if config.selector is None
            else config.selector.for_layer(config.budget, config.page_size, config.sink_pages)
        )
        self.step: StaticStep | None = None  # the static step under way
        self.is_sparse = config.budget is not None  # False for the first `dense_layers`, whose steps read everything
        self.keeps_selection = False  # set it before the first step, which may be captured
        self.selected: Tensor | None = None  # int32 [B, K, k - 1]: pages of the last sparse step, if they are kept
        self.index = 0  # in the cache

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """Statistics of the pages, [B, K, capacity / S, width] each; `scores.py` says what they are."""
        return self.levels[0].statistics

    @property
    def pages_ready(self) -> int:
        """Complete pages whose statistics are up to date."""
        return self.levels[0].ready

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = make_buffer(key_states, *key_states.shape[:2], 0, key_states.shape[-1])
        self.values = make_buffer(value_states, *value_states.shape[:2], 0, value_states.shape[-1])
        if self.is_sparse:
            for level in self.levels:
                level.allocate(key_states)
        known = key_states.shape == value_states.shape and key_states.dtype in KERNEL_DTYPES
        self.triton = known and uses_triton(self.config.backend, self.device)
        self.is_initialized = True

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; what is written stays."""
        if tokens <= self.capacity:
            return
        if self.capacity == 0:
            tokens = max(tokens, self.initial_capacity or tokens + HEADROOM)
        else:
            tokens = max(tokens, int(self.capacity * GROWTH))
        unit = reference.PARTIAL_SUM
        capacity = -(-tokens // unit) * unit
        self.keys = grow_buffer(self.keys, self.length, capacity)
        self.values = grow_buffer(self.values, self.length, capacity)
        for level in self.levels:
            level.grow(capacity)
        self.forgotten = 0  # it was not copied

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write new tokens.

        In a static step nothing is written here: the step itself does that. Warns where the decode step before did not
        attend by UNIQUE.

        Args:
            key_states: [B, K, T, D], post-RoPE; value_states: [B, K, T, D].

        Returns:
            Views of all keys and values, [B, K, N, D]; in a static step the arguments. Both carry this layer as
            their attribute `paged_layer`, by which the attention function finds it.
        """
        if self.step is not None:
            key_states.paged_layer = value_states.paged_layer = self
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._written == 1 and self.is_sparse:
            warnings.warn(NOT_SWITCHED, stacklevel=3)
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        self.length, self._written = end, key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        keys.paged_layer = values.paged_layer = self
        return keys, values

    def write_token(self, key: Tensor, value: Tensor) -> None:
        """Write the key and the value [B, K, 1, D] of a static step, and bring the page that holds them up to date.

        Until the page is complete its statistics cover slots that are still empty; they are not used before.
        """
        self.step.has_written = True
        if self.triton:
            lengths = self.step.make_lengths(len(key))
            more = {"super_statistics": self.levels[1].statistics} if len(self.levels) > 1 else {}
            score = self.config.score
            load_kernels().append(
                key, value, self.keys, self.values, self.statistics, lengths, score, self.step.starts, **more
            )
            return
        self.keys.index_copy_(2, self.step.position, key)
        self.values.index_copy_(2, self.step.position, value)
        if self.step.sparse and self.is_sparse:
            for level, (page, slots) in zip(self.levels, self.step.current_pages):
                level.rewrite(self.keys, page, slots)

    def update_statistics(self, valid: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Bring the statistics of every complete page up to date.

        Args:
            valid: bool [B, N], False for padding; None: no padding.
            starts: int64 [B], the padding on the left of each row, if all padding is there: the only kind that the
                kernels know.
        """
        for level in self.levels:
            level.update(self.keys, self.length, valid, starts, self.triton)

    @property
    def has_stale_pages(self) -> bool:
        """Whether a complete page waits for its statistics."""
        return any(level.ready < self.length // level.size for level in self.levels)

    def keep_selection(self, pages: Tensor) -> None:
        """Copy the complete pages [B, K, k - 1] that a step reads to `selected`, if `keeps_selection`."""
        if self.keeps_selection:
            if self.selected is None:
                self.selected = make_buffer(pages, *pages.shape, dtype=torch.int32)
            self.selected.copy_(pages)

    def count_step(self) -> None:
        """Count a decode step of one token a row, which is written; a model may attend twice with what it wrote."""
        reads, sparse = self.count_reads(self.length), self.sparse_at(self.length)
        self._count(reads, sparse)

    def _count(self, reads: SparsityCounters, sparse: bool) -> None:
        rows = SparsityCounters()
        rows.add(reads, times=self.keys.shape[0])
        if self._written:
            self.counting.count(self.index, rows, sparse)
        else:
            self.counting.counters.add(rows)
        self._written = 0

    def _count_draft(self, rejected: int) -> None:
        """Count the forward pass before as a dense step, if it verified a draft of which tokens are `rejected` now."""
        start = self.length - self._written
        if start > 0 and rejected < self._written and 1 < self._written <= LONGEST_DRAFT:
            self._count(self.count_reads(self.length, sparse=False), False)

    def count_reads(self, length: int, prompt: int | None = None, sparse: bool | None = None) -> SparsityCounters:
        """Count the pages and bytes that one decode step reads of one row; `steps` stay 0.

        Args:
            length: tokens of the row, the new one included.
            prompt: tokens of its prompt; None: those of the prompt that all rows had.
            sparse: whether the step selects pages; None: as a step of one token at this length does.
        """
        heads, size = self.keys.shape[1], self.config.page_size
        token_bytes = (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        pages = -(-length // size)
        dense_bytes = length * token_bytes
        if self.sparse_at(length) if sparse is None else sparse:
            tokens = self.config.budget - (pages * size - length)
            page_bytes = sum(statistic.shape[-1] * statistic.element_size() for statistic in self.statistics)
            scored = pages - 1
            if len(self.levels) > 1:
                supers = (length - 1) // self.config.super_page_size
                scored = supers + min(scored, (self.config.super_count + 1) * self.config.pages_per_super)
            read = self.selector.count_pages(length, prompt), tokens * token_bytes + scored * page_bytes
        else:
            read = pages, dense_bytes
        return SparsityCounters(
            pages_read=heads * read[0],
            pages_total=heads * pages,
            bytes_read=heads * read[1],
            bytes_dense=heads * dense_bytes,
        )

    def advance(self) -> None:
        """Account for a static step on the host: its token and its pages."""
        self.length, self._written = self.length + 1, 0
        if self.sparse_at(self.length):
            for level in self.levels:
                level.ready = self.length // level.size

    def sparse_at(self, length: int) -> bool:
        """Whether a decode step at this context length selects pages."""
        return self.is_sparse and not self.config.reads_all(length)

    def get_seq_length(self) -> int:
        """0 in a static step, whose mask is made here, so that a compiled model does not depend on the length."""
        return self.length if self.step is None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Drop all tokens and keep the buffers."""
        self._forget(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Raises ValueError for a positive number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer")
        self._count_draft(-tokens_to_remove)
        self._forget(max(0, self.length + tokens_to_remove))

    def _forget(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.forgotten = max(self.forgotten, self.length)
        self.length, self._written = length, 0
        for level in self.levels:
            level.ready = min(level.ready, length // level.size)

    def clear_forgotten(self) -> None:
        """Zero what is left of forgotten tokens, as static steps multiply it by zero: 0 x NaN is NaN.

        Steps between two calls that forget find nothing to do.
        """
        if self.forgotten > self.length:
            for buffer, size in self._buffers():
                buffer[:, :, self.length // size : -(-self.forgotten // size)] = 0
        self.forgotten = 0

    def _buffers(self) -> Iterator[tuple[Tensor, int]]:
        """Yield each buffer [B, K, capacity / S, width], and S, the slots that one of its entries covers."""
        yield self.keys, 1
        yield self.values, 1
        for level in self.levels:
            for statistic in level.statistics:
                yield view_as_bytes(statistic), level.size

    def shift(self, by: int) -> None:
        """Move all tokens `by` slots to the right, or to the left if negative; tokens left of slot 0 are dropped.

        `by` is a multiple of every page size. Slots that become free on the left are padding of every row, and zero.
        """
        former = self.length
        self.reserve(former + by)
        self.forgotten = max(self.forgotten, former)
        self.length, self._written = former + by, 0
        for buffer, size in self._buffers():
            shift_entries(buffer, by // size, former // size)
            buffer[:, :, : max(0, by) // size] = 0
        for level in self.levels:
            level.ready = max(0, level.ready + by // level.size)
        if self.selector.slots:
            self.selector.shift(by, self.length, self.keys)

    def copy_rows(self, rows: Tensor, other: PagedLayer) -> None:
        """Copy all rows of another layer into `rows` (int64 [R]) of this one, so that both end at the same slot.

        The lengths differ by a multiple of every page size, and the statistics of `other` are up to date. What these
        rows held before is gone.
        """
        offset = self.length - other.length
        for (buffer, size), (new, _) in zip(self._buffers(), other._buffers(), strict=True):
            count, first = other.length // size, offset // size
            buffer[rows, :, first : first + count] = new[:, :, :count]
            buffer[rows, :, :first] = 0
        if self.selector.slots:
            self.selector.copy_rows(rows, self.length, self.keys, other.selector, other.length)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows that are in use of every buffer."""
        if not self.is_initialized:
            return
        self.keys = grow_buffer(function(self.keys[:, :, : self.length]), self.length, self.capacity)
        self.values = grow_buffer(function(self.values[:, :, : self.length]), self.length, self.keys.shape[2])
        for level in self.levels:
            level.map_rows(function)
        self.forgotten = 0  # it was not copied

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda buffer: buffer[indices])
        if self.selector.slots:
            with writable_in_any_mode():
                self.selector.select_rows(indices)

    def offload(self):
        raise NotImplementedError("PagedCache keeps its layers on their device: offloading is not supported")
