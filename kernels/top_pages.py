"""The k best pages of every row: exact, deterministic, no sort.

A row lives in the registers of one program. Its k-th greatest score is searched on integers that have the order of the
scores: each round counts the scores from two candidates on, and the search ends as soon as k are left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device

MAX_PAGES = 32768  # of a row: 32 registers a thread in the largest program
INFINITE = tl.constexpr(0xFF800000)  # the integer of inf, the score of forced pages
GREATEST = tl.constexpr(3.4028234663852886e38)  # float32: the score of a page that overflows, below that of forced ones


@triton.jit
def to_sortable(scores):
    """float32 -> uint32 of the same order, both zeros alike; -inf and NaN become 0, which is never selected."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    ordered = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)
    return tl.where(scores > -float("inf"), ordered, 0)  # NaN is not greater either


@triton.jit
def _count(keys, lower, upper):
    """How many keys reach `lower`, and how many `upper`, in one sum."""
    both = tl.sum(tl.where(keys >= lower, 65536, 0).to(tl.uint32) + (keys >= upper).to(tl.uint32))
    return both >> 16, both & 0xFFFF


@triton.jit
def choose(keys, COUNT: tl.constexpr):
    """The COUNT greatest of uint32 keys [P], of equal ones the first: a mask, the rank by position, and how many.

    The search narrows `low`, which COUNT keys reach, and `high`, which fewer reach, to a third in a round. It begins at
    the least of the maxima of at least COUNT groups of keys, and at the greatest finite score.
    """
    PAGES: tl.constexpr = keys.shape[0]
    GROUPS: tl.constexpr = min(PAGES, triton.next_power_of_2(COUNT))
    peaks = tl.max(tl.reshape(tl.where(keys < INFINITE, keys, 0), (PAGES // GROUPS, GROUPS)), axis=0)
    low = tl.maximum(tl.min(peaks), 1) if GROUPS >= COUNT else tl.full((), 1, tl.uint32)
    high = tl.max(peaks) + 1
    reached, over = _count(keys, 1, INFINITE)  # keys from `low` on, or more; and from `high` on
    forced = over >= COUNT
    low = tl.where(forced, INFINITE, low)
    high = tl.where(forced, 0xFFFFFFFF, high)
    reached = tl.where(forced, over, reached)
    over = tl.where(forced, 0, over)
    while (reached > COUNT) & (high > low + 1):
        step = tl.maximum((high - low) // 3, 1)
        first, second = _count(keys, low + step, low + step + step)
        above = second >= COUNT
        below = first < COUNT
        reached = tl.where(above, second, tl.where(below, reached, first))
        over = tl.where(above, over, tl.where(below, first, second))
        high = tl.where(above, high, tl.where(below, low + step, low + step + step))
        low = tl.where(above, low + step + step, tl.where(below, low, low + step))
    above = keys >= high
    equal = (keys >= low) & (keys < high)
    wanted = COUNT - over.to(tl.int32)  # of the equal ones
    both = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    before = tl.cumsum(both) - both
    equal_before = before & 0xFFFF
    selected = above | (equal & (equal_before < wanted))
    rank = (before >> 16) + tl.minimum(equal_before, wanted)
    return selected & (rank < COUNT), rank, tl.minimum(reached.to(tl.int32), COUNT)


@triton.jit
def store_selected(out, pages, keys, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr):
    """Write the COUNT of `pages` [P] with the greatest keys to `out`, in order, then -1."""
    selected, rank, total = choose(keys, COUNT)
    tl.store(out + rank, pages, mask=selected)
    rest = tl.arange(0, COUNT_PAD)
    tl.store(out + rest, -1, mask=(rest >= total) & (rest < COUNT))


@triton.jit
def _top_pages(scores, out, pages, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr, PAGES_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    page = tl.arange(0, PAGES_PAD)
    score = tl.load(scores + row * pages + page, mask=page < pages, other=-float("inf"))
    store_selected(out + row * COUNT, page, to_sortable(score), COUNT, COUNT_PAD)


@launch_on_its_device
def top_pages(scores: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """Select the `count` best pages of float32 scores [..., P]; of equal scores the earlier page wins.

    The plain PyTorch twin is `unique_asr.attention.reference.top_pages`.

    Returns:
        int32 [..., count], ascending. Pages of score -inf or NaN are never selected: where too few others are left, the
        entries at the end are -1.

    Raises:
        ValueError: a row has more than MAX_PAGES pages.
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
