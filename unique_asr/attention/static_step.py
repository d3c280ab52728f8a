"""A decode step as the device sees it: what all layers of a paged cache share, computed from the position alone.

A CUDA graph replays the same launches at the same addresses. So nothing here depends on the length on the host: every
tensor covers the whole capacity of the cache, and biases exclude what is not there.

Shapes: B batch, K KV heads, P pages of the capacity, S page size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.configuration import SparseAttentionConfig


@dataclass
class StaticStep:
    """One decode step whose shapes and addresses never change."""

    position: Tensor  # int64 [1]: where every row writes its token
    sparse: bool  # selected pages, or everything up to `position`
    config: SparseAttentionConfig
    capacity: int  # tokens of the cache
    starts: Tensor | None = None  # int64 [B]: tokens of padding on the left of each row
    has_written: bool = False  # whether a layer has written its token

    @cached_property
    def current_pages(self) -> list[tuple[Tensor, Tensor]]:
        """For pages, and for super-pages: the one that holds `position`, int64 [1], and its slots, int64 [S]."""
        sizes = self.config.level_sizes
        pages = [self.position // size for size in sizes]
        return [(page, page * size + self._arange(size)) for page, size in zip(pages, sizes)]

    @property
    def newest(self) -> Tensor:
        """int64 [1]: the page of `position`."""
        return self.current_pages[0][0]

    @cached_property
    def token_positions(self) -> Tensor:
        """int64 [B or 1, 1, capacity]: positions counted from each row's first token; -1 past `position`."""
        slot = self._arange(self.capacity).view(1, 1, -1)
        place = slot if self.starts is None else slot - self.starts.view(-1, 1, 1)
        return place.masked_fill(slot > self.position, -1)

    @cached_property
    def page_bias(self) -> Tensor:
        """float32 [1 or B, P]: see `reference.page_bias`."""
        page = self._arange(self.capacity // self.config.page_size).unsqueeze(0)
        candidates = page < self.newest
        if self.starts is not None:
            candidates = candidates & (page >= self.starts.unsqueeze(1) // self.config.page_size)
        return reference.page_bias(candidates, self.config, self.newest)

    @cached_property
    def super_page_bias(self) -> Tensor:
        """float32 [1 or B, P / pages_per_super]: see `reference.super_page_bias`."""
        return reference.super_page_bias(self.page_bias, self.config.pages_per_super, self.current_pages[1][0])

    def selected_bias(self, pages: Tensor) -> Tensor:
        """float32 [budget], or [B, K, budget] with padding: -inf past `position` and before the row's start."""
        if self.starts is None:
            return self._newest_bias
        size = self.config.page_size
        tokens = (pages.unsqueeze(-1) * size + self._arange(size)).flatten(2)
        return self._newest_bias.masked_fill(tokens < self.starts.view(-1, 1, 1), -torch.inf)

    @cached_property
    def _newest_bias(self) -> Tensor:
        size, budget = self.config.page_size, self.config.budget
        slot = self._arange(budget) - (budget - size)  # of the newest page, which comes last, if not negative
        return self._bias(slot <= self.position % size)

    @cached_property
    def dense_bias(self) -> Tensor:
        """float32 [capacity], or [B, 1, capacity] with padding: -inf past `position` and before the row's start."""
        token = self._arange(self.capacity)
        keep = token <= self.position
        return self._bias(keep if self.starts is None else keep & (token >= self.starts.view(-1, 1, 1)))

    def make_lengths(self, batch: int) -> Tensor:
        """Return the tokens of every row, the new one included: int32 [B], the same tensor for all layers."""
        if "_lengths" not in vars(self):
            lengths = torch.empty(batch, dtype=torch.int32, device=self.position.device)
            self._lengths = torch.add(self.position.expand(batch), 1, out=lengths)  # one launch
        return self._lengths

    def make_arrivals(self, rows: int) -> Tensor:
        """Return the counters of this step's kernels: int32, `rows` or more; 0 between their launches.

        They are the step's own, as steps may run at the same time on streams of one device. Every replay of the step
        zeroes them anew.
        """
        if "_arrivals" not in vars(self) or len(self._arrivals) < rows:
            self._arrivals = torch.zeros(rows, dtype=torch.int32, device=self.position.device)
        return self._arrivals

    def _arange(self, number: int) -> Tensor:
        return torch.arange(number, device=self.position.device)

    @staticmethod
    def _bias(keep: Tensor) -> Tensor:
        return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -torch.inf)
