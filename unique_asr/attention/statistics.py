"""Page statistics of one layer: what `scores.py` stores of every complete page, at one or two sizes of pages.

Statistics depend on keys alone. They are written once a page is complete, as the page being written is read anyway, and
recomputing a page gives the same numbers.

Shapes: B batch, K KV heads, N tokens, S page size, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.backend import load_kernels
from unique_asr.attention.buffers import grow_buffer, make_buffer, view_as_bytes
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.scores import SCORES, PageScore

STATISTICS_BATCH = 4096  # pages whose statistics are computed at once: bounds the memory of a long prefill


@dataclass
class PageLevel:
    """The statistics of the pages, or of the super-pages, of one layer."""

    size: int  # tokens of a page
    score: PageScore
    dtype: str  # `statistics_dtype` of the configuration
    statistics: tuple[Tensor, ...] = ()  # [B, K, capacity / S, width] each
    ready: int = 0  # complete pages whose statistics are up to date

    def allocate(self, keys: Tensor) -> None:
        """Make empty buffers for keys [B, K, N, D]; `grow` gives them room."""
        layout = self.score.buffer_layout(keys.shape[-1], keys.dtype, self.dtype)
        self.statistics = tuple(make_buffer(keys, *keys.shape[:2], 0, width, dtype=dtype) for width, dtype in layout)

    def grow(self, capacity: int) -> None:
        """Give the buffers room for the pages of `capacity` tokens."""
        pages = capacity // self.size
        self.statistics = tuple(grow_buffer(statistic, self.ready, pages) for statistic in self.statistics)

    def update(self, keys: Tensor, length: int, valid: Tensor | None, starts: Tensor | None, triton: bool) -> None:
        """Write the statistics of every complete page that has none yet.

        Args:
            keys: [B, K, capacity, D], of which `length` tokens are written.
            valid: bool [B, N], False for padding; None: no padding.
            starts: int64 [B], the padding on the left of each row, if all padding is there: the only kind that the
                kernels know.
            triton: whether the kernels run.
        """
        complete = length // self.size
        if self.ready < complete and triton and (valid is None or starts is not None):
            span = self.ready, complete
            load_kernels().write_page_statistics(keys, self.statistics, *span, self.score.name, starts)
            self.ready = complete
        while self.ready < complete:
            last = min(complete, self.ready + STATISTICS_BATCH)
            tokens = slice(self.ready * self.size, last * self.size)
            mask = None if valid is None else valid[:, tokens]
            for statistic, values in zip(self.statistics, self._compute(keys[:, :, tokens], mask)):
                statistic[:, :, self.ready : last] = values
            self.ready = last

    def rewrite(self, keys: Tensor, page: Tensor, slots: Tensor) -> None:
        """Write the statistics of one page, complete or not: `page` int64 [1], its `slots` int64 [S]."""
        for statistic, values in zip(self.statistics, self._compute(keys.index_select(2, slots))):
            view_as_bytes(statistic).index_copy_(2, page, view_as_bytes(values))

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of [B, K, n, width], for instance a choice of rows, to what is up to date in each buffer."""
        rows = [function(view_as_bytes(each)[:, :, : self.ready]).view(each.dtype) for each in self.statistics]
        pages = [each.shape[2] for each in self.statistics]
        self.statistics = tuple(grow_buffer(used, self.ready, size) for used, size in zip(rows, pages))

    def _compute(self, keys: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.score.encode(reference.page_statistics(keys, self.size, self.score, valid), self.dtype)


def make_levels(config: SparseAttentionConfig) -> list[PageLevel]:
    """Return the levels of a layer: its pages, and its super-pages if the configuration has any."""
    return [PageLevel(size, SCORES[config.score], config.statistics_dtype) for size in config.level_sizes]
