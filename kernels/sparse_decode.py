"""Attention of one query token a sequence over selected pages, split over programs and merged in one launch.

All query heads of a group share a program, so that keys and values are read once. Few rows are divided over more
programs; the last program of a row to finish merges their parts by log-sum-exp, always in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device
from unique_asr.kernels.paging import get_counters, is_last, locate, make_table_arguments


class DecodeTile(NamedTuple):
    """How the work is cut: tokens of a tile, tiles of a program, warps of a program, stages of its pipeline."""

    tokens: int
    tiles: int = 1
    warps: int = 4
    stages: int = 1


def decode_tile(rows: int, tokens: int, splits: int | None = None) -> DecodeTile:
    """Choose a tile: large, one program a row, where rows fill the GPU; small, more programs, where they do not."""
    size = 128 if rows >= 256 else 64 if rows >= 32 else 32
    tiles = triton.cdiv(tokens, size)
    if splits is not None:
        tiles = triton.cdiv(tiles, splits)
    elif rows < 256:
        tiles = 2 if rows >= 32 else 1
    return DecodeTile(size, tiles, warps=8 if size == 128 else 4, stages=1 if tiles == 1 else 2)


@triton.jit
def attend(
    q, keys, values, pages, table, sequence, head, part, start, length, scaling, count, table_stride,
    stride_block, stride_head, stride_token,
    G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PER_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over PART tokens of the `count` pages of a row and the newest: output, its total and its peak."""
    d = tl.arange(0, D_PAD)
    peak = tl.full((G_PAD,), -float("inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    output = tl.zeros((G_PAD, D_PAD), tl.float32)
    for tile in tl.range(0, tl.cdiv(PART, BLOCK), num_stages=STAGES):
        within = tile * BLOCK + tl.arange(0, BLOCK)
        slot = part * PART + within
        entry = slot // S
        page = tl.load(pages + entry, mask=entry < count, other=-1, cache_modifier=".cg")
        page = tl.where(entry == count, (length - 1) // S, page)  # the newest page comes last
        token = page * S + slot % S
        valid = (page >= 0) & (token >= start) & (token < length) & (within < PART)
        block, place = locate(page, sequence, table, table_stride, valid, PER_BLOCK)
        offset = block * stride_block + head * stride_head + (place * S + slot % S) * stride_token
        offset = offset[:, None] + d[None, :]
        mask = valid[:, None] & (d < D)[None, :]
        k = tl.load(keys + offset, mask=mask, other=0.0)
        v = tl.load(values + offset, mask=mask, other=0.0)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scaling * 1.4426950408889634)
        logit = tl.where(valid[None, :], logit, -float("inf"))
        highest = tl.maximum(peak, tl.max(logit, axis=1))
        base = tl.where(highest > -float("inf"), highest, 0.0)
        weight = tl.exp2(logit - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(weight, axis=1)
        output = output * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        peak = highest
    return output, total, peak


@triton.jit
def store_part(
    output, total, peak, out, parts, peaks, sums, row, part,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write the attention of one of PROGRAMS programs of a row: to be merged, or as it is where there is one."""
    d = tl.arange(0, D_PAD)
    g = tl.arange(0, G_PAD)
    real = (g < G)[:, None] & (d < D)[None, :]
    if PROGRAMS == 1:
        output /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (row * G + g[:, None]) * D + d[None, :], output.to(out.dtype.element_ty), mask=real)
    else:
        mine = (row * PROGRAMS + part) * G + g
        tl.store(parts + mine[:, None] * D + d[None, :], output, mask=real)
        tl.store(peaks + mine, peak, mask=g < G)
        tl.store(sums + mine, total, mask=g < G)


@triton.jit
def _sparse_decode(
    query, keys, values, pages, lengths, starts, table, out, parts, peaks, sums, arrivals,
    scaling, count, heads, query_row, query_head, table_stride, stride_block, stride_head, stride_token,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr,
    PROGRAMS_PAD: tl.constexpr, PER_BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PROGRAMS
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    sequence, head = row // heads, row % heads
    length = tl.load(lengths + sequence).to(tl.int32)
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + sequence).to(tl.int32)
    d = tl.arange(0, D_PAD)
    g = tl.arange(0, G_PAD)
    own = query + sequence * query_row + (head * G + g[:, None]) * query_head + d[None, :]
    q = tl.load(own, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0).to(keys.dtype.element_ty)
    output, total, peak = attend(
        q, keys, values, pages + row * count, table, sequence, head, part, start, length, scaling, count, table_stride,
        stride_block, stride_head, stride_token, G_PAD, D, D_PAD, S, BLOCK * TILES, BLOCK, STAGES, PER_BLOCK, PRECISION,
    )  # fmt: skip
    store_part(output, total, peak, out, parts, peaks, sums, row, part, G, G_PAD, D, D_PAD, PROGRAMS)
    if PROGRAMS > 1:  # noqa: SIM102 (compiled or not, then at run time)
        if is_last(arrivals + row, PROGRAMS):
            merge(out, parts, peaks, sums, row, G, D, D_PAD, PROGRAMS, PROGRAMS_PAD)


@triton.jit
def merge(
    out, parts, peaks, sums, row,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PROGRAMS: tl.constexpr, PROGRAMS_PAD: tl.constexpr,
):  # fmt: skip
    """Merge the parts [PROGRAMS, G, D] of one row by log-sum-exp."""
    d = tl.arange(0, D_PAD)
    g = tl.arange(0, triton.next_power_of_2(G))
    part = tl.arange(0, PROGRAMS_PAD)
    mine = row * PROGRAMS * G + g
    real = (part < PROGRAMS)[:, None] & (g < G)[None, :]
    all_parts = mine[None, :] + part[:, None] * G
    peak_parts = tl.load(peaks + all_parts, mask=real, other=-float("inf"), cache_modifier=".cg")
    total_parts = tl.load(sums + all_parts, mask=real, other=0.0, cache_modifier=".cg")
    peak = tl.max(peak_parts, axis=0)
    peak = tl.where(peak > -float("inf"), peak, 0.0)
    total = tl.sum(total_parts * tl.exp2(peak_parts - peak[None, :]), axis=0)
    real = (g < G)[:, None] & (d < D)[None, :]
    output = tl.zeros((triton.next_power_of_2(G), D_PAD), tl.float32)
    for p in tl.range(PROGRAMS, loop_unroll_factor=min(PROGRAMS, 8)):  # loads of a round are in flight together
        weight = tl.exp2(tl.load(peaks + mine + p * G, mask=g < G, other=0.0, cache_modifier=".cg") - peak)
        own = parts + (mine + p * G)[:, None] * D + d[None, :]
        output += tl.load(own, mask=real, other=0.0, cache_modifier=".cg") * weight[:, None]
    output /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + (row * G + g[:, None]) * D + d[None, :], output.to(out.dtype.element_ty), mask=real)


@launch_on_its_device
def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
    page_size: int,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
    tile: DecodeTile | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Attend to selected pages and to the newest one: softmax(q K^T * scaling) V.

    The plain PyTorch twins are `unique_asr.attention.reference.gather_pages` and `attend`.

    Args:
        query: [B, H, D].
        keys: [B, K, N, D]; values: [B, K, N, D], with the strides of `keys`.
        pages: int32 [B, K, k], contiguous: complete pages, -1 for none. The newest page, of token lengths - 1, is added
            here and must not be among them.
        lengths: int [B], the tokens of each sequence; one of length 0 gets zeros.
        page_size: tokens of a page.
        starts: int [B], the padding on the left, in tokens; None: no padding.
        block_table: int32 [B, blocks], as in `paging.py`; None: tokens lie by position.
        splits: programs that a row is divided over; None: by the number of rows.
        out: where to write; None: a new tensor.
        tile: how the work is cut; None: `decode_tile`.
        arrivals: int32 [B K or more], 0 before and after a launch; launches that may overlap need their own. None:
            those of the stream (`get_counters`).

    Returns:
        [B, H, D].

    Raises:
        ValueError: shapes or strides of keys and values differ.
    """
    if keys.stride() != values.stride() or keys.shape != values.shape:
        raise ValueError("keys and values must have the same shape and strides")
    sequences, query_heads, dim = query.shape
    heads, block_tokens = keys.shape[1:3]
    rows, group, count = sequences * heads, query_heads // heads, pages.shape[-1]
    tokens = (count + 1) * page_size
    tile = tile or decode_tile(rows, tokens, splits)
    programs = triton.cdiv(tokens, tile.tokens * tile.tiles)
    if out is None:
        out = query.new_empty(sequences, query_heads, dim)
    parts = peaks = sums = out
    if programs > 1:
        parts = query.new_empty(rows, programs, group, dim, dtype=torch.float32)
        peaks, sums = query.new_empty(2, rows, programs, group, dtype=torch.float32)
        arrivals = get_counters(rows, query.device) if arrivals is None else arrivals
    table, table_stride = make_table_arguments(block_table, query)
    _sparse_decode[(rows * programs,)](
        query, keys, values, pages, lengths, query if starts is None else starts, table,
        out, parts, peaks, sums, lengths if arrivals is None else arrivals,
        scaling, count, heads, *query.stride()[:2], table_stride, *keys.stride()[:3],
        G=group, G_PAD=max(16, triton.next_power_of_2(group)), D=dim, D_PAD=triton.next_power_of_2(dim), S=page_size,
        BLOCK=tile.tokens, TILES=tile.tiles, STAGES=tile.stages, PROGRAMS=programs,
        PROGRAMS_PAD=triton.next_power_of_2(programs), HAS_STARTS=starts is not None,
        PER_BLOCK=0 if block_table is None else block_tokens // page_size,
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32", num_warps=tile.warps,
    )  # fmt: skip
    return out
