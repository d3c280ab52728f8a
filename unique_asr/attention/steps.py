"""One decode step of one layer: ask the layer's selector what to read, and attend to that.

An eager step (`run_eager_step`) comes after its token is written, and knows the length on the host. A static step
(`run_static_step`) writes its token itself, with shapes and addresses that never change, so that it can be captured in
a CUDA graph (`static_step.py`). Both run in plain PyTorch (`reference.py`), or in the Triton kernels where the cache is
on CUDA and UNIQUE selects.

Shapes: B batch, H query heads, K KV heads, G = H / K group, N tokens, k pages of the budget, D head dim. A step has one
query token a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.backend import load_kernels
from unique_asr.attention.cache import ACTIVE
from unique_asr.attention.page_selector import PageSelector
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.attention.selector import TokenSelector

# Prefill


def read_prompt(
    layer: PagedLayer, query: Tensor, scaling: float, valid: Tensor | None = None, starts: Tensor | None = None
) -> None:
    """Show a chunk of a prompt, whose keys and values are written, to the layer's selector. Attention to it is dense.

    Args:
        query: [B, H, T, D] of the last T tokens.
        scaling: of the attention logits.
        valid: bool [B or 1, N], False for padding; None: no padding.
        starts: int64 [B], the padding on the left of each row, if all padding is there.
    """
    if isinstance(layer.selector, TokenSelector):
        keys, new = layer.keys[:, :, : layer.length], query.shape[2]
        layer.selector.prepare(layer.keys, is_new_sequence=layer.length == new)
        position = find_positions(valid, layer.length, keys.device)
        layer.selector.read_prompt(query.unflatten(1, (keys.shape[1], -1)), keys, position, scaling)
    else:
        layer.update_statistics(valid, starts)


# Eager steps


def run_eager_step(
    layer: PagedLayer, query: Tensor, scaling: float, valid: Tensor | None = None, starts: Tensor | None = None
) -> Tensor | None:
    """Attend sparsely for one query token a row, whose key and value are written.

    Args:
        query: [B, H, 1, D].
        scaling: of the attention logits.
        valid: bool [B or 1, N], False for padding; None: no padding.
        starts: int64 [B], the padding on the left of each row, if all padding is there: the only kind that the kernels
            know.

    Returns:
        [B, K, G, D]; None where the step is dense, which is left to the caller.
    """
    if isinstance(layer.selector, TokenSelector) and layer.is_sparse:
        return attend_to_tokens(layer, query, scaling, valid)
    return attend_to_pages(layer, query, scaling, valid, starts) if layer.sparse_at(layer.length) else None


def attend_to_pages(
    layer: PagedLayer, query: Tensor, scaling: float, valid: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """Attend to the pages that UNIQUE selects and to the newest one; arguments and result as for `run_eager_step`."""
    config, size = layer.config, layer.config.page_size
    newest = (layer.length - 1) // size
    layer.update_statistics(valid, starts)
    if layer.triton and (valid is None or starts is not None):
        lengths = torch.full((len(query),), layer.length, dtype=torch.int32, device=query.device)
        return attend_by_kernels(layer, query, scaling, lengths, starts)
    queries = reference.group_queries(query, layer.keys.shape[1])
    best = layer.selector.select(queries, layer.levels, newest, scaling, valid)
    layer.keep_selection(best)
    pages = torch.cat([best, best.new_full((*best.shape[:2], 1), newest)], dim=-1)

    read = config.budget - ((newest + 1) * size - layer.length)  # without the slots still empty in the newest page
    keys = reference.gather_pages(layer.keys, pages, size)[:, :, :read]
    values = reference.gather_pages(layer.values, pages, size)[:, :, :read]
    mask = None
    if valid is not None:
        tokens = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(2)[:, :, :read]
        mask = valid[:, None].expand(*tokens.shape[:2], -1).gather(2, tokens).unsqueeze(2)
    return reference.attend(queries, keys, values, scaling, mask)


def attend_by_kernels(
    layer: PagedLayer,
    query: Tensor,
    scaling: float,
    lengths: Tensor,
    starts: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Do what `attend_to_pages` does in Triton kernels, which take the length from the device.

    Args:
        query: [B, H, 1, D].
        lengths: int32 [B] on the device, the tokens of each row with the new one.
        starts: int64 [B], the padding on the left of each row; None: no padding.
        arrivals: counters for the kernels (`StaticStep.make_arrivals`); None: those of the stream.

    Returns:
        [B, K, G, D].
    """
    query = query.squeeze(2)
    pages = layer.selector.select_by_kernels(query, layer.levels, lengths, scaling, starts, arrivals)
    layer.keep_selection(pages)
    tokens = layer.keys, layer.values, pages, lengths
    output = load_kernels().sparse_decode(
        query, *tokens, scaling, layer.config.page_size, starts=starts, arrivals=arrivals
    )
    return reference.group_queries(output, layer.keys.shape[1])


