"""The device's view of one decode step over a paged cache: what its layers share, whatever the length on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.configuration import SparseAttentionConfig


@dataclass
class StaticStep:
    """One decode step whose shapes and addresses never change: what all layers share, computed from the position."""

    position: Tensor  # int64 [1]: where every row writes its token
    sparse: bool  # selected pages, or everything up to `position`
    config: SparseAttentionConfig
    capacity: int  # tokens of the cache
    starts: Tensor | None = None  # int64 [B]: tokens of padding on the left of each row

    @cached_property
    def touched(self) -> list[tuple[Tensor, Tensor]]:
        """Of every size of pages, the page of `position`, int64 [1], and the positions of its tokens, int64 [S]."""
        pages = [self.position // size for size in page_sizes(self.config)]
        return [(page, page * size + self._count(size)) for page, size in zip(pages, page_sizes(self.config))]

    @property
    def newest(self) -> Tensor:
        """int64 [1]: the page of `position`."""
        return self.touched[0][0]

    @cached_property
    def page_bias(self) -> Tensor:
        """float32 [1 or B, P]: see `reference.page_bias`."""
        page = self._count(self.capacity // self.config.page_size).unsqueeze(0)
        candidates = page < self.newest
        if self.starts is not None:
            candidates = candidates & (page >= self.starts.unsqueeze(1) // self.config.page_size)
        return reference.page_bias(candidates, self.config, self.newest)

    @cached_property
    def super_page_bias(self) -> Tensor:
        """float32 [1 or B, P / fan]: see `reference.super_page_bias`."""
        return reference.super_page_bias(self.page_bias, self.config.fan, self.touched[1][0])

    def selected_bias(self, pages: Tensor) -> Tensor:
        """float32 [budget], or [B, K, budget] with padding: -inf past `position` and before the row's start."""
        if self.starts is None:
            return self._newest_bias
        size = self.config.page_size
        tokens = (pages.unsqueeze(-1) * size + self._count(size)).flatten(2)
        return self._newest_bias.masked_fill(tokens < self.starts.view(-1, 1, 1), -torch.inf)

    @cached_property
    def _newest_bias(self) -> Tensor:
        size, budget = self.config.page_size, self.config.budget
        slot = self._count(budget) - (budget - size)  # of the newest page, which comes last, if not negative
        return self._bias(slot <= self.position % size)

    @cached_property
    def dense_bias(self) -> Tensor:
        """float32 [capacity], or [B, 1, capacity] with padding: -inf past `position` and before the row's start."""
        token = self._count(self.capacity)
        keep = token <= self.position
        return self._bias(keep if self.starts is None else keep & (token >= self.starts.view(-1, 1, 1)))

    def lengths(self, batch: int) -> Tensor:
        """int32 [B]: tokens of every row, the new one included."""
        if "_lengths" not in vars(self):
            lengths = torch.empty(batch, dtype=torch.int32, device=self.position.device)
            self._lengths = torch.add(self.position.expand(batch), 1, out=lengths)  # one launch
        return self._lengths

    def arrivals(self, rows: int) -> Tensor:
        """int32 [rows]: counters of `sparse_step`, 0 between its launches; zeroed anew by every replay of the step."""
        if "_arrivals" not in vars(self) or len(self._arrivals) < rows:
            self._arrivals = torch.zeros(rows, dtype=torch.int32, device=self.position.device)
        return self._arrivals

    def _count(self, number: int) -> Tensor:
        return torch.arange(number, device=self.position.device)

    @staticmethod
    def _bias(keep: Tensor) -> Tensor:
        return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -torch.inf)


def page_sizes(config: SparseAttentionConfig) -> list[int]:
    """Tokens of a page, and of a super-page if there are any."""
    return [config.page_size] + ([] if config.super_page_size is None else [config.super_page_size])
