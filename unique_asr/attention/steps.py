"""One decode step of one layer, one query token a row: select pages, and attend to them.

Two backends run it: plain PyTorch (`reference.py`), and the Triton kernels where the cache is on CUDA. A static step
(`static_step.py`) does the same with shapes and addresses that never change, so that it can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.backend import kernels
from unique_asr.attention.cache import ACTIVE, PagedLayer
from unique_asr.attention.configuration import SparseAttentionConfig


def sparse_step(
    layer: PagedLayer, query: Tensor, scaling: float, valid: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """One decode step over the selected pages: [B, H, 1, D] -> [B, K, G, D].

    `valid` [B, N] is False for padding, and `starts` [B] says the same of padding that is all on the left.
    """
    config, size = layer.config, layer.config.page_size
    newest = (layer.length - 1) // size
    layer.update_statistics(valid, starts)
    if layer.triton and (valid is None or starts is not None):
        lengths = torch.full((len(query),), layer.length, dtype=torch.int32, device=query.device)
        return kernel_step(layer, query, scaling, lengths, starts)
    queries = reference.group_queries(query, layer.keys.shape[1])
    scores = layer.score.scores(queries, [statistic[:, :, :newest] for statistic in layer.statistics], config.scale)
    if valid is None and config.fan == 1:
        scores = reference.combine_group(scores, config.combine, scaling)
        scores = reference.force_pages(scores, config, newest)
    else:
        if valid is None:
            candidates = torch.ones(1, newest, dtype=torch.bool, device=query.device)
        else:
            valid = valid.expand(query.shape[0], -1)
            candidates = valid[:, : newest * size].unflatten(1, (newest, size)).any(dim=-1)
        bias = reference.page_bias(candidates, config, newest)
        scores = reference.combine_biased(scores, config.combine, scaling, bias)
        if config.fan > 1 and newest // config.fan > config.super_count:
            super_bias = reference.super_page_bias(bias, config.fan, newest // config.fan)
            scores = keep_best_super_pages(layer, queries, scaling, scores, super_bias, newest // config.fan)
    best = reference.top_pages(scores, config.pages - 1)
    layer.keep_selection(best)
    pages = torch.cat([best, best.new_full((*best.shape[:2], 1), newest)], dim=-1)

    read = config.budget - ((newest + 1) * size - layer.length)  # without the slots still empty in the newest page
    keys = reference.gather_pages(layer.keys, pages, size)[:, :, :read]
    values = reference.gather_pages(layer.values, pages, size)[:, :, :read]
    mask = None
    if valid is not None:
        tokens = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(2)[:, :, :read]
        mask = valid[:, None].expand(-1, tokens.shape[1], -1).gather(2, tokens).unsqueeze(2)
    return reference.attend(queries, keys, values, scaling, mask)


def keep_best_super_pages(
    layer: PagedLayer, queries: Tensor, scaling: float, scores: Tensor, bias: Tensor, newest: int | Tensor
) -> Tensor:
    """Page scores [B, K, P], -inf outside of the best super-pages; `bias` and `newest` are those of super-pages."""
    config = layer.config
    statistics = [statistic[:, :, : bias.shape[-1]] for statistic in layer.levels[1].statistics]
    super_scores = layer.score.scores(queries, statistics, config.scale)
    super_scores = reference.combine_biased(super_scores, config.combine, scaling, bias)
    best = reference.top_pages(super_scores, min(config.super_count, super_scores.shape[-1]))
    return reference.keep_super_pages(scores, best, config.fan, newest)


def kernel_step(
    layer: PagedLayer, query: Tensor, scaling: float, lengths: Tensor, starts: Tensor | None = None
) -> Tensor:
    """`sparse_step` in kernels: `lengths` [B] on the device counts the tokens of each row, the new one included."""
    pages = select_pages(layer, query.squeeze(2), scaling, lengths, starts)
    layer.keep_selection(pages)
    output = kernels().sparse_decode(
        query.squeeze(2), layer.keys, layer.values, pages, lengths, scaling, layer.config.page_size, starts=starts
    )
    return reference.group_queries(output, layer.keys.shape[1])


def select_pages(
    layer: PagedLayer, query: Tensor, scaling: float, lengths: Tensor, starts: Tensor | None = None
) -> Tensor:
    """The complete pages that a decode step reads, by kernels: query [B, H, D] -> int32 [B, K, k - 1]."""
    config, kernel, count = layer.config, kernels(), layer.config.pages - 1
    score = config.score, config.scale, config.page_size
    how = {
        "combine": config.combine, "sink": config.sink_pages, "recent": config.recent_pages,
        "starts": starts, "scaling": scaling,
    }  # fmt: skip
    if config.fan > 1:
        levels, counts = (layer.statistics, layer.levels[1].statistics), (count, config.super_count)
        return kernel.select_pages_in_two_levels(query, *levels, lengths, *counts, *score, config.fan, **how)
    if layer.statistics[0].shape[2] > kernel.MAX_PAGES:  # a quarter of a million tokens at pages of 8
        return reference.top_pages(kernel.page_scores(query, layer.statistics, lengths, *score, **how), count).int()
    return kernel.select_pages(query, layer.statistics, lengths, count, *score, **how)


def static_attention(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Write the token of a static step, [B, K, 1, D], and attend: [B, H, 1, D] -> [B, 1, H, D]."""
    if layer.step.sparse and layer.sparse_layer and layer.triton and fits_one_launch(layer.config, layer.capacity):
        return step_in_one_launch(layer, query, key, value, scaling).unsqueeze(1)
    layer.write_token(key, value)
    return static_step(layer, query, scaling).flatten(1, 2).unsqueeze(1)


