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
    """A way to rank pages; stateless. It stores some statistics of each page, and scores pages by them alone."""

    name: str

    @abstractmethod
    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Return how many numbers of a page are stored, one entry a statistic."""

    def buffer_layout(
        self, head_dim: int, dtype: torch.dtype, statistics_dtype: str = "keys"
    ) -> list[tuple[int, torch.dtype]]:
        """Return the width and the dtype of each buffer of statistics, in order.

        Args:
            head_dim: of the keys.
            dtype: of the keys.
            statistics_dtype: of the configuration: keys, fp8 or int8.
        """
        if statistics_dtype == "keys":
            return [(width, dtype) for width in self.widths(head_dim)]
        stored = []
        for width in self.widths(head_dim):
            stored += [(width, EIGHT_BITS[statistics_dtype]), (1, dtype)] if width > 1 else [(width, dtype)]
        return stored

    def encode(self, statistics: Sequence[Tensor], statistics_dtype: str = "keys") -> tuple[Tensor, ...]:
        """Return statistics [B, K, P, width] as they are stored: unchanged, or as 8-bit values and their scales."""
        if statistics_dtype == "keys":
            return tuple(statistics)
        kept = []
        for statistic in statistics:
            kept += quantize(statistic, EIGHT_BITS[statistics_dtype]) if statistic.shape[-1] > 1 else [statistic]
        return tuple(kept)

    @abstractmethod
    def statistics(self, pages: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the statistics of pages.

        Args:
            pages: keys [B, K, P, S, D].
            valid: bool [B, P, S], False for tokens to leave out (padding); a page without any token gets zeros.

        Returns:
            [B, K, P, width] each, in the dtype of the keys.
        """

    @abstractmethod
    def scores(self, query: Tensor, statistics: Sequence[Tensor], scale: float) -> Tensor:
        """Score every page for every query head.

        Args:
            query: [B, K, G, D].
            statistics: as stored (`encode`), [B, K, P, width] each.
            scale: lambda, the weight of the spread of a page.

        Returns:
            [B, K, G, P], at least in float32: products of 16-bit keys leave the range of their type.
        """


def quantize(statistic: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn a statistic [B, K, P, D] into 8-bit values [B, K, P, D] and their scales [B, K, P, 1].

    The scale has the dtype of the statistic, and value * scale is the statistic, rounded.
    """
    numbers = statistic.float()
    scale = (numbers.abs().amax(dim=-1, keepdim=True) / LARGEST[dtype]).to(statistic.dtype)
    values = (numbers / scale.float().masked_fill(scale == 0, 1)).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def multiply_first(query: Tensor, statistics: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Multiply queries [B, K, G, D] with the first of the statistics as stored.

    Returns:
        The products [B, K, G, P], at least in float32, and the statistics after the first (and its scales, in 8 bits).
    """
    query, values, rest = widen(query), statistics[0], statistics[1:]
    product = torch.matmul(query, values.to(query.dtype).transpose(-1, -2))
    if values.dtype not in LARGEST:
        return product, rest
    return product * rest[0].transpose(-1, -2), rest[1:]


def widen(numbers: Tensor) -> Tensor:
    """Return numbers of 16 bits as float32, and others as they are."""
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def average_tokens(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average over the tokens of a page: [B, K, P, S, D] -> [B, K, P, D]; `valid` as for `statistics`."""
    if valid is None:
        return values.mean(dim=-2)
    weight = valid[:, None, :, :, None].to(values.dtype)
    return (values * weight).sum(dim=-2) / weight.sum(dim=-2).clamp(min=1)


class Mean(PageScore):
    """q . mean: the centroid of the page alone."""

    name = "mean"

    def widths(self, head_dim):
        return (head_dim,)

    def statistics(self, pages, valid=None):
        return (average_tokens(widen(pages), valid).to(pages.dtype),)

    def scores(self, query, statistics, scale):
        return multiply_first(query, statistics)[0]


class Unique(PageScore):
    """q . mean + lambda * |q| * std, where std = sqrt(trace of the page's population covariance).

    The score of UNIQUE (arXiv 2605.27740, section 3), with lambda 0.5.
    """

    name = "unique"

    def widths(self, head_dim):
        return (head_dim, 1)

    def statistics(self, pages, valid=None):
        keys = widen(pages)
        mean = average_tokens(keys, valid)
        variance = average_tokens((keys - mean.unsqueeze(-2)).square(), valid)
        std = variance.sum(dim=-1, keepdim=True).sqrt()
        return mean.to(pages.dtype), std.to(pages.dtype)

    def scores(self, query, statistics, scale):
        product, (std,) = multiply_first(query, statistics)
        norm = torch.linalg.vector_norm(widen(query), dim=-1, keepdim=True)
        return product + (scale * norm) * std.to(product.dtype).transpose(-1, -2)


class Quest(PageScore):
    """sum_i max(q_i min_i, q_i max_i): an upper bound of q . k over the page.

    The score of Quest (arXiv 2406.10774).
    """

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
        below, high = multiply_first(query.clamp(max=0), statistics)
        above, _ = multiply_first(query.clamp(min=0), high)
        return above + below


class SecondMoment(PageScore):
    """q . mean + lambda * sum_i q_i^2 var_i / sqrt(D): two cumulants of the page's logits (lambda 1/2 is exact)."""

    name = "second_moment"

    def widths(self, head_dim):
        return (head_dim, head_dim)

    def statistics(self, pages, valid=None):
        keys = widen(pages)
        mean = average_tokens(keys, valid)
        variance = average_tokens((keys - mean.unsqueeze(-2)).square(), valid)
        return mean.to(pages.dtype), variance.to(pages.dtype)

    def scores(self, query, statistics, scale):
        product, variance = multiply_first(query, statistics)
        spread, _ = multiply_first(widen(query).square(), variance)
        return product + scale * query.shape[-1] ** -0.5 * spread


SCORES: dict[str, PageScore] = {score.name: score for score in (Unique(), Mean(), Quest(), SecondMoment())}
