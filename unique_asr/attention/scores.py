"""Page scores: what to store of a page's keys, and how promising a page is for a query.

Every score is linear algebra on the stored statistics, so that a decode step never reads the keys of a page it drops.
Statistics are stored in the dtype of the keys, or those of width D in 8 bits: then the values are followed by their
scale [B, K, P, 1], one for each page, and value * scale is the statistic. Bytes a page for UNIQUE at D 128 and 16-bit
keys: 258, or 132 in 8 bits; the keys and values of 8 tokens take 4,096.

Shapes: B batch, K KV heads, G query heads of a group, P pages, S page size, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # statistics_dtype of the configuration
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # value that a statistic's largest number becomes


class PageScore(ABC):
    """A way to rank pages; stateless."""

    name: str

    @abstractmethod
    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Numbers stored of a page, one entry a statistic."""

    def buffer_layout(
        self, head_dim: int, dtype: torch.dtype, statistics_dtype: str = "keys"
    ) -> list[tuple[int, torch.dtype]]:
        """Width and dtype of what is stored of a page of keys in `dtype`, in order."""
        if statistics_dtype == "keys":
            return [(width, dtype) for width in self.widths(head_dim)]
        stored = []
        for width in self.widths(head_dim):
            stored += [(width, EIGHT_BITS[statistics_dtype]), (1, dtype)] if width > 1 else [(width, dtype)]
        return stored

    def encode(self, statistics: Sequence[Tensor], statistics_dtype: str = "keys") -> tuple[Tensor, ...]:
        """Statistics as they are kept: unchanged, or 8-bit values and their scales."""
        if statistics_dtype == "keys":
            return tuple(statistics)
        kept = []
        for statistic in statistics:
            kept += quantize(statistic, EIGHT_BITS[statistics_dtype]) if statistic.shape[-1] > 1 else [statistic]
        return tuple(kept)

    @abstractmethod
    def statistics(self, pages: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Statistics [B, K, P, width] of pages of keys [B, K, P, S, D].

        `valid` [B, P, S] is False for tokens to leave out (padding); a page without any token gets zeros.
        """

    @abstractmethod
    def scores(self, query: Tensor, statistics: Sequence[Tensor], scale: float) -> Tensor:
        """Scores [B, K, G, P] in float32 of every page for every query head [B, K, G, D]; statistics as stored."""


def quantize(statistic: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values [B, K, P, D] in 8 bits and the scale [B, K, P, 1], in the dtype of the statistic, that undoes it."""
    numbers = statistic.float()
    scale = (numbers.abs().amax(dim=-1, keepdim=True) / LARGEST[dtype]).to(statistic.dtype)
    values = (numbers / scale.float().masked_fill(scale == 0, 1)).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def products(query: Tensor, statistics: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Products [B, K, G, P] in float32 of the queries with the first statistic, and the statistics after it."""
    values, rest = statistics[0], statistics[1:]
    product = torch.matmul(query, values.to(query.dtype).transpose(-1, -2)).float()
    if values.dtype not in LARGEST:
        return product, rest
    return product * rest[0].float().transpose(-1, -2), rest[1:]


def token_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the tokens of a page: [B, K, P, S, D] -> [B, K, P, D]."""
    if valid is None:
        return values.mean(dim=-2)
    weight = valid[:, None, :, :, None].to(values.dtype)
    return (values * weight).sum(dim=-2) / weight.sum(dim=-2).clamp(min=1)


class Mean(PageScore):
    """q . mean: the centroid alone."""

    name = "mean"

    def widths(self, head_dim):
        return (head_dim,)

    def statistics(self, pages, valid=None):
        return (token_mean(pages.float(), valid).to(pages.dtype),)

    def scores(self, query, statistics, scale):
        return products(query, statistics)[0]


class Unique(PageScore):
    """q . mean + lambda * |q| * std, where std = sqrt(trace of the page's population covariance) (UNIQUE)."""

    name = "unique"

    def widths(self, head_dim):
        return (head_dim, 1)

    def statistics(self, pages, valid=None):
        keys = pages.float()
        mean = token_mean(keys, valid)
        variance = token_mean((keys - mean.unsqueeze(-2)).square(), valid)
        std = variance.sum(dim=-1, keepdim=True).sqrt()
        return mean.to(pages.dtype), std.to(pages.dtype)

    def scores(self, query, statistics, scale):
        product, (std,) = products(query, statistics)
        norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True, dtype=torch.float32)
        return product + (scale * norm) * std.float().transpose(-1, -2)


class Quest(PageScore):
    """sum_i max(q_i min_i, q_i max_i): an upper bound of q . k over the page (Quest)."""

    name = "quest"

    def widths(self, head_dim):
        return (head_dim, head_dim)

    def statistics(self, pages, valid=None):
        if valid is None:
            return pages.amin(dim=-2), pages.amax(dim=-2)
        keep = valid[:, None, :, :, None]
        low = pages.masked_fill(~keep, float("inf")).amin(dim=-2)
        high = pages.masked_fill(~keep, float("-inf")).amax(dim=-2)
        empty = ~keep.any(dim=-2)
        return low.masked_fill(empty, 0), high.masked_fill(empty, 0)

    def scores(self, query, statistics, scale):
        below, high = products(query.clamp(max=0), statistics)
        above, _ = products(query.clamp(min=0), high)
        return above + below


class SecondMoment(PageScore):
    """q . mean + lambda * sum_i q_i^2 var_i / sqrt(D): two cumulants of the page's logits (lambda 1/2 is exact)."""

    name = "second_moment"

    def widths(self, head_dim):
        return (head_dim, head_dim)

    def statistics(self, pages, valid=None):
        keys = pages.float()
        mean = token_mean(keys, valid)
        variance = token_mean((keys - mean.unsqueeze(-2)).square(), valid)
        return mean.to(pages.dtype), variance.to(pages.dtype)

    def scores(self, query, statistics, scale):
        product, variance = products(query, statistics)
        spread, _ = products(query.square(), variance)
        return product + scale * query.shape[-1] ** -0.5 * spread


SCORES: dict[str, PageScore] = {score.name: score for score in (Unique(), Mean(), Quest(), SecondMoment())}
