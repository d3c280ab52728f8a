"""UNIQUE's selection: the pages of best score within the budget, for each KV head (arXiv 2605.27740, section 3).

The same choice in three forms: `select` (plain PyTorch, length on the host), `select_static` (plain PyTorch, length on
the device) and `select_by_kernels` (Triton). All return the complete pages; the newest page, which holds the newest
token, is read in any case and is not among them.

Shapes: B batch, H query heads, K KV heads, G = H / K group, N tokens, P pages, k pages of the budget, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.backend import load_kernels
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.scores import SCORES
from unique_asr.attention.selector import Selector
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.statistics import PageLevel


class PageSelector(Selector):
    """UNIQUE, with the score, the combination and the super-pages of the configuration.

    It keeps no state of its own: the statistics of the pages lie in the cache.
    """

    def __init__(self, config: SparseAttentionConfig) -> None:
        self.config = config
        self.score = SCORES[config.score]

    def count_pages(self, length: int, prompt: int | None = None) -> int:
        return self.config.pages

    def select(
        self,
        queries: Tensor,
        levels: Sequence[PageLevel],
        newest: int,
        scaling: float,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Choose pages in plain PyTorch.

        Args:
            queries: [B, K, G, D].
            levels: of the layer, with statistics up to date.
            newest: the page that holds the newest token.
            scaling: of the attention logits, for combine=share.
            valid: bool [B or 1, N], False for padding; None: no padding.

        Returns:
            int64 [B, K, k - 1], ascending.
        """
        config = self.config
        statistics = [statistic[:, :, :newest] for statistic in levels[0].statistics]
        scores = self.score.scores(queries, statistics, config.scale)
        if valid is None and config.pages_per_super == 1:
            scores = reference.combine_group(scores, config.combine, scaling)
            scores = reference.force_pages(scores, config, newest)
        else:
            if valid is None:
                candidates = torch.ones(1, newest, dtype=torch.bool, device=queries.device)
            else:
                tokens = newest * config.page_size
                candidates = valid[:, :tokens].unflatten(1, (newest, config.page_size)).any(dim=-1)
                candidates = candidates.expand(queries.shape[0], -1)
            bias = reference.page_bias(candidates, config, newest)
            scores = reference.combine_biased(scores, config.combine, scaling, bias)
            supers = newest // config.pages_per_super  # complete super-pages
            if config.pages_per_super > 1 and supers > config.super_count:
                super_bias = reference.super_page_bias(bias, config.pages_per_super, supers)
                scores = self._keep_best_super_pages(queries, levels[1], scaling, scores, super_bias, supers)
        return reference.top_pages(scores, config.pages - 1)

    def select_static(self, queries: Tensor, levels: Sequence[PageLevel], step: StaticStep, scaling: float) -> Tensor:
        """Choose pages in plain PyTorch for a static step: queries [B, K, G, D] -> int64 [B, K, k - 1], ascending."""
        config = self.config
        scores = self.score.scores(queries, levels[0].statistics, config.scale)
        scores = reference.combine_biased(scores, config.combine, scaling, step.page_bias)
        if config.pages_per_super > 1:
            newest = step.current_pages[1][0]
            scores = self._keep_best_super_pages(queries, levels[1], scaling, scores, step.super_page_bias, newest)
        return reference.top_pages(scores, config.pages - 1)

    def _keep_best_super_pages(
        self, queries: Tensor, level: PageLevel, scaling: float, scores: Tensor, bias: Tensor, newest: int | Tensor
    ) -> Tensor:
        """Page scores [B, K, P], -inf outside of the best super-pages; `bias` and `newest` are those of super-pages."""
        config = self.config
        statistics = [statistic[:, :, : bias.shape[-1]] for statistic in level.statistics]
        super_scores = self.score.scores(queries, statistics, config.scale)
        super_scores = reference.combine_biased(super_scores, config.combine, scaling, bias)
        best = reference.top_pages(super_scores, min(config.super_count, super_scores.shape[-1]))
        return reference.keep_super_pages(scores, best, config.pages_per_super, newest)

    def select_by_kernels(
        self,
        query: Tensor,
        levels: Sequence[PageLevel],
        lengths: Tensor,
        scaling: float,
        starts: Tensor | None = None,
        arrivals: Tensor | None = None,
    ) -> Tensor:
        """Choose pages with the Triton kernels; `select` is the plain PyTorch twin.

        Args:
            query: [B, H, D].
            levels: of the layer, with statistics up to date.
            lengths: int32 [B] on the device, the tokens of each row with the new one.
            scaling: of the attention logits, for combine=share.
            starts: int64 [B], the padding on the left of each row; None: no padding.
            arrivals: counters for the kernels (`StaticStep.make_arrivals`); None: those of the stream.

        Returns:
            int32 [B, K, k - 1], ascending; -1 at the end where a row has fewer pages.
        """
        config, kernels, count = self.config, load_kernels(), self.config.pages - 1
        score = config.score, config.scale, config.page_size
        how = {
            "combine": config.combine, "sink": config.sink_pages, "recent": config.recent_pages,
            "starts": starts, "scaling": scaling, "arrivals": arrivals,
        }  # fmt: skip
        statistics = levels[0].statistics
        if config.pages_per_super > 1:
            both, counts = (statistics, levels[1].statistics), (count, config.super_count)
            score = *score, config.pages_per_super
            return kernels.select_pages_in_two_levels(query, *both, lengths, *counts, *score, **how)
        if statistics[0].shape[2] > kernels.MAX_PAGES:  # a quarter of a million tokens at pages of 8
            return reference.top_pages(kernels.page_scores(query, statistics, lengths, *score, **how), count).int()
        return kernels.select_pages(query, statistics, lengths, count, *score, **how)

    def fits_one_launch(self, capacity: int) -> bool:
        """Whether the kernel of a whole step can choose from the pages of a cache of `capacity` tokens."""
        config = self.config
        second = (config.super_count + 1) * config.pages_per_super if config.pages_per_super > 1 else 0
        return max(capacity // (config.page_size * config.pages_per_super), second) <= load_kernels().STEP_PAGES
