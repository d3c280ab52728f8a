"""Tiles of queries and keys, and the gates of their pages: what the kernels of sparsity-aware training share.

A tile of queries is BM tokens times the G_PAD heads of a group: row m * G_PAD + g. A tile of keys is BP
pages with the tokens of a page outermost: column s * BP + p. The tensor cores leave columns that are equal modulo 8
in one thread, so that summing over the tokens of a page, and spreading a gate over them, move nothing.

Tiles at the edges, where some row does not see all of the keys, or reads some of the pages without a gate, come first,
in a loop of their own (EDGE), so that the others need no masks.

B batch, K KV heads, G group, N tokens, P pages, S page size, D dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def log2(x):
    """Compute log2 by one instruction; `tl.log2` is a polynomial of 20. The interpreter knows no libdevice."""
    return tl.log2(x) if INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def load_rows(base, offset, real, D: tl.constexpr, D_PAD: tl.constexpr):
    """Load the vectors [rows, D_PAD] at base + offset, zeros where not `real`."""
    d = tl.arange(0, D_PAD)
    return tl.load(base + offset[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def reduce_over_group(values, MAX: tl.constexpr, ROWS: tl.constexpr, G_PAD: tl.constexpr, BP: tl.constexpr):
    """Take the maximum or the sum over the heads of a group, and give it to each of them: [ROWS, BP]."""
    if G_PAD == 1:
        return values
    parts = tl.reshape(values, (ROWS // G_PAD, G_PAD, BP))
    whole = tl.max(parts, axis=1) if MAX else tl.sum(parts, axis=1)
    return tl.reshape(tl.broadcast_to(whole[:, None, :], (ROWS // G_PAD, G_PAD, BP)), (ROWS, BP))


@triton.jit
def order_keys(S: tl.constexpr, BP: tl.constexpr):
    """Return the tokens of a tile of keys in its order, counted from its first."""
    c = tl.arange(0, S * BP)
    return c % BP * S + c // BP


@triton.jit
def find_visible(begin, token, start, S: tl.constexpr, BP: tl.constexpr):
    """Tell which keys [ROWS, S, BP] each row sees."""
    j = begin + tl.arange(0, BP)[None, None, :] * S + tl.arange(0, S)[None, :, None]
    return (j <= token[:, None, None]) & (j >= start[:, None, None])


@triton.jit
def compute_gates(
    product, norm, std, theta, sharpness, begin, token, start, EDGE: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, S: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    HARD: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute log2 g [ROWS, BP], and the derivative of log g by the products [ROWS, S, BP] of queries and keys."""
    share = tl.full((ROWS, BP), 1 / S, tl.float32)
    level = tl.sum(product, axis=1) * share
    page = begin // S + tl.arange(0, BP)
    if EDGE:
        seen = find_visible(begin, token, start, S, BP)
        share = 1.0 / tl.maximum(tl.sum(seen.to(tl.float32), axis=1), 1.0)
        level = tl.sum(tl.where(seen, product, 0.0), axis=1) * share
    score = level + norm[:, None] * std[None, :]
    if G < G_PAD:
        score = tl.where((tl.arange(0, ROWS) % G_PAD < G)[:, None], score, -float("inf"))
    best = reduce_over_group(score, True, ROWS, G_PAD, BP)
    away = best - theta[:, None]
    if HARD:
        gate = tl.where(away >= 0, 0.0, -float("inf"))
        slope = tl.zeros_like(gate)
    else:
        gate = -log2(1.0 + tl.exp2(tl.minimum(away * (sharpness * -LOG2E)[:, None], 126.0)))
        slope = (1.0 - tl.exp2(gate)) * sharpness[:, None] * share
        if G > 1:
            winner = (score == best).to(tl.float32)
            slope *= winner * tl.exp2(-log2(reduce_over_group(winner, False, ROWS, G_PAD, BP)))
    if EDGE:
        gated = (page[None, :] >= (start // S + SINK)[:, None]) & (page[None, :] <= (token // S - RECENT)[:, None])
        gate = tl.where(gated, gate, 0.0)
        slope = tl.where(gated, slope, 0.0)
    return gate, slope


def make_sizes(query: Tensor, key: Tensor, page_size: int) -> dict[str, int | str]:
    """Return the compile-time sizes that all kernels of training share."""
    dim, group = query.shape[-1], query.shape[1] // key.shape[1]
    return {
        "G": group, "G_PAD": triton.next_power_of_2(group), "D": dim, "D_PAD": max(16, triton.next_power_of_2(dim)),
        "S": page_size, "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def row_stride(rows: Tensor) -> int:
    """Return the stride from one sequence to the next in [B, N], or 0 where all share one row."""
    return 0 if len(rows) == 1 else rows.stride(0)
