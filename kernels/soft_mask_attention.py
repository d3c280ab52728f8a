"""The attention of sparsity-aware training, forward and backward, in the manner of FlashAttention.

What it computes is `unique_asr/attention/soft_mask.py`, for combine=max. A program holds a tile of queries, all heads
of a group together, and goes over tiles of keys. The product with the mean of a page is the mean of the products with
its keys, so that the scores of a tile come from its logits; the maximum over the group and the gate follow in
registers. The backward pass computes all of it again, in a kernel by queries and one by keys. The gradient of log g,
summed over the group and the tokens of a page, goes back to the products of the head that had the maximum, and to the
page's spread. Nothing of the size of queries times keys is ever stored, nor of queries times pages but for the slices
of soft_mask_thresholds.py.

No tile is skipped. With tau 0.5 and Gaussian scores the faintest page has log g about -13, which float32 still counts;
of a hard mask, 64 queries that choose each for itself leave no tile without a chosen page. Deterministic: no atomics.
theta -inf marks a dense row: its gates are open. `starts` never falls along a sequence.

B batch, K KV heads, G group, N tokens, P pages, S page size, D dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device
from unique_asr.kernels.soft_mask_thresholds import page_thresholds
from unique_asr.kernels.soft_mask_tiles import (
    LOG2E,
    compute_gates,
    find_visible,
    load_rows,
    make_sizes,
    order_keys,
    reduce_over_group,
    row_stride,
)


@triton.jit
def _key_tiles(
    starts, row0, tokens,
    S: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys that queries from row0 on see, in whole tiles, and those that each sees through a gate: both [a, b)."""
    first, last = tl.load(starts + row0), tl.load(starts + tl.minimum(row0 + BM, tokens) - 1)
    end = tl.cdiv(tl.minimum(row0 + BM, tokens), BN) * BN
    low = tl.minimum(tl.cdiv(tl.maximum(last, (last // S + SINK) * S), BN) * BN, end)
    high = (row0 // S - RECENT + 1) * S // BN * BN
    return first // BN * BN, end, low, tl.maximum(low, high)


@triton.jit
def _place(at, low, high, EDGE: tl.constexpr):
    """Return the tile at step `at` of a loop over the tiles outside low .. high."""
    if EDGE:
        at += tl.where(at >= low, high - low, 0)
    return at


@triton.jit
def _query_rows(
    query, thetas, sharpnesses, starts, row0, row, heads, tokens, scale,
    query_batch, query_head, query_token, starts_batch,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Queries from row0 on: vectors, norms, thresholds, tokens, first tokens seen, places in [B, H, N] and [B, N, H].

    The last: which are real.
    """
    batch, head = row // heads, row % heads
    m, g = tl.arange(0, BM * G_PAD) // G_PAD, tl.arange(0, BM * G_PAD) % G_PAD
    token = row0 + m
    inside = token < tokens
    real = inside & (g < G)
    query += batch * query_batch + head * G * query_head + tl.cast(row0, tl.int64) * query_token
    q = load_rows(query, m * query_token + g.to(tl.int64) * query_head, real, D, D_PAD)
    norm = scale * tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
    theta = tl.load(thetas + row * tokens + token, mask=inside, other=-float("inf"))
    sharpness = tl.load(sharpnesses + row * tokens + token, mask=inside, other=1.0)
    start = tl.load(starts + batch * starts_batch + token, mask=inside, other=0)
    by_head = (row * G + g) * tokens + token
    by_token = ((batch * tokens + token) * heads + head) * G + g
    return q, norm, theta, sharpness, token, start, by_head, by_token, real


@triton.jit
def _forward(
    query, keys, values, stds, starts, thetas, sharpnesses, out, peaks,
    tokens, heads, pages, scaling, scale, starts_batch,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, and the log-sum-exp (base 2) of every row's logits."""
    ROWS: tl.constexpr = BM * G_PAD
    BN: tl.constexpr = BP * S
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest first
    q, norm, theta, sharpness, token, start, by_head, by_token, real = _query_rows(
        query, thetas, sharpnesses, starts, row0, row, heads, tokens, scale,
        query_batch, query_head, query_token, starts_batch, G, G_PAD, D, D_PAD, BM,
    )  # fmt: skip
    starts += batch * starts_batch
    first, end, low, high = _key_tiles(starts, row0, tokens, S, SINK, RECENT, BM, BN)
    gated = tl.max(theta) > -float("inf")
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    j = order_keys(S, BP)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS, BP), tl.float32)
    result = tl.zeros((ROWS, D_PAD), tl.float32)
    for inner in tl.static_range(2):
        for at in tl.range(low if inner else first, high if inner else end - (high - low), BN, num_stages=STAGES):
            begin = _place(at, low, high, inner == 0)
            far, real_key = tl.cast(begin, tl.int64), begin + j < tokens
            k = load_rows(keys + far * key_token, j * key_token, real_key, D, D_PAD)
            v = load_rows(values + far * value_token, j * value_token, real_key, D, D_PAD)
            page = begin // S + tl.arange(0, BP)
            std = tl.load(stds + row * pages + page, mask=page < pages, other=0.0)
            product = tl.reshape(tl.dot(q, tl.trans(k), input_precision=PRECISION), (ROWS, S, BP))
            gate = tl.zeros((ROWS, BP), tl.float32)
            if gated:
                gate, _ = compute_gates(
                    product, norm, std, theta, sharpness, begin, token, start, inner == 0,
                    G, G_PAD, S, SINK, RECENT, HARD, ROWS, BP,
                )  # fmt: skip
            if inner == 0:
                product = tl.where(find_visible(begin, token, start, S, BP), product, -float("inf"))
            highest = tl.maximum(peak, tl.max(tl.max(product, axis=1) * (scaling * LOG2E) + gate, axis=1))
            base = tl.where(highest > -float("inf"), highest, 0.0)
            weight = tl.exp2(product * (scaling * LOG2E) + (gate - base[:, None])[:, None, :])
            rescale = tl.exp2(peak - base)[:, None]
            total = total * rescale + tl.sum(weight, axis=1)
            weight = tl.reshape(weight.to(v.dtype), (ROWS, BN))
            result = tl.dot(weight, v, result * rescale, input_precision=PRECISION)
            peak = highest
    whole = tl.sum(total, axis=1)
    whole = tl.where(whole > 0, whole, 1.0)
    peak = tl.where(peak > -float("inf"), peak, 0.0) + tl.log2(whole)
    result /= whole[:, None]
    tl.store(peaks + by_head, peak, mask=real)
    d = tl.arange(0, D_PAD)
    into = out + by_token[:, None] * D + d[None, :]
    tl.store(into, result.to(out.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _tile_gradients(
    q, k, do, v, peak, delta, norm, std, theta, sharpness, begin, token, start, scaling, gated, EDGE: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, S: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    HARD: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights [ROWS, BN], the gradient of the products of q and k, and its part through the scores [ROWS, BP]."""
    product = tl.reshape(tl.dot(q, tl.trans(k), input_precision=PRECISION), (ROWS, S, BP))
    gate = tl.zeros((ROWS, BP), tl.float32)
    slope = tl.zeros((ROWS, BP), tl.float32)
    if gated:
        gate, slope = compute_gates(
            product, norm, std, theta, sharpness, begin, token, start, EDGE,
            G, G_PAD, S, SINK, RECENT, HARD, ROWS, BP,
        )  # fmt: skip
    if EDGE:
        product = tl.where(find_visible(begin, token, start, S, BP), product, -float("inf"))
    weight = tl.exp2(product * (scaling * LOG2E) + (gate - peak[:, None])[:, None, :])
    dweight = tl.reshape(tl.dot(do, tl.trans(v), input_precision=PRECISION), (ROWS, S, BP))
    dlogit = weight * (dweight - delta[:, None, None])
    if HARD:
        dscore = slope
        dproduct = dlogit * scaling
    else:
        dscore = reduce_over_group(tl.sum(dlogit, axis=1), False, ROWS, G_PAD, BP) * slope
        dproduct = dlogit * scaling + dscore[:, None, :]
        if EDGE:
            dproduct = tl.where(find_visible(begin, token, start, S, BP), dproduct, 0.0)
    weight = tl.reshape(weight.to(v.dtype), (ROWS, S * BP))
    return weight, tl.reshape(dproduct.to(k.dtype), (ROWS, S * BP)), dscore


@triton.jit
def _backward_queries(
    query, keys, values, stds, starts, thetas, sharpnesses, out, peaks, gradient, deltas, norms, query_gradient,
    tokens, heads, pages, scaling, scale, starts_batch,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries; for the other kernel, norms and deltas, the products of output and its gradient."""
    ROWS: tl.constexpr = BM * G_PAD
    BN: tl.constexpr = BP * S
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    q, norm, theta, sharpness, token, start, by_head, by_token, real = _query_rows(
        query, thetas, sharpnesses, starts, row0, row, heads, tokens, scale,
        query_batch, query_head, query_token, starts_batch, G, G_PAD, D, D_PAD, BM,
    )  # fmt: skip
    starts += batch * starts_batch
    first, end, low, high = _key_tiles(starts, row0, tokens, S, SINK, RECENT, BM, BN)
    gated = tl.max(theta) > -float("inf")
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    j = order_keys(S, BP)
    do = load_rows(gradient, by_token * D, real, D, D_PAD)
    delta = tl.sum(do.to(tl.float32) * load_rows(out, by_token * D, real, D, D_PAD).to(tl.float32), axis=1)
    tl.store(deltas + by_head, delta, mask=real)
    tl.store(norms + by_head, norm, mask=real)
    peak = tl.load(peaks + by_head, mask=real, other=0.0)
    result = tl.zeros((ROWS, D_PAD), tl.float32)
    for inner in tl.static_range(2):
        for at in tl.range(low if inner else first, high if inner else end - (high - low), BN, num_stages=STAGES):
            begin = _place(at, low, high, inner == 0)
            far, real_key = tl.cast(begin, tl.int64), begin + j < tokens
            k = load_rows(keys + far * key_token, j * key_token, real_key, D, D_PAD)
            v = load_rows(values + far * value_token, j * value_token, real_key, D, D_PAD)
            page = begin // S + tl.arange(0, BP)
            std = tl.load(stds + row * pages + page, mask=page < pages, other=0.0)
            _, dproduct, _ = _tile_gradients(
                q, k, do, v, peak, delta, norm, std, theta, sharpness, begin, token, start, scaling, gated, inner == 0,
                G, G_PAD, S, SINK, RECENT, HARD, ROWS, BP, PRECISION,
            )  # fmt: skip
            result = tl.dot(dproduct, k, result, input_precision=PRECISION)
    d = tl.arange(0, D_PAD)
    into = query_gradient + by_token[:, None] * D + d[None, :]
    tl.store(into, result.to(query_gradient.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _backward_keys(
    query, keys, values, stds, starts, thetas, sharpnesses, means, peaks, gradient, deltas, norms, reach, any_gated,
    key_gradient, value_gradient,
    tokens, heads, pages, scaling, starts_batch,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values; that of a page's spread is passed on to the keys of the page at the end."""
    ROWS: tl.constexpr = BM * G_PAD
    BN: tl.constexpr = BP * S
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.program_id(0) * BN
    j = begin + order_keys(S, BP)
    page = begin // S + tl.arange(0, BP)
    place = j.to(tl.int64)
    keys += batch * key_batch + head * key_head
    k = load_rows(keys, place * key_token, j < tokens, D, D_PAD)
    v = load_rows(values + batch * value_batch + head * value_head, place * value_token, j < tokens, D, D_PAD)
    std = tl.load(stds + row * pages + page, mask=page < pages, other=0.0)
    starts += batch * starts_batch
    reach += (tl.where(starts_batch > 0, batch, 0) * tl.num_programs(0) + tl.program_id(0)) * 2
    first, end = begin // BM * BM, tl.cdiv(tl.load(reach), BM) * BM
    low = tl.minimum(tl.cdiv(begin + BN + (RECENT - 1) * S, BM) * BM, end)
    high = tl.maximum(low, tl.load(reach + 1) // BM * BM)
    query += batch * query_batch + head * G * query_head
    m, g = tl.arange(0, ROWS) // G_PAD, tl.arange(0, ROWS) % G_PAD
    query_offset = m * query_token + g.to(tl.int64) * query_head
    gradient_offset = (m * heads * G + g) * D
    dk = tl.zeros((D_PAD, BN), tl.float32)
    dv = tl.zeros((D_PAD, BN), tl.float32)
    dstd = tl.zeros((ROWS, BP), tl.float32)
    for inner in tl.static_range(2):
        for at in tl.range(low if inner else first, high if inner else end - (high - low), BM, num_stages=STAGES):
            row0 = _place(at, low, high, inner == 0)
            token = row0 + m
            inside = token < tokens
            real = inside & (g < G)
            q = load_rows(query + tl.cast(row0, tl.int64) * query_token, query_offset, real, D, D_PAD)
            by_token = ((batch * tokens + row0) * heads + head) * G * D
            do = load_rows(gradient + by_token, gradient_offset, real, D, D_PAD)
            by_head = (row * G + g) * tokens + token
            peak = tl.load(peaks + by_head, mask=real, other=0.0)
            delta = tl.load(deltas + by_head, mask=real, other=0.0)
            norm = tl.load(norms + by_head, mask=real, other=0.0)
            theta = tl.load(thetas + row * tokens + token, mask=inside, other=-float("inf"))
            sharpness = tl.load(sharpnesses + row * tokens + token, mask=inside, other=1.0)
            gated = tl.load(any_gated + row * tl.cdiv(tokens, BM) + row0 // BM) != 0
            start = tl.zeros((ROWS,), tl.int32)
            if inner == 0:
                start = tl.load(starts + token, mask=inside, other=0)
            weight, dproduct, dscore = _tile_gradients(
                q, k, do, v, peak, delta, norm, std, theta, sharpness, begin, token, start, scaling, gated, inner == 0,
                G, G_PAD, S, SINK, RECENT, HARD, ROWS, BP, PRECISION,
            )  # fmt: skip
            dv = tl.dot(tl.trans(do), weight, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(q), dproduct, dk, input_precision=PRECISION)
            dstd += dscore * norm[:, None]
    dk = tl.trans(dk)
    if not HARD:  # d std / d k = (k - mean) / (n std); 1 / n is in dscore
        steep = tl.where(std > 0, tl.sum(dstd, axis=0) / tl.where(std > 0, std, 1.0), 0.0)
        steep = tl.reshape(tl.broadcast_to(steep[None, :], (S, BP)), (BN,))
        last = tl.minimum(j // S * S + S - 1, tokens - 1)
        own = tl.load(starts + j, mask=j < tokens, other=-1) == tl.load(starts + last)
        k = load_rows(keys, place * key_token, j < tokens, D, D_PAD)
        mean = load_rows(means + row * pages * D, j // S * D, j < tokens, D, D_PAD)
        dk += tl.where(own, steep, 0.0)[:, None] * (k.to(tl.float32) - mean)
    d = tl.arange(0, D_PAD)
    into = ((batch * tokens + place) * heads + head)[:, None] * D + d[None, :]
    real = (j < tokens)[:, None] & (d < D)[None, :]
    tl.store(key_gradient + into, dk.to(key_gradient.dtype.element_ty), mask=real)
    tl.store(value_gradient + into, tl.trans(dv).to(value_gradient.dtype.element_ty), mask=real)


# Launches


PAGE_BYTES = 4096  # of the keys of a page: more do not fit


class Tiles(NamedTuple):
    """How one kernel cuts its work: rows (tokens times heads) and keys of a tile, warps, pipeline stages, registers.

    A warp of the tensor cores takes 16 rows: with more warps than that, some would repeat the work of others.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 255


class MaskTiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    backward_queries: Tiles
    backward_keys: Tiles


def mask_tiles(vector_bytes: int) -> MaskTiles:
    """Choose tiles for keys of `vector_bytes` that fit in the registers and the shared memory of an H100."""
    if vector_bytes <= 128:
        return MaskTiles(Tiles(64, 64, 4, 3, 168), Tiles(64, 64, 4, 3, 168), Tiles(64, 64, 4, 2))
    if vector_bytes <= 256:
        return MaskTiles(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2))
    return MaskTiles(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))


def _vector_bytes(key: Tensor) -> int:
    return max(16, triton.next_power_of_2(key.shape[-1])) * key.element_size()


def _constants(
    tiles: Tiles, query: Tensor, key: Tensor, page_size: int, sink: int, recent: int, hard: bool
) -> dict[str, int | str]:
    shared = make_sizes(query, key, page_size)
    return shared | {
        "SINK": sink, "RECENT": recent, "HARD": hard,
        "BM": max(1, tiles.rows // shared["G_PAD"]), "BP": tiles.keys // page_size,
        "STAGES": tiles.stages, "num_warps": tiles.warps, "maxnreg": tiles.registers,
    }  # fmt: skip


def supports(key: Tensor, combine: str, page_size: int) -> bool:
    """Whether these kernels can run for such keys [B, K, N, D] and settings; `soft_mask.attention` always can."""
    known = combine == "max" and page_size in (8, 16) and key.dtype != torch.float64
    return known and _vector_bytes(key) * page_size <= PAGE_BYTES


@torch.library.custom_op("unique_asr::soft_mask_attention", mutates_args=())
@launch_on_its_device
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mean: Tensor, std: Tensor, theta: Tensor, sharpness: Tensor,
    starts: Tensor, scaling: float, page_size: int, scale: float, sink: int, recent: int, hard: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend through gates; arguments as in `training_attention` and `page_thresholds`.

    Returns:
        The output [B, N, H, D], and the log-sum-exp [B, H, N] (base 2) for the backward pass.
    """
    batch, query_heads, tokens, dim = query.shape
    heads = key.shape[1]
    out = query.new_empty(batch, tokens, query_heads, dim)
    peaks = query.new_empty(batch, query_heads, tokens, dtype=torch.float32)
    constants = _constants(mask_tiles(_vector_bytes(key)).forward, query, key, page_size, sink, recent, hard)
    _forward[(triton.cdiv(tokens, constants["BM"]), batch * heads)](
        query, key, value, std, starts, theta, sharpness, out, peaks,
        tokens, heads, mean.shape[2], scaling, scale, row_stride(starts),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], **constants,
    )  # fmt: skip
    return out, peaks


@masked_attention.register_fake
def _(query, key, value, mean, std, theta, sharpness, starts, scaling, page_size, scale, sink, recent, hard):
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim), query.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("unique_asr::soft_mask_attention_backward", mutates_args=())
@launch_on_its_device
def masked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mean: Tensor, std: Tensor, theta: Tensor,
    sharpness: Tensor, starts: Tensor, out: Tensor, peaks: Tensor, scaling: float, page_size: int, scale: float,
    sink: int, recent: int, hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of query, key and value from that of the output [B, N, H, D]."""
    batch, _, tokens, _ = query.shape
    heads = key.shape[1]
    gradient = gradient.contiguous()
    into = [each.new_empty(batch, tokens, each.shape[1], each.shape[3]) for each in (query, key, value)]
    deltas, norms = torch.empty_like(peaks), torch.empty_like(peaks)
    tiles = mask_tiles(_vector_bytes(key))
    strides = row_stride(starts), *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]
    rows = query, key, value, std, starts, theta, sharpness

    constants = _constants(tiles.backward_queries, query, key, page_size, sink, recent, hard)
    _backward_queries[(triton.cdiv(tokens, constants["BM"]), batch * heads)](
        *rows, out, peaks, gradient, deltas, norms, into[0], tokens, heads, mean.shape[2], scaling, scale, *strides,
        **constants,
    )  # fmt: skip

    constants = _constants(tiles.backward_keys, query, key, page_size, sink, recent, hard)
    size, bm = tiles.backward_keys.keys, constants["BM"]
    begins = torch.arange(0, tokens, size, dtype=torch.int32, device=key.device)
    inner = torch.maximum(starts, (starts // page_size + sink) * page_size)
    # for each tile of keys: the queries before these see some of it; see all of it, and through a gate
    reach = [
        torch.searchsorted(bounds, each.expand(len(starts), -1).contiguous(), right=True, out_int32=True)
        for bounds, each in ((starts, begins + (size - 1)), (inner, begins))
    ]
    reach = torch.stack(reach, -1)
    any_gated = F.pad(theta, (0, -tokens % bm), value=-torch.inf).unflatten(-1, (-1, bm)).amax(-1) > -torch.inf
    _backward_keys[(len(begins), batch * heads)](
        *rows, mean, peaks, gradient, deltas, norms, reach, any_gated, into[1], into[2],
        tokens, heads, mean.shape[2], scaling, *strides, **constants,
    )  # fmt: skip
    return tuple(each.transpose(1, 2) for each in into)


@masked_attention_backward.register_fake
def _(gradient, query, key, value, *rest):
    shapes = [(each.shape[0], each.shape[2], each.shape[1], each.shape[3]) for each in (query, key, value)]
    return tuple(query.new_empty(shape).transpose(1, 2) for shape in shapes)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.numbers = inputs[8:]


def _backward(ctx, gradient, _):
    gradients = masked_attention_backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    return *gradients, *[None] * 11


masked_attention.register_autograd(_backward, setup_context=_setup)


def training_attention(query, key, value, config, starts=None, masked=None, scaling=None) -> Tensor:
    """Attend to whole sequences through the page mask of training, for combine=max; differentiable.

    The plain PyTorch twin is `unique_asr.attention.soft_mask.attention`.

    Args:
        query: [B, H, N, D]; key: [B, K, N, D]; value: [B, K, N, D]; the last stride should be 1.
        config: a `TrainingAttentionConfig`.
        starts: int [B, N], the first token that each query may see, never falling along a sequence; None: one document
            a row.
        masked: bool [B or 1, N], the queries that decoding would run sparsely; None: all.
        scaling: of the attention logits; None: 1 / sqrt(D).

    Returns:
        [B, N, H, D].
    """
    sparse, tokens = config.sparse, query.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    if starts is None:
        starts = torch.zeros(1, tokens, dtype=torch.int32, device=query.device)
    starts = starts.to(torch.int32).contiguous()
    if not config.masks or tokens <= sparse.budget:
        masked = torch.zeros(1, tokens, dtype=torch.uint8, device=query.device)
    elif masked is None:
        masked = torch.ones(1, tokens, dtype=torch.uint8, device=query.device)
    masked = masked.to(torch.uint8).contiguous()
    scale = sparse.scale if sparse.score == "unique" else 0.0
    forced = sparse.sink_pages, sparse.recent_pages
    count = 1 if sparse.pages is None else sparse.pages - 1
    with torch.no_grad():
        rows = page_thresholds(query, key, starts, masked, sparse.page_size, count, scale, *forced, config.tau)
    rest = starts, scaling, sparse.page_size, scale, *forced, config.mode == "hard"
    return masked_attention(query, key, value, *rows, *rest)[0]
