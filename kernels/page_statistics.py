"""Statistics of pages, computed from the keys in the cache: in bulk after a prefill, page by page while decoding.

Statistics of one level of pages are a tuple of contiguous buffers [B, K, P, width]; the page size is N / P. They are
unique (mean, std), mean (mean,), quest (low, high) and second_moment (mean, variance); std has width 1, the others D.
In 8 bits (float8_e4m3fn or int8) each buffer of width D is followed by its scale, of width 1 in 16 bits, for instance
unique (mean, scale, std): the value is number * scale, and scale = largest absolute value of the page / 448 (or 127).

With a block table (int32 [B, blocks]) token t of sequence b is keys[table[b, t // n], :, t % n], for keys
[blocks in all, K, n, D], and its page lies likewise in statistics [blocks in all, K, n / S, width].
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device
from unique_asr.kernels.paging import locate, make_table_arguments

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # number of each 8-bit type
UNROLL = tl.constexpr(8)  # tokens of a page read at once in bulk; page sizes are multiples of it
PAGES = 4  # of a program


@triton.jit
def _round_to_e4m3(values):
    """float32 values of at most 448 to the nearest number of e4m3, half to even: not every conversion rounds so."""
    bits = values.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    small = (values + 24576.0) - 24576.0  # 1.5 * 2^14: to a multiple of 2^-9
    return tl.where(tl.abs(values) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def _store(buffer, scales, place, values, d, exists, D: tl.constexpr, LARGEST: tl.constexpr):
    """Write values [pages, D] in the type of `buffer`; in 8 bits (LARGEST > 0) with a scale for each page."""
    if LARGEST > 0:
        scale = (tl.max(tl.abs(values), axis=1) / LARGEST).to(scales.dtype.element_ty)
        tl.store(scales + place, scale, mask=exists)
        scale = scale.to(tl.float32)[:, None]
        values = values / tl.where(scale > 0, scale, 1.0)
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        if LARGEST == 127:
            values = (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, half to even
        else:
            values = _round_to_e4m3(values)
    tl.store(buffer + place[:, None] * D + d, values.to(buffer.dtype.element_ty), mask=exists[:, None] & (d < D))


@triton.jit
def _write_pages(
    keys, sequence, head, page, exists, newest, newest_key, start, table, table_stride, s0, s1, s2, s3,
    heads, stride_block, stride_head, stride_token, pages_each,
    SCORE: tl.constexpr, S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGES: tl.constexpr,
    UNROLL: tl.constexpr, PER_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Statistics of the pages `page` [PAGES] of a sequence, where `exists`; tokens before `start` are left out.

    `pages_each` is the number of pages of a sequence in the buffers, or of a block (then also PER_BLOCK).
    Token `newest` (-1: none) is `newest_key` [D_PAD] instead of what the cache holds. Moments are those of the distance
    to the first token of the page: one pass, and no cancellation against a large mean.
    """
    d = tl.arange(0, D_PAD)
    block, place = locate(page, sequence, table, table_stride, exists, PER_BLOCK)
    source = keys + block * stride_block + head * stride_head + place * S * stride_token
    skipped = tl.minimum(tl.maximum(start - page * S, 0), S)  # padding
    cached = exists & (skipped < S) & (page * S + skipped != newest)
    first_key = source + skipped * stride_token
    origin = tl.load(first_key[:, None] + d, mask=cached[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    origin = tl.where((page * S + skipped == newest)[:, None], newest_key[None, :], origin)
    first = tl.zeros((PAGES, D_PAD), tl.float32)  # sum, or lowest
    second = tl.zeros((PAGES, D_PAD), tl.float32)  # sum of squares, or highest
    if SCORE == "quest":
        first += float("inf")
        second -= float("inf")
    for begin in range(0, S, UNROLL):
        slot = begin + tl.arange(0, UNROLL)
        valid = exists[:, None] & (slot[None, :] >= skipped[:, None])
        is_newest = (page[:, None] * S + slot[None, :] == newest)[:, :, None]
        own = source[:, None, None] + slot[None, :, None] * stride_token + d[None, None, :]
        mask = valid[:, :, None] & ~is_newest & (d < D)[None, None, :]
        x = tl.load(own, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(is_newest, newest_key[None, None, :], x)
        if SCORE == "quest":
            first = tl.minimum(first, tl.min(tl.where(valid[:, :, None], x, float("inf")), axis=1))
            second = tl.maximum(second, tl.max(tl.where(valid[:, :, None], x, -float("inf")), axis=1))
        else:
            x = tl.where(valid[:, :, None], x - origin[:, None, :], 0.0)
            first += tl.sum(x, axis=1)
            second += tl.sum(x * x, axis=1)
    if SCORE == "quest":
        first = tl.where((skipped < S)[:, None], first, 0.0)
        second = tl.where((skipped < S)[:, None], second, 0.0)
    else:
        count = tl.maximum(S - skipped, 1).to(tl.float32)[:, None]
        first /= count
        second = tl.maximum(second / count - first * first, 0.0)  # variance
        first += origin
    place += (block * heads + head) * pages_each
    columns = d[None, :]
    _store(s0, s1, place, first, columns, exists, D, LARGEST)
    if SCORE == "unique":
        std = tl.sqrt(tl.sum(second, axis=1))
        if LARGEST > 0:
            tl.store(s2 + place, std.to(s2.dtype.element_ty), mask=exists)
        else:
            tl.store(s1 + place, std.to(s1.dtype.element_ty), mask=exists)
    elif SCORE != "mean":
        if LARGEST > 0:
            _store(s2, s3, place, second, columns, exists, D, LARGEST)
        else:
            _store(s1, s1, place, second, columns, exists, D, LARGEST)


@triton.jit
def _bulk(
    keys, starts, table, table_stride, s0, s1, s2, s3, first_page, last_page,
    heads, stride_block, stride_head, stride_token, pages_each,
    SCORE: tl.constexpr, S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGES: tl.constexpr,
    PER_BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    sequence, head = row // heads, row % heads
    page = first_page + tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + sequence)
    _write_pages(
        keys, sequence, head, page, page < last_page, -1, tl.zeros((D_PAD,), tl.float32), start, table, table_stride,
        s0, s1, s2, s3, heads, stride_block, stride_head, stride_token, pages_each,
        SCORE, S, D, D_PAD, PAGES, UNROLL, PER_BLOCK, LARGEST,
    )  # fmt: skip


@triton.jit
def store_token(
    key, value, keys, values, table, table_stride, sequence, head, length, key_row, key_head, value_row, value_head,
    stride_block, stride_head, stride_token, D: tl.constexpr, D_PAD: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the newest token of a row into the cache; returns its key as stored, float32 [D_PAD]."""
    d = tl.arange(0, D_PAD)
    new_key = tl.load(key + sequence * key_row + head * key_head + d, mask=d < D, other=0.0)
    new_value = tl.load(value + sequence * value_row + head * value_head + d, mask=d < D, other=0.0)
    written = (d < D) & (length > 0)
    block, place = locate(length - 1, sequence, table, table_stride, length > 0, PER_BLOCK)
    target = block * stride_block + head * stride_head + place * stride_token
    tl.store(keys + target + d, new_key, mask=written)
    tl.store(values + target + d, new_value, mask=written)
    return new_key.to(keys.dtype.element_ty).to(tl.float32)


@triton.jit
def complete_pages(
    new_key, keys, table, table_stride, s0, s1, s2, s3, u0, u1, u2, u3, sequence, head, start, length, heads,
    stride_block, stride_head, stride_token, block_tokens,
    SCORE: tl.constexpr, S: tl.constexpr, SUPER: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PER_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write the statistics of the page and of the super-page that the newest token of a row completes.

    S, SUPER: tokens of a page and of a super-page, 0 where there are none.
    """
    one = tl.arange(0, 1)
    if S > 0:  # noqa: SIM102 (compiled or not, then at run time)
        if (length > 0) & (length % S == 0):
            _write_pages(
                keys, sequence, head, length // S - 1 + one, one == 0, length - 1, new_key, start, table, table_stride,
                s0, s1, s2, s3, heads, stride_block, stride_head, stride_token, block_tokens // S,
                SCORE, S, D, D_PAD, 1, min(S, 8192 // D_PAD), PER_BLOCK // S, LARGEST,
            )  # fmt: skip
    if SUPER > 0:  # noqa: SIM102
        if (length > 0) & (length % SUPER == 0):
            _write_pages(
                keys, sequence, head, length // SUPER - 1 + one, one == 0, length - 1, new_key, start, table,
                table_stride, u0, u1, u2, u3, heads, stride_block, stride_head, stride_token, block_tokens // SUPER,
                SCORE, SUPER, D, D_PAD, 1, min(SUPER, 8192 // D_PAD), PER_BLOCK // SUPER, LARGEST,
            )  # fmt: skip


@triton.jit
def _append(
    key, value, keys, values, lengths, starts, table, table_stride, s0, s1, s2, s3, u0, u1, u2, u3,
    heads, key_row, key_head, value_row, value_head, stride_block, stride_head, stride_token, block_tokens,
    SCORE: tl.constexpr, S: tl.constexpr, SUPER: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PER_BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // heads, row % heads
    length = tl.load(lengths + sequence).to(tl.int32)
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + sequence).to(tl.int32)
    new_key = store_token(
        key, value, keys, values, table, table_stride, sequence, head, length, key_row, key_head, value_row, value_head,
        stride_block, stride_head, stride_token, D, D_PAD, PER_BLOCK,
    )  # fmt: skip
    complete_pages(
        new_key, keys, table, table_stride, s0, s1, s2, s3, u0, u1, u2, u3, sequence, head, start, length, heads,
        stride_block, stride_head, stride_token, block_tokens, SCORE, S, SUPER, D, D_PAD, PER_BLOCK, LARGEST,
    )  # fmt: skip


def find_page_size(keys: Tensor, statistics: Sequence[Tensor]) -> int:
    """Return the tokens of a page, 0 without statistics; for keys [B, K, N, D]."""
    return keys.shape[2] // statistics[0].shape[2] if statistics else 0


def pad_to_four(buffers: Sequence[Tensor], other: Tensor) -> list[Tensor]:
    """Return four buffers for a kernel's arguments, `other` in the place of those that the score does not have.

    Raises:
        ValueError: a buffer is not contiguous.
    """
    if not all(buffer.is_contiguous() for buffer in buffers):
        raise ValueError("page statistics must be contiguous")
    return [*buffers, other, other, other, other][:4]


@launch_on_its_device
def write_page_statistics(
    keys: Tensor,
    statistics: Sequence[Tensor],
    first_page: int,
    last_page: int,
    score: str,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Write the statistics of many complete pages, as after a prefill.

    The plain PyTorch twin is `unique_asr.attention.reference.page_statistics`.

    Args:
        keys: [B, K, N, D].
        statistics: buffers to write into, as at the top of this file.
        first_page: the first page to write; last_page: one past the last.
        score: unique, mean, quest or second_moment.
        starts: int [B], tokens before starts[b] are padding and left out; a page without any token gets zeros.
        block_table: int32 [B, blocks], as in `paging.py`; None: tokens lie by position.

    Raises:
        ValueError: a buffer is not contiguous.
    """
    if last_page <= first_page:
        return
    heads, block_tokens, dim = keys.shape[1:]
    size = find_page_size(keys, statistics)
    sequences = len(keys) if block_table is None else len(block_table)
    pages_each = block_tokens // size
    table, table_stride = make_table_arguments(block_table, keys)
    grid = (triton.cdiv(last_page - first_page, PAGES), sequences * heads)
    _bulk[grid](
        keys, keys if starts is None else starts, table, table_stride, *pad_to_four(statistics, keys), first_page,
        last_page, heads, *keys.stride()[:3], pages_each,
        score, size, dim, triton.next_power_of_2(dim), PAGES,
        0 if block_table is None else pages_each, starts is not None, LARGEST.get(statistics[0].dtype, 0.0),
    )  # fmt: skip


@launch_on_its_device
def append(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    statistics: Sequence[Tensor],
    lengths: Tensor,
    score: str,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    super_statistics: Sequence[Tensor] = (),
) -> None:
    """Write one token a sequence into the cache, and the statistics of a page that it completes, in one launch.

    The statistics of a page still being written are never read, and stay as they are. Running it again changes nothing.
    The plain PyTorch twin is `unique_asr.attention.paged_layer.PagedLayer.write_token`.

    Args:
        key: [B, K, 1, D]; value: [B, K, 1, D].
        keys: [B, K, N, D]; values: [B, K, N, D], with the strides of `keys`.
        statistics: of the pages, as at the top of this file; () for a dense layer.
        lengths: int [B] on the device, the tokens of each sequence with the new one; 0 leaves a sequence out.
        score: unique, mean, quest or second_moment.
        starts: int [B], the padding on the left, in tokens; None: no padding.
        block_table: int32 [B, blocks], as in `paging.py`; None: tokens lie by position.
        super_statistics: of the super-pages; () if there are none.

    Raises:
        ValueError: shapes or strides of keys and values differ, or a buffer is not contiguous.
    """
    if keys.stride() != values.stride() or keys.shape != values.shape:
        raise ValueError("keys and values must have the same shape and strides")
    sequences, heads, _, dim = key.shape
    block_tokens = keys.shape[2]
    size, super_size = find_page_size(keys, statistics), find_page_size(keys, super_statistics)
    table, table_stride = make_table_arguments(block_table, keys)
    _append[(sequences * heads,)](
        key, value, keys, values, lengths, keys if starts is None else starts, table, table_stride,
        *pad_to_four(statistics, keys), *pad_to_four(super_statistics, keys),
        heads, *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], block_tokens,
        score, size, super_size, dim, triton.next_power_of_2(dim),
        0 if block_table is None else block_tokens, starts is not None,
        LARGEST.get(statistics[0].dtype, 0.0) if statistics else 0.0,
    )  # fmt: skip
