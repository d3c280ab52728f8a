"""Page scores: what to store of a page's keys, and how promising a page is for a query.

Every score is linear algebra on the stored statistics, so that a decode step never reads the keys of a page it drops.
Shapes: B batch, K KV heads, G query heads of a group, P pages, S page size, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class PageScore(ABC):
    """A way to rank pages; stateless."""

    name: str

    @abstractmethod
    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Numbers stored of a page, one entry a statistic."""

    @abstractmethod
    def statistics(self, pages: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Statistics [B, K, P, width] of pages of keys [B, K, P, S, D].

        `valid` [B, P, S] is False for tokens to leave out (padding); a page without any token gets zeros.
        """

    @abstractmethod
    def scores(self, query: Tensor, statistics: Sequence[Tensor], scale: float) -> Tensor:
        """Scores [B, K, G, P] in float32 of every page for every query head [B, K, G, D]."""


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
        (mean,) = statistics
        return torch.matmul(query, mean.transpose(-1, -2)).float()


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
        mean, std = statistics
        norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.matmul(query, mean.transpose(-1, -2)).float() + (scale * norm) * std.float().transpose(-1, -2)


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
        low, high = statistics
        above = torch.matmul(query.clamp(min=0), high.transpose(-1, -2))
        below = torch.matmul(query.clamp(max=0), low.transpose(-1, -2))
        return above.float() + below.float()


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
        mean, variance = statistics
        spread = torch.matmul(query.square(), variance.transpose(-1, -2)).float()
        weight = scale * query.shape[-1] ** -0.5
        return torch.matmul(query, mean.transpose(-1, -2)).float() + weight * spread


SCORES: dict[str, PageScore] = {score.name: score for score in (Unique(), Mean(), Quest(), SecondMoment())}
