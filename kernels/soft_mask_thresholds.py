"""Statistics of pages, and for each row the threshold and the spread of its page scores, to which gates are relative.

Scores are computed for a slice of queries at a time, and the threshold of each row is found by bisection.

B batch, K KV heads, G group, N tokens, P pages, S page size, D dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device
from unique_asr.kernels.soft_mask_tiles import load_rows, make_sizes, row_stride

SCRATCH = 1 << 24  # scores of a slice of queries: 64 MB of float32


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
    tl.store(means + place[:, None] * D + d[None, :], mean, mask=(page < pages)[:, None] & (d < D)[None, :])
    tl.store(stds + place, std, mask=page < pages)


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
    token = row0 + tl.arange(0, BM)
    inside = token < tl.minimum(tokens, begin + slice_tokens)
    wanted = tl.load(masked + batch * masked_batch + token, mask=inside, other=0)
    page = tl.program_id(1) * BP + tl.arange(0, BP)
    if tl.max(wanted.to(tl.int32)) > 0:
        mean = load_rows(means + row * pages * D, page * D, page < pages, D, D_PAD)
        std = tl.load(stds + row * pages + page, mask=page < pages, other=0.0)
        r = tl.arange(0, BM * G_PAD)
        real = (row0 + r // G_PAD < tokens) & (r % G_PAD < G)
        offset = (row0 + r // G_PAD).to(tl.int64) * query_token + (r % G_PAD).to(tl.int64) * query_head
        q = load_rows(query + batch * query_batch + head * G * query_head, offset, real, D, D_PAD)
        norm = scale * tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
        near = mean.to(q.dtype)
        score = tl.dot(q, tl.trans(near), input_precision=PRECISION) + norm[:, None] * std[None, :]
        if q.dtype != tl.float32:
            score = tl.dot(q, tl.trans((mean - near).to(q.dtype)), score, input_precision=PRECISION)
        score = tl.where((r % G_PAD < G)[:, None], score, -float("inf"))
        best = tl.max(tl.reshape(score, (BM, G_PAD, BP)), axis=1)
        newest = token // S
        first = tl.load(starts + batch * starts_batch + token, mask=inside, other=0) // S
        forced = (page[None, :] < first[:, None] + SINK) | (page[None, :] > newest[:, None] - RECENT)
        candidate = (page[None, :] >= first[:, None]) & (page[None, :] < newest[:, None])
        best = tl.where(candidate, tl.where(forced, float("inf"), best), -float("inf"))
        out = scores + (row * slice_tokens + token[:, None] - begin) * width + page[None, :]
        tl.store(out, best, mask=inside[:, None] & (page < width)[None, :])


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
        count = tl.sum((score > -float("inf")).to(tl.int32), axis=1)
        more = count > COUNT
        low = tl.min(tl.where(score > -float("inf"), score, float("inf")), axis=1)
        low = tl.where(more, low, 0.0)  # COUNT scores reach it
        high = tl.where(more, tl.max(tl.where(score < float("inf"), score, -float("inf")), axis=1), 0.0)
        high += high - low  # fewer than COUNT reach it
        going = more
        while tl.max(going.to(tl.int32)) > 0:
            middle = 0.5 * low + 0.5 * high
            reach = tl.sum((score >= middle[:, None]).to(tl.int32), axis=1)
            going &= (middle > low) & (middle < high)
            high = tl.where(going & (reach < COUNT), middle, high)
            low = tl.where(going & (reach >= COUNT), middle, low)
            count = tl.where(going & (reach >= COUNT), reach, count)
            going &= count > COUNT
        chosen = tl.min(tl.where(score >= low[:, None], score, float("inf")), axis=1)  # the last one
        following = tl.max(tl.where(score < low[:, None], score, -float("inf")), axis=1)
        following = tl.where(count > COUNT, chosen, following)
        theta = tl.where(more, 0.5 * (chosen + following), theta)
        competing = (score > -float("inf")) & (score < float("inf"))
        number = tl.maximum(tl.sum(competing.to(tl.float32), axis=1), 1.0)
        level = tl.sum(tl.where(competing, score, 0.0), axis=1) / number
        away = tl.where(competing, score - level[:, None], 0.0)
        spread = tl.sqrt(tl.sum(away * away, axis=1) / number)
        sharpness = tl.where(more, inverse_tau / tl.maximum(spread, 1e-19), sharpness)
    tl.store(thetas + row * tokens + begin + place, theta, mask=inside)
    tl.store(sharpnesses + row * tokens + begin + place, sharpness, mask=inside)


@torch.library.custom_op("unique_asr::page_thresholds", mutates_args=())
@launch_on_its_device
def page_thresholds(
    query: Tensor, key: Tensor, starts: Tensor, masked: Tensor, page_size: int, count: int, scale: float, sink: int,
    recent: int, tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the statistics of pages, and theta and the temperature of every row.

    The plain PyTorch twins are `soft_mask.page_statistics` and the first part of `soft_mask.compute_log_gates`.

    Args:
        query: [B, H, N, D]; key: [B, K, N, D].
        starts: int32 [B or 1, N], the first token that each query may see.
        masked: uint8 [B or 1, N], 0 for queries that read everything.
        page_size: tokens of a page.
        count: complete pages that are read beside a query's own.
        scale: lambda; sink: forced first pages; recent: forced last pages, the query's own counted.
        tau: softness, in standard deviations of the scores that compete.

    Returns:
        Means [B, K, P, D] and spreads [B, K, P] of the pages; theta [B, K, N], -inf for dense rows, and 1 / temperature
        [B, K, N] of the rows; all float32.
    """
    batch, heads, tokens, dim = key.shape
    pages = triton.cdiv(tokens, page_size)
    mean = key.new_empty(batch, heads, pages, dim, dtype=torch.float32)
    std = key.new_empty(batch, heads, pages, dtype=torch.float32)
    theta, sharpness = (key.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2))
    shared = make_sizes(query, key, page_size)
    shape = {name: shared[name] for name in ("D", "D_PAD", "S")}
    starts_batch, masked_batch = row_stride(starts), row_stride(masked)
    _page_statistics[(triton.cdiv(pages, 32), batch * heads)](
        key, starts, mean, std, tokens, heads, pages, *key.stride()[:3], starts_batch, **shape, BP=32
    )
    bm = max(1, 64 // shared["G_PAD"])
    step = max(bm, SCRATCH // (batch * heads * pages) // bm * bm)
    scratch = key.new_empty(batch * heads * min(step, tokens) * pages, dtype=torch.float32)
    for begin in range(0, tokens, step):
        size = min(step, tokens - begin)
        width = triton.cdiv(begin + size, page_size)
        _row_scores[(triton.cdiv(size, bm), triton.cdiv(width, 64), batch * heads)](
            query, mean, std, starts, masked, scratch, begin, tokens, heads, pages, width, scale,
            *query.stride()[:3], starts_batch, masked_batch, size, SINK=sink, RECENT=recent, BM=bm, BP=64, **shared,
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
    return key.new_empty(batch, heads, pages, dim, dtype=torch.float32), std, *rows
