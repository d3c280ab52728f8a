"""The attention of sparsity-aware training, forward and backward, in the manner of FlashAttention.

What it computes is `unique_asr/attention/soft_mask.py`, for combine=max. A program holds a tile of queries, all heads
of a group together, and goes over tiles of keys: the scores of the pages of a tile are a product with their means, the
maximum over the group and the gate follow in registers, and log g is spread over the tokens of each page. The backward
pass computes all of it again; the gradient of log g, summed over the group and the tokens of a page, goes back through
the score to the query whose head had the maximum and to the page's mean and spread, and from there to its keys. Nothing
of the size of queries times keys is ever stored, nor of queries times pages but for the slices of `_row_scores`.

Rows are ordered token by token with the heads of a group beside each other: row m * G_PAD + g. theta -inf marks a dense
row: its gates are open. Deterministic: no atomics. B batch, K KV heads, G group, N tokens, P pages, S page size, D dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.top_pages import sortable

SCRATCH = 1 << 24  # scores of a slice of queries: 64 MB of float32
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _page_statistics(
    keys, starts, means, stds,
    tokens, heads, pages, key_batch, key_head, key_token, starts_batch,
    D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Mean and spread of BP pages of one KV head, over the document of each page's last token."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    page = tl.program_id(0) * BP + tl.arange(0, BP)
    d = tl.arange(0, D_PAD)
    last = tl.minimum(page * S + S - 1, tokens - 1)
    document = tl.load(starts + batch * starts_batch + last)
    base = keys + batch * key_batch + head * key_head + d[None, :]
    count = tl.zeros((BP,), tl.float32)
    total = tl.zeros((BP, D_PAD), tl.float32)
    for slot in range(S):
        token = page * S + slot
        inside = token < tokens
        own = inside & (tl.load(starts + batch * starts_batch + token, mask=inside, other=-1) == document)
        x = tl.load(base + token[:, None].to(tl.int64) * key_token, mask=own[:, None] & (d < D)[None, :], other=0.0)
        total += x.to(tl.float32)
        count += own.to(tl.float32)
    mean = total / tl.maximum(count, 1.0)[:, None]
    square = tl.zeros((BP,), tl.float32)
    for slot in range(S):
        token = page * S + slot
        inside = token < tokens
        own = inside & (tl.load(starts + batch * starts_batch + token, mask=inside, other=-1) == document)
        real = own[:, None] & (d < D)[None, :]
        x = tl.load(base + token[:, None].to(tl.int64) * key_token, mask=real, other=0.0).to(tl.float32)
        x = tl.where(real, x - mean, 0.0)
        square += tl.sum(x * x, axis=1)
    std = tl.sqrt(square / tl.maximum(count, 1.0))
    place = row * pages + page
    tl.store(
        means + place[:, None] * D + d[None, :], mean.to(means.dtype.element_ty),
        mask=(page < pages)[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(stds + place, std, mask=page < pages)


@triton.jit
def _query_tile(
    query, row0, query_batch, query_head, query_token, batch, head, tokens, scale,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Queries [BM * G_PAD, D_PAD] of the tile at token row0, scale * norm of each, their offsets and which are real."""
    r = tl.arange(0, BM * G_PAD)
    d = tl.arange(0, D_PAD)
    token, g = row0 + r // G_PAD, r % G_PAD
    real = (token < tokens) & (g < G)
    offset = batch * query_batch + (head * G + g).to(tl.int64) * query_head + token.to(tl.int64) * query_token
    q = tl.load(query + offset[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    wide = q.to(tl.float32)
    return q, scale * tl.sqrt(tl.sum(wide * wide, axis=1)), real


@triton.jit
def _group_scores(
    q, norm, mean, std,
    G: tl.constexpr, G_PAD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BM, G_PAD, BP] of each head, and the best of the group [BM, BP]."""
    score = tl.dot(q, tl.trans(mean), input_precision=PRECISION) + norm[:, None] * std[None, :]
    score = tl.reshape(score, (BM, G_PAD, BP))
    if G < G_PAD:
        score = tl.where((tl.arange(0, G_PAD) < G)[None, :, None], score, -float("inf"))
    return score, tl.max(score, axis=1)


@triton.jit
def _gates(
    best, theta, sharpness, newest, first, page,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """log g [BM, BP] and its slope by the score."""
    is_open = (page[None, :] < first[:, None] + SINK) | (page[None, :] > newest[:, None] - RECENT)
    x = (best - theta[:, None]) * sharpness[:, None]
    is_open |= x == float("inf")
    if HARD:
        gate = tl.where(is_open | (x >= 0), 0.0, -float("inf"))
        slope = tl.zeros_like(x)
    else:
        x = tl.where(is_open, 0.0, x)
        small = tl.exp(-tl.abs(x))
        gate = tl.where(is_open, 0.0, tl.minimum(x, 0.0) - tl.log(1.0 + small))
        slope = tl.where(is_open, 0.0, sharpness[:, None] * tl.where(x > 0, small, 1.0) / (1.0 + small))
    return gate, slope


@triton.jit
def _spread(
    values, G_PAD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """[BM, BP] -> [BM * G_PAD, BP * S]: for every head of the group and every token of a page."""
    return tl.reshape(tl.broadcast_to(values[:, None, :, None], (BM, G_PAD, BP, S)), (BM * G_PAD, BP * S))


@triton.jit
def _score_gradient(
    gradient, slope, score, best,
    G_PAD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Gradient [BM * G_PAD, BP] of each head's scores from that of the logits [BM * G_PAD, BP * S]."""
    gate = tl.sum(tl.sum(tl.reshape(gradient, (BM, G_PAD, BP, S)), axis=3), axis=1)  # [BM, BP]
    winner = (score == best[:, None, :]).to(tl.float32)
    share = gate * slope / tl.sum(winner, axis=1)
    return tl.reshape(winner * share[:, None, :], (BM * G_PAD, BP))


@triton.jit
def _row_scores(
    query, means, stds, starts, masked, scores,
    begin, tokens, heads, pages, width, scale,
    query_batch, query_head, query_token, starts_batch, masked_batch, slice_tokens,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [B K, slice, width] of queries from `begin` on: inf for forced pages, -inf for what is no candidate."""
    row = tl.program_id(2).to(tl.int64)
    batch, head = row // heads, row % heads
    row0 = begin + tl.program_id(0) * BM
    m, d = tl.arange(0, BM), tl.arange(0, D_PAD)
    token = row0 + m
    inside = token < tl.minimum(tokens, begin + slice_tokens)
    wanted = tl.load(masked + batch * masked_batch + token, mask=inside, other=0)
    page = tl.program_id(1) * BP + tl.arange(0, BP)
    if tl.max(wanted.to(tl.int32)) > 0:
        place = row * pages + page
        have = page < pages
        mean = tl.load(means + place[:, None] * D + d[None, :], mask=have[:, None] & (d < D)[None, :], other=0.0)
        std = tl.load(stds + place, mask=have, other=0.0)
        q, norm, _ = _query_tile(
            query, row0, query_batch, query_head, query_token, batch, head, tokens, scale, G, G_PAD, D, D_PAD, BM
        )
        _, best = _group_scores(q, norm, mean, std, G, G_PAD, BM, BP, PRECISION)
        newest = token // S
        first = tl.load(starts + batch * starts_batch + token, mask=inside, other=0) // S
        forced = (page[None, :] < first[:, None] + SINK) | (page[None, :] > newest[:, None] - RECENT)
        candidate = (page[None, :] >= first[:, None]) & (page[None, :] < newest[:, None])
        best = tl.where(candidate, tl.where(forced, float("inf"), best), -float("inf"))
        out = scores + (row * slice_tokens + token[:, None] - begin) * width + page[None, :]
        tl.store(out, best, mask=inside[:, None] & (page < width)[None, :])


@triton.jit
def _from_sortable(key):
    """The inverse of `sortable`, of uint32 above 0."""
    bits = key ^ tl.where(key >> 31 != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _row_thresholds(
    scores, masked, thetas, sharpnesses,
    begin, tokens, heads, width, masked_batch, slice_tokens, inverse_tau,
    COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """theta and 1 / temperature of ROWS rows; COUNT complete pages are read beside a query's own."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < slice_tokens
    wanted = tl.load(masked + row // heads * masked_batch + begin + place, mask=inside, other=0) != 0
    theta = tl.full((ROWS,), -float("inf"), tl.float32)
    sharpness = tl.full((ROWS,), 1.0, tl.float32)
    if tl.max(wanted.to(tl.int32)) > 0:
        page = tl.arange(0, WIDTH_PAD)
        score = tl.load(
            scores + (row * slice_tokens + place[:, None]) * width + page[None, :],
            mask=wanted[:, None] & (page < width)[None, :], other=-float("inf"),
        )  # fmt: skip
        keys = sortable(score)
        last = tl.zeros((ROWS,), tl.uint32)  # the greatest number that COUNT scores reach: the last one chosen
        bit = tl.full((), 1 << 31, tl.uint32)
        while bit != 0:
            trial = last | bit
            last = tl.where(tl.sum((keys >= trial[:, None]).to(tl.int32), axis=1) >= COUNT, trial, last)
            bit = bit >> 1
        reached = tl.sum((keys >= last[:, None]).to(tl.int32), axis=1)
        below = tl.max(tl.where(keys < last[:, None], keys, 0).to(tl.int64), axis=1).to(tl.uint32)
        following = tl.where(reached > COUNT, last, below)
        more = tl.sum((keys > 0).to(tl.int32), axis=1) > COUNT
        theta = tl.where(more, 0.5 * (_from_sortable(last) + _from_sortable(following)), theta)
        competing = (score > -float("inf")) & (score < float("inf"))
        number = tl.maximum(tl.sum(competing.to(tl.float32), axis=1), 1.0)
        level = tl.sum(tl.where(competing, score, 0.0), axis=1) / number
        away = tl.where(competing, score - level[:, None], 0.0)
        spread = tl.sqrt(tl.sum(away * away, axis=1) / number)
        sharpness = tl.where(more, inverse_tau / tl.maximum(spread, 1e-19), sharpness)
    tl.store(thetas + row * tokens + begin + place, theta, mask=inside)
    tl.store(sharpnesses + row * tokens + begin + place, sharpness, mask=inside)


@triton.jit
def _key_tile(
    keys, values, means, stds, begin, batch, head, row, tokens, pages,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Keys, values [BP * S, D_PAD], means [BP, D_PAD] and spreads [BP] of the pages from token `begin` on."""
    token, d = begin + tl.arange(0, BP * S), tl.arange(0, D_PAD)
    real = (token < tokens)[:, None] & (d < D)[None, :]
    place = token[:, None].to(tl.int64)
    k = tl.load(keys + batch * key_batch + head * key_head + place * key_token + d[None, :], mask=real, other=0.0)
    v = tl.load(
        values + batch * value_batch + head * value_head + place * value_token + d[None, :], mask=real, other=0.0
    )
    page = begin // S + tl.arange(0, BP)
    entry = row * pages + page
    have = page < pages
    mean = tl.load(means + entry[:, None] * D + d[None, :], mask=have[:, None] & (d < D)[None, :], other=0.0)
    return k, v, mean, tl.load(stds + entry, mask=have, other=0.0)


@triton.jit
def _forward(
    query, keys, values, means, stds, starts, thetas, sharpnesses, out, peaks,
    tokens, heads, pages, scaling, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    out_batch, out_head, out_token, starts_batch,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, and the log-sum-exp (base 2) of every row's logits."""
    ROWS: tl.constexpr = BM * G_PAD
    BN: tl.constexpr = BP * S
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest first
    m, d = row0 + tl.arange(0, BM), tl.arange(0, D_PAD)
    r = tl.arange(0, ROWS)
    inside = m < tokens
    theta = tl.load(thetas + row * tokens + m, mask=inside, other=-float("inf"))
    sharpness = tl.load(sharpnesses + row * tokens + m, mask=inside, other=1.0)
    start = tl.load(starts + batch * starts_batch + m, mask=inside, other=tokens)
    token, g = row0 + r // G_PAD, r % G_PAD
    start_row = tl.load(starts + batch * starts_batch + token, mask=token < tokens, other=0)
    q, norm, real = _query_tile(
        query, row0, query_batch, query_head, query_token, batch, head, tokens, scale, G, G_PAD, D, D_PAD, BM
    )
    gated = tl.max(theta) > -float("inf")
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, D_PAD), tl.float32)
    for begin in range(tl.min(start) // BN * BN, tl.minimum(row0 + BM, tokens), BN):
        k, v, mean, std = _key_tile(
            keys, values, means, stds, begin, batch, head, row, tokens, pages,
            key_batch, key_head, key_token, value_batch, value_head, value_token, D, D_PAD, S, BP,
        )  # fmt: skip
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scaling * LOG2E)
        if gated:
            page = begin // S + tl.arange(0, BP)
            _, best = _group_scores(q, norm, mean, std, G, G_PAD, BM, BP, PRECISION)
            gate, _ = _gates(best, theta, sharpness, m // S, start // S, page, SINK, RECENT, HARD)
            logit += _spread(gate * LOG2E, G_PAD, BM, BP, S)
        j = begin + tl.arange(0, BN)
        seen = (j[None, :] <= token[:, None]) & (j[None, :] >= start_row[:, None])
        logit = tl.where(seen, logit, -float("inf"))
        highest = tl.maximum(peak, tl.max(logit, axis=1))
        base = tl.where(highest > -float("inf"), highest, 0.0)
        weight = tl.exp2(logit - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(weight, axis=1)
        result = result * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        peak = highest
    total = tl.where(total > 0, total, 1.0)
    peak = tl.where(peak > -float("inf"), peak, 0.0) + tl.log2(total)
    result /= total[:, None]
    offset = batch * out_batch + (head * G + g).to(tl.int64) * out_head + token.to(tl.int64) * out_token
    tl.store(out + offset[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])
    tl.store(peaks + (row * G + g) * tokens + token, peak, mask=real)


@triton.jit
def _backward_queries(
    query, keys, values, means, stds, starts, thetas, sharpnesses, out, peaks, gradient, deltas, query_gradient,
    tokens, heads, pages, scaling, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    out_batch, out_head, out_token, gradient_batch, gradient_head, gradient_token,
    into_batch, into_head, into_token, starts_batch,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, and delta, the product of output and its gradient, for the other kernel."""
    ROWS: tl.constexpr = BM * G_PAD
    BN: tl.constexpr = BP * S
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    m, d = row0 + tl.arange(0, BM), tl.arange(0, D_PAD)
    r = tl.arange(0, ROWS)
    inside = m < tokens
    theta = tl.load(thetas + row * tokens + m, mask=inside, other=-float("inf"))
    sharpness = tl.load(sharpnesses + row * tokens + m, mask=inside, other=1.0)
    start = tl.load(starts + batch * starts_batch + m, mask=inside, other=tokens)
    token, g = row0 + r // G_PAD, r % G_PAD
    start_row = tl.load(starts + batch * starts_batch + token, mask=token < tokens, other=0)
    q, norm, real = _query_tile(
        query, row0, query_batch, query_head, query_token, batch, head, tokens, scale, G, G_PAD, D, D_PAD, BM
    )
    mask = real[:, None] & (d < D)[None, :]
    place, h = token.to(tl.int64), (head * G + g).to(tl.int64)
    offset = batch * gradient_batch + h * gradient_head + place * gradient_token
    do = tl.load(gradient + offset[:, None] + d[None, :], mask=mask, other=0.0)
    offset = batch * out_batch + h * out_head + place * out_token
    o = tl.load(out + offset[:, None] + d[None, :], mask=mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    entry = (row * G + g) * tokens + token
    tl.store(deltas + entry, delta, mask=real)
    peak = tl.load(peaks + entry, mask=real, other=0.0)
    gated = tl.max(theta) > -float("inf")
    result = tl.zeros((ROWS, D_PAD), tl.float32)
    for begin in range(tl.min(start) // BN * BN, tl.minimum(row0 + BM, tokens), BN):
        k, v, mean, std = _key_tile(
            keys, values, means, stds, begin, batch, head, row, tokens, pages,
            key_batch, key_head, key_token, value_batch, value_head, value_token, D, D_PAD, S, BP,
        )  # fmt: skip
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scaling * LOG2E)
        j = begin + tl.arange(0, BN)
        seen = (j[None, :] <= token[:, None]) & (j[None, :] >= start_row[:, None]) & real[:, None]
        weight_gradient = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        if gated:
            page = begin // S + tl.arange(0, BP)
            score, best = _group_scores(q, norm, mean, std, G, G_PAD, BM, BP, PRECISION)
            gate, slope = _gates(best, theta, sharpness, m // S, start // S, page, SINK, RECENT, HARD)
            logit += _spread(gate * LOG2E, G_PAD, BM, BP, S)
            dz = tl.where(seen, tl.exp2(logit - peak[:, None]), 0.0) * weight_gradient
            if not HARD:
                ds = _score_gradient(dz, slope, score, best, G_PAD, BM, BP, S)
                result += tl.dot(ds.to(mean.dtype), mean, input_precision=PRECISION)
        else:
            dz = tl.where(seen, tl.exp2(logit - peak[:, None]), 0.0) * weight_gradient
        result += tl.dot(dz.to(k.dtype), k, input_precision=PRECISION) * scaling
    offset = batch * into_batch + h * into_head + place * into_token
    tl.store(query_gradient + offset[:, None] + d[None, :], result.to(query_gradient.dtype.element_ty), mask=mask)


@triton.jit
def _backward_keys(
    query, keys, values, means, stds, starts, thetas, sharpnesses, peaks, gradient, deltas,
    key_gradient, value_gradient,
    tokens, heads, pages, scaling, scale,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    gradient_batch, gradient_head, gradient_token,
    into_key_batch, into_key_head, into_key_token, into_value_batch, into_value_head, into_value_token, starts_batch,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, S: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, HARD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values; that of the page statistics is passed on to the keys of the page at the end."""
    ROWS: tl.constexpr = BM * G_PAD
    BN: tl.constexpr = BP * S
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.program_id(0) * BN
    j, d = begin + tl.arange(0, BN), tl.arange(0, D_PAD)
    k, v, mean, std = _key_tile(
        keys, values, means, stds, begin, batch, head, row, tokens, pages,
        key_batch, key_head, key_token, value_batch, value_head, value_token, D, D_PAD, S, BP,
    )  # fmt: skip
    page = begin // S + tl.arange(0, BP)
    r = tl.arange(0, ROWS)
    dk = tl.zeros((BN, D_PAD), tl.float32)
    dv = tl.zeros((BN, D_PAD), tl.float32)
    dmean = tl.zeros((BP, D_PAD), tl.float32)
    dstd = tl.zeros((BP,), tl.float32)
    for row0 in range(begin // BM * BM, tokens, BM):
        m = row0 + tl.arange(0, BM)
        inside = m < tokens
        start = tl.load(starts + batch * starts_batch + m, mask=inside, other=tokens)
        if tl.min(start) < begin + BN:
            theta = tl.load(thetas + row * tokens + m, mask=inside, other=-float("inf"))
            token, g = row0 + r // G_PAD, r % G_PAD
            start_row = tl.load(starts + batch * starts_batch + token, mask=token < tokens, other=0)
            q, norm, real = _query_tile(
                query, row0, query_batch, query_head, query_token, batch, head, tokens, scale, G, G_PAD, D, D_PAD, BM
            )
            offset = batch * gradient_batch + (head * G + g).to(tl.int64) * gradient_head
            offset += token.to(tl.int64) * gradient_token
            do = tl.load(gradient + offset[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
            entry = (row * G + g) * tokens + token
            peak = tl.load(peaks + entry, mask=real, other=0.0)
            delta = tl.load(deltas + entry, mask=real, other=0.0)
            logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scaling * LOG2E)
            seen = (j[None, :] <= token[:, None]) & (j[None, :] >= start_row[:, None]) & real[:, None]
            weight_gradient = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            if tl.max(theta) > -float("inf"):
                sharpness = tl.load(sharpnesses + row * tokens + m, mask=inside, other=1.0)
                score, best = _group_scores(q, norm, mean, std, G, G_PAD, BM, BP, PRECISION)
                gate, slope = _gates(best, theta, sharpness, m // S, start // S, page, SINK, RECENT, HARD)
                logit += _spread(gate * LOG2E, G_PAD, BM, BP, S)
                weight = tl.where(seen, tl.exp2(logit - peak[:, None]), 0.0)
                dz = weight * weight_gradient
                if not HARD:
                    ds = _score_gradient(dz, slope, score, best, G_PAD, BM, BP, S)
                    dmean += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
                    dstd += tl.sum(ds * norm[:, None], axis=0)
            else:
                weight = tl.where(seen, tl.exp2(logit - peak[:, None]), 0.0)
                dz = weight * weight_gradient
            dv += tl.dot(tl.trans(weight.to(do.dtype)), do, input_precision=PRECISION)
            dk += tl.dot(tl.trans(dz.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scaling
    document = tl.load(starts + batch * starts_batch + j, mask=j < tokens, other=-1)
    last = tl.minimum(j // S * S + S - 1, tokens - 1)
    own = (document == tl.load(starts + batch * starts_batch + last, mask=j < tokens, other=-2)).to(tl.float32)
    count = tl.maximum(tl.sum(tl.reshape(own, (BP, S)), axis=1), 1.0)
    # d mean / d k = 1 / n; d std / d k = (k - mean) / (n std)
    steep = tl.where(std > 0, dstd / tl.where(std > 0, std, 1.0), 0.0) / count
    level = dmean / count[:, None] - steep[:, None] * mean.to(tl.float32)
    level = tl.reshape(tl.broadcast_to(level[:, None, :], (BP, S, D_PAD)), (BN, D_PAD))
    steep = tl.reshape(tl.broadcast_to(steep[:, None], (BP, S)), (BN,))
    dk += own[:, None] * (level + steep[:, None] * k.to(tl.float32))
    real = (j < tokens)[:, None] & (d < D)[None, :]
    place = j[:, None].to(tl.int64)
    into = key_gradient + batch * into_key_batch + head * into_key_head + place * into_key_token + d[None, :]
    tl.store(into, dk.to(key_gradient.dtype.element_ty), mask=real)
    into = value_gradient + batch * into_value_batch + head * into_value_head + place * into_value_token + d[None, :]
    tl.store(into, dv.to(value_gradient.dtype.element_ty), mask=real)


# Launches


def _sizes(query: Tensor, key: Tensor, page_size: int) -> dict[str, int | str]:
    """The compile-time sizes that all kernels share."""
    dim, group = query.shape[-1], query.shape[1] // key.shape[1]
    return {
        "G": group, "G_PAD": triton.next_power_of_2(group), "D": dim, "D_PAD": max(16, triton.next_power_of_2(dim)),
        "S": page_size, "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _tile(query: Tensor, key: Tensor, rows: int) -> int:
    """Tokens of a tile of queries that has about `rows` rows."""
    return max(1, rows // triton.next_power_of_2(query.shape[1] // key.shape[1]))


PAGES = 16  # of a tile of keys: the least that a product over pages takes
PAGE_BYTES = 4096  # of the keys of a page: more do not fit


class MaskTiles(NamedTuple):
    """Rows of a tile of queries (tokens times heads) in each kernel, and warps of a program."""

    forward: int
    backward_queries: int
    backward_keys: int
    warps: int = 8


def mask_tiles(page_bytes: int, page_size: int) -> MaskTiles:
    """Sizes that fit in the shared memory of an H100."""
    warps = 8 if page_size == 8 else 16
    if page_bytes <= PAGE_BYTES // 2:
        return MaskTiles(128, 64, 64, warps)
    return MaskTiles(64, 64 if page_bytes < PAGE_BYTES or page_size > 8 else 32, 32, warps)


def _page_bytes(key: Tensor, page_size: int) -> int:
    return max(16, triton.next_power_of_2(key.shape[-1])) * key.element_size() * page_size


def supports(key: Tensor, combine: str, page_size: int) -> bool:
    """Whether these kernels do this; if not, `soft_mask.attention` does."""
    known = combine == "max" and page_size in (8, 16) and key.dtype != torch.float64
    return known and _page_bytes(key, page_size) <= PAGE_BYTES


@torch.library.custom_op("unique_asr::page_thresholds", mutates_args=())
def page_thresholds(
    query: Tensor, key: Tensor, starts: Tensor, masked: Tensor, page_size: int, count: int, scale: float, sink: int,
    recent: int, tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Means [B, K, P, D] and spreads [B, K, P] of the pages; theta and 1 / temperature [B, K, N] of the rows.

    `count` complete pages are read beside a query's own. `starts` int32 and `masked` uint8 are [B or 1, N].
    """
    batch, heads, tokens, dim = key.shape
    pages = triton.cdiv(tokens, page_size)
    mean = key.new_empty(batch, heads, pages, dim)
    std = key.new_empty(batch, heads, pages, dtype=torch.float32)
    theta, sharpness = (key.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2))
    sizes = _sizes(query, key, page_size)
    shape = {name: sizes[name] for name in ("D", "D_PAD", "S")}
    starts_batch, masked_batch = _row_stride(starts), _row_stride(masked)
    _page_statistics[(triton.cdiv(pages, 32), batch * heads)](
        key, starts, mean, std, tokens, heads, pages, *key.stride()[:3], starts_batch, **shape, BP=32
    )
    bm = _tile(query, key, 64)
    step = max(bm, SCRATCH // (batch * heads * pages) // bm * bm)
    scratch = key.new_empty(batch * heads * min(step, tokens) * pages, dtype=torch.float32)
    for begin in range(0, tokens, step):
        size = min(step, tokens - begin)
        width = triton.cdiv(begin + size, page_size)
        _row_scores[(triton.cdiv(size, bm), triton.cdiv(width, 64), batch * heads)](
            query, mean, std, starts, masked, scratch, begin, tokens, heads, pages, width, scale,
            *query.stride()[:3], starts_batch, masked_batch, size, SINK=sink, RECENT=recent, BM=bm, BP=64, **sizes,
        )  # fmt: skip
        padded = triton.next_power_of_2(width)
        together = max(1, 2048 // padded)
        _row_thresholds[(triton.cdiv(size, together), batch * heads)](
            scratch, masked, theta, sharpness, begin, tokens, heads, width, masked_batch, size, 1 / tau,
            COUNT=count, ROWS=together, WIDTH_PAD=padded, num_warps=min(16, max(4, padded // 512)),
        )  # fmt: skip
    return mean, std, theta, sharpness


@page_thresholds.register_fake
def _(query, key, starts, masked, page_size, count, scale, sink, recent, tau):
    batch, heads, tokens, dim = key.shape
    pages = -(-tokens // page_size)
    rows = [key.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2)]
    std = key.new_empty(batch, heads, pages, dtype=torch.float32)
    return key.new_empty(batch, heads, pages, dim), std, *rows


@torch.library.custom_op("unique_asr::soft_mask_attention", mutates_args=())
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mean: Tensor, std: Tensor, theta: Tensor, sharpness: Tensor,
    starts: Tensor, scaling: float, page_size: int, scale: float, sink: int, recent: int, hard: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, N, H, D], and the log-sum-exp [B, H, N] (base 2) for the backward pass."""
    batch, query_heads, tokens, dim = query.shape
    heads = key.shape[1]
    out = query.new_empty(batch, tokens, query_heads, dim)
    peaks = query.new_empty(batch, query_heads, tokens, dtype=torch.float32)
    tiles = mask_tiles(_page_bytes(key, page_size), page_size)
    bm = _tile(query, key, tiles.forward)
    _forward[(triton.cdiv(tokens, bm), batch * heads)](
        query, key, value, mean, std, starts, theta, sharpness, out, peaks,
        tokens, heads, mean.shape[2], scaling, scale, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        out.stride(0), out.stride(2), out.stride(1), _row_stride(starts),
        SINK=sink, RECENT=recent, HARD=hard, BM=bm, BP=PAGES, num_warps=tiles.warps,
        num_stages=2 if tiles.forward == 128 else 1,
        **_sizes(query, key, page_size),
    )  # fmt: skip
    return out, peaks


@masked_attention.register_fake
def _(query, key, value, mean, std, theta, sharpness, starts, scaling, page_size, scale, sink, recent, hard):
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim), query.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("unique_asr::soft_mask_attention_backward", mutates_args=())
def masked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mean: Tensor, std: Tensor, theta: Tensor,
    sharpness: Tensor, starts: Tensor, out: Tensor, peaks: Tensor, scaling: float, page_size: int, scale: float,
    sink: int, recent: int, hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value from that of the output [B, N, H, D]."""
    batch, _, tokens, _ = query.shape
    heads = key.shape[1]
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    into = [torch.empty_like(each) for each in (query, key, value)]
    deltas = torch.empty_like(peaks)
    tiles = mask_tiles(_page_bytes(key, page_size), page_size)
    bm = _tile(query, key, tiles.backward_queries)
    sizes = _sizes(query, key, page_size) | {
        "SINK": sink, "RECENT": recent, "HARD": hard, "BP": PAGES, "num_warps": tiles.warps, "num_stages": 1,
    }  # fmt: skip
    numbers = tokens, heads, mean.shape[2], scaling, scale
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]
    outer = [(each.stride(0), each.stride(2), each.stride(1)) for each in (out, gradient)]
    last = _row_stride(starts)
    rows = query, key, value, mean, std, starts, theta, sharpness
    _backward_queries[(triton.cdiv(tokens, bm), batch * heads)](
        *rows, out, peaks, gradient, deltas, into[0], *numbers, *strides, *outer[0], *outer[1],
        *into[0].stride()[:3], last, BM=bm, **sizes,
    )  # fmt: skip
    _backward_keys[(triton.cdiv(tokens, PAGES * page_size), batch * heads)](
        *rows, peaks, gradient, deltas, into[1], into[2], *numbers, *strides, *outer[1],
        *into[1].stride()[:3], *into[2].stride()[:3], last, BM=_tile(query, key, tiles.backward_keys), **sizes,
    )  # fmt: skip
    return into[0], into[1], into[2]


@masked_attention_backward.register_fake
def _(gradient, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.numbers = inputs[8:]


def _backward(ctx, gradient, _):
    gradients = masked_attention_backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    return *gradients, *[None] * 11


masked_attention.register_autograd(_backward, setup_context=_setup)


def _row_stride(rows: Tensor) -> int:
    """From one sequence to the next in [B, N], or 0 where all share one."""
    return 0 if len(rows) == 1 else rows.stride(0)


def training_attention(query, key, value, config, starts=None, masked=None, scaling=None) -> Tensor:
    """`soft_mask.attention` for combine=max; the output is [B, N, H, D].

    query [B, H, N, D], key and value [B, K, N, D]: any strides, the last 1. starts int [B, N], masked bool [B or 1, N].
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