def fits_one_launch(config: SparseAttentionConfig, capacity: int) -> bool:
    """Whether the kernel of a whole step can choose from the pages of a cache of `capacity` tokens."""
    second = (config.super_count + 1) * config.fan if config.fan > 1 else 0
    return max(capacity // (config.page_size * config.fan), second) <= kernels().STEP_PAGES


def step_in_one_launch(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`write_token` and a sparse `static_step` in one kernel: [B, H, 1, D] -> [B, H, D]."""
    config, step = layer.config, layer.step
    supers = {}
    if config.fan > 1:
        supers = {"super_statistics": layer.levels[1].statistics, "super_count": config.super_count}
    output, pages = kernels().sparse_step(
        query.squeeze(2), key, value, layer.keys, layer.values, layer.statistics, step.lengths(len(query)),
        config.pages - 1, config.score, config.scale, config.combine, config.sink_pages, config.recent_pages,
        starts=step.starts, scaling=scaling, arrivals=step.arrivals(len(query) * layer.keys.shape[1]), **supers,
    )  # fmt: skip
    layer.keep_selection(pages)
    return output


@torch.library.custom_op("unique_asr::static_attention", mutates_args=())
def static_attention_operator(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    """The same as one operator, so that a compiled model is one graph; `layer` is the index in the active cache."""
    return static_attention(ACTIVE.cache.layers[layer], query, key, value, scaling)


@static_attention_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


def static_step(layer: PagedLayer, query: Tensor, scaling: float) -> Tensor:
    """`sparse_step`, or a dense one, with the length on the device and shapes of the whole capacity; token written."""
    config, step = layer.config, layer.step
    queries = reference.group_queries(query, layer.keys.shape[1])
    if not (step.sparse and layer.sparse_layer):
        return reference.attend_biased(queries, layer.keys, layer.values, scaling, step.dense_bias)
    if layer.triton:
        return kernel_step(layer, query, scaling, step.lengths(len(query)), step.starts)
    scores = layer.score.scores(queries, layer.statistics, config.scale)
    scores = reference.combine_biased(scores, config.combine, scaling, step.page_bias)
    if config.fan > 1:
        scores = keep_best_super_pages(layer, queries, scaling, scores, step.super_page_bias, step.touched[1][0])
    best = reference.top_pages(scores, config.pages - 1)
    layer.keep_selection(best)
    pages = torch.cat([best, step.newest.expand(*best.shape[:2], 1)], dim=-1)
    keys = reference.gather_pages(layer.keys, pages, config.page_size)
    values = reference.gather_pages(layer.values, pages, config.page_size)
    return reference.attend_biased(queries, keys, values, scaling, step.selected_bias(pages))
