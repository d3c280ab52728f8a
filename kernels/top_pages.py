"""The k best pages of every row: exact, deterministic, no sort.

A row lives in the registers of one program. Its k-th greatest score is found bit by bit, on integers that have the
order of the scores: each round counts the scores from a candidate on, and the search ends as soon as k are left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PAGES = 32768  # of a row: 32 registers a thread in the largest program


@triton.jit
def sortable(scores):
    """float32 -> uint32 of the same order, both zeros alike; -inf becomes 0, which is never chosen."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    ordered = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)
    return tl.where(scores == -float("inf"), 0, ordered)


@triton.jit
def choose(keys, COUNT: tl.constexpr):
    """The COUNT greatest of uint32 keys [P], of equal ones the first: a mask, the rank by position, and how many."""
    threshold = tl.full((), 0, tl.uint32)
    reached = tl.sum((keys > 0).to(tl.int32))  # keys from the threshold on
    bit = tl.full((), 1 << 31, tl.uint32)
    while (bit != 0) & (reached > COUNT):
        candidate = threshold | bit
        above = tl.sum((keys >= candidate).to(tl.int32))
        enough = above >= COUNT
        threshold = tl.where(enough, candidate, threshold)
        reached = tl.where(enough, above, reached)
        bit = bit >> 1
    above = keys > threshold
    equal = (keys == threshold) & (keys > 0)
    wanted = COUNT - tl.sum(above.to(tl.int32))  # of the equal ones
    both = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    before = tl.cumsum(both) - both
    equal_before = before & 0xFFFF
    chosen = above | (equal & (equal_before < wanted))
    rank = (before >> 16) + tl.minimum(equal_before, wanted)
    return chosen, rank, tl.minimum(reached, COUNT)


@triton.jit
def store_chosen(out, pages, keys, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr):
    """Write the COUNT of `pages` [P] with the greatest keys to `out`, in order, then -1."""
    chosen, rank, total = choose(keys, COUNT)
    tl.store(out + rank, pages, mask=chosen)
    rest = tl.arange(0, COUNT_PAD)
    tl.store(out + rest, -1, mask=(rest >= total) & (rest < COUNT))


@triton.jit
def _top_pages(scores, out, pages, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr, PAGES_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    page = tl.arange(0, PAGES_PAD)
    score = tl.load(scores + row * pages + page, mask=page < pages, other=-float("inf"))
    store_chosen(out + row * COUNT, page, sortable(score), COUNT, COUNT_PAD)


def top_pages(scores: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """The `count` best pages of float32 scores [..., P], in ascending order: int32 [..., count].

    Of equal scores the earlier page wins. Pages of score -inf are never chosen: where too few others are left, the
    entries at the end are -1.
    """
    pages = scores.shape[-1]
    if pages > MAX_PAGES:
        raise ValueError(f"{pages} pages a row: top_pages takes at most {MAX_PAGES}; use larger pages or two levels")
    scores = scores.contiguous()
    if out is None:
        out = torch.empty(*scores.shape[:-1], count, dtype=torch.int32, device=scores.device)
    pages_pad = triton.next_power_of_2(pages)
    warps = min(32, max(4, pages_pad // 512))
    grid = (scores.numel() // pages,)
    _top_pages[grid](scores, out, pages, count, triton.next_power_of_2(count), pages_pad, num_warps=warps)
    return out