def attend_to_tokens(layer: PagedLayer, query: Tensor, scaling: float, valid: Tensor | None) -> Tensor | None:
    """Attend to the tokens that the layer's selector chooses; arguments and result as for `run_eager_step`."""
    keys, values = layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]
    queries = reference.group_queries(query, keys.shape[1])
    layer.selector.prepare(layer.keys, is_new_sequence=layer.length == 1)
    position = find_positions(valid, layer.length, keys.device)
    last = torch.full((1,), layer.length - 1, device=keys.device)
    is_sparse = layer.sparse_at(layer.length)
    bias = ask_for_tokens(layer.selector, queries, keys, position, last, scaling, is_sparse)
    return reference.attend_biased(queries, keys, values, scaling, bias) if is_sparse else None


def find_positions(valid: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Count the tokens of each row from its own first one: int64 [B or 1, 1, N], negative for padding on the left."""
    positions = torch.arange(length, device=device).view(1, 1, -1)
    return positions if valid is None else positions - (~valid).sum(dim=-1).view(-1, 1, 1)


def ask_for_tokens(
    selector: TokenSelector,
    queries: Tensor,
    keys: Tensor,
    position: Tensor,
    last: Tensor,
    scaling: float,
    is_sparse: bool,
) -> Tensor:
    """Run a selector of tokens for one decode step.

    Args:
        queries: [B, K, G, D].
        keys: [B, K, N, D].
        position: int64 [B or 1, 1, N], negative for what nobody reads.
        last: int64 [1], the slot of the newest token.
        is_sparse: whether the step selects; otherwise it reads everything, and the selector only watches.

    Returns:
        float32 [B, K, N]: 0 for the tokens that are read, -inf for the others.
    """
    selector.observe(queries, keys, position, last)
    read = position >= 0
    if is_sparse:
        read = read & selector.select(queries, keys, position, last)
    bias = torch.zeros(read.shape, device=keys.device).masked_fill(~read, -torch.inf).expand(keys.shape[:3])
    if selector.watches_attention:
        selector.observe_attention(reference.attention_weights(queries, keys, scaling, bias), read, last)
    return bias


# Static steps


def run_static_step(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Write the token of the static step `layer.step`, and attend.

    Args:
        query: [B, H, 1, D].
        key: [B, K, 1, D]; value: [B, K, 1, D].
        scaling: of the attention logits.

    Returns:
        [B, 1, H, D].
    """
    selector, is_sparse = layer.selector, layer.step.sparse and layer.is_sparse
    if isinstance(selector, PageSelector) and is_sparse and layer.triton and selector.fits_one_launch(layer.capacity):
        return run_in_one_launch(layer, query, key, value, scaling).unsqueeze(1)
    layer.write_token(key, value)
    return attend_static(layer, query, scaling).flatten(1, 2).unsqueeze(1)


def run_in_one_launch(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Do what `run_static_step` does for a sparse step, in one kernel: [B, H, 1, D] -> [B, H, D]."""
    config, step = layer.config, layer.step
    step.has_written = True
    supers = {}
    if config.pages_per_super > 1:
        supers = {"super_statistics": layer.levels[1].statistics, "super_count": config.super_count}
    output, pages = load_kernels().sparse_step(
        query.squeeze(2), key, value, layer.keys, layer.values, layer.statistics, step.make_lengths(len(query)),
        config.pages - 1, config.score, config.scale, config.combine, config.sink_pages, config.recent_pages,
        starts=step.starts, scaling=scaling, arrivals=step.make_arrivals(len(query) * layer.keys.shape[1]), **supers,
    )  # fmt: skip
    layer.keep_selection(pages)
    return output


def attend_static(layer: PagedLayer, query: Tensor, scaling: float) -> Tensor:
    """Attend in the static step `layer.step`, whose token is written: [B, H, 1, D] -> [B, K, G, D].

    Every tensor has the size of the whole capacity, and the length is on the device.
    """
    config, step = layer.config, layer.step
    queries = reference.group_queries(query, layer.keys.shape[1])
    if isinstance(layer.selector, TokenSelector) and layer.is_sparse:
        layer.selector.prepare(layer.keys)
        positions = step.token_positions, step.position
        bias = ask_for_tokens(layer.selector, queries, layer.keys, *positions, scaling, step.sparse)
        return reference.attend_biased(queries, layer.keys, layer.values, scaling, bias)
    if not (step.sparse and layer.is_sparse):
        return reference.attend_biased(queries, layer.keys, layer.values, scaling, step.dense_bias)
    if layer.triton:
        arrivals = step.make_arrivals(len(query) * layer.keys.shape[1])
        return attend_by_kernels(layer, query, scaling, step.make_lengths(len(query)), step.starts, arrivals)
    best = layer.selector.select_static(queries, layer.levels, step, scaling)
    layer.keep_selection(best)
    pages = torch.cat([best, step.newest.expand(*best.shape[:2], 1)], dim=-1)
    keys = reference.gather_pages(layer.keys, pages, config.page_size)
    values = reference.gather_pages(layer.values, pages, config.page_size)
    return reference.attend_biased(queries, keys, values, scaling, step.selected_bias(pages))


@torch.library.custom_op("unique_asr::static_step", mutates_args=())
def run_static_step_operator(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    """Run `run_static_step` as one operator, so that a compiled model is one graph.

    Args:
        layer: the index in the cache whose static step runs on this thread.
    """
    return run_static_step(ACTIVE.cache.layers[layer], query, key, value, scaling)


@run_static_step_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])
