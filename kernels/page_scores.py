"""Scores of all pages for the query of one decode step, and the choice of the best, in one launch.

`query` [B, H, D]; `statistics` and `block_table` as in `page_statistics.py`; `lengths` (int [B], on the device) counts
the tokens of each sequence, the newest included. The page of the newest token is read in any case and never scored.
The first `sink` pages (of those that hold a token; `starts` (int [B]) is the padding on the left, in tokens) and the
last `recent` pages, the newest one counted, are forced: their score is inf. Shapes depend on the capacity alone and
nothing waits for the host, so that a step can be captured in a CUDA graph; run it once before: that allocates counters.

A program scores a tile of pages for all heads of a group at once. The last program of a row to finish does what needs
the whole row: the softmax over pages of `share`, and the choice of the best pages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device
from unique_asr.kernels.page_statistics import LARGEST, pad_to_four
from unique_asr.kernels.paging import get_counters, is_last, locate, make_table_arguments
from unique_asr.kernels.top_pages import GREATEST, store_selected, to_sortable, top_pages

FUSED_PAGES = 8192  # of a row: up to here the last program of a row chooses, beyond it a launch of its own


class ScoreTile(NamedTuple):
    """How the work is cut: pages of a tile, tiles of a program, warps of a program, stages of its pipeline."""

    pages: int
    tiles: int = 1
    warps: int = 4
    stages: int = 1


def score_tile(rows: int, pages: int, head_dim: int, warps: int = 4) -> ScoreTile:
    """Choose a tile: 16 pages a warp, streamed three deep, but fewer tiles a program where the GPU would be idle."""
    size = warps * (16 if head_dim <= 128 else 8)
    tiles = 8
    while tiles > 1 and rows * triton.cdiv(pages, size * tiles) < 264:
        tiles //= 2
    return ScoreTile(size, tiles, warps, stages=3)


@triton.jit
def _power_below(x):
    """The power of two at or below each positive float32 (0 for 0), and the one that its product with is 1."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _product(
    query, unit, values, scales, place, read, d,
    D: tl.constexpr, QUANTIZED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products [pages, G] of statistics at `place` [pages] with query [G, D] in units of `unit` [G]."""
    x = tl.load(values + place[:, None] * D + d[None, :], mask=read[:, None] & (d < D)[None, :], other=0.0)
    product = tl.dot(x.to(OPERAND), tl.trans(query.to(OPERAND)), input_precision=PRECISION) * unit[None, :]
    if QUANTIZED:
        product *= tl.load(scales + place, mask=read, other=0.0).to(tl.float32)[:, None]
    return product


@triton.jit
def _locate_candidates(
    position, within, candidates, supers, first, newest,
    UNIT: tl.constexpr, PER_SUPER: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Page of each position among the candidates, whether it may be selected, and whether it must be.

    `first` and `newest` are pages of the sequence's first and newest token; a candidate is UNIT of these pages.
    """
    newest_candidate = newest // UNIT
    page = position
    exists = position < candidates
    if PER_SUPER > 1:
        index = position // PER_SUPER
        above = tl.load(within + index, mask=index < supers, other=-1, cache_modifier=".cg")
        above = tl.where(index == supers, newest_candidate // PER_SUPER, above)
        exists &= above >= 0
        page = above * PER_SUPER + position % PER_SUPER
    eligible = exists & (page >= first // UNIT) & (page < newest_candidate)
    forced = page * UNIT + UNIT - 1 > newest - RECENT
    if SINK > 0:
        forced |= (page * UNIT < first + SINK) & (page * UNIT + UNIT > first)
    return page, eligible, forced


@triton.jit
def load_query(
    query, sequence, head, query_row, query_head,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The queries of a group, float32 [G_PAD, D_PAD], in units of a power of two for each, and these units."""
    d = tl.arange(0, D_PAD)
    g = tl.arange(0, G_PAD)
    own = query + sequence * query_row + (head * G + g[:, None]) * query_head + d[None, :]
    q = tl.load(own, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    unit, inverse = _power_below(tl.max(tl.abs(q), axis=1))  # exact, and nothing leaves the range of 16 bits
    return q * inverse[:, None], unit


@triton.jit
def score_part(
    q, unit, s0, s1, s2, s3, table, within, head_scores, peaks, sums, scores, sequence, head, part, first, newest,
    scale, scaling, heads, table_stride, pages_each, candidates, supers,
    SCORE: tl.constexpr, SHARE: tl.constexpr, UNIT: tl.constexpr, PER_SUPER: tl.constexpr, SINK: tl.constexpr,
    RECENT: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PER_BLOCK: tl.constexpr, QUANTIZED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the PART candidates of this part of a row; the pointers from `within` to `scores` are of this row."""
    d = tl.arange(0, D_PAD)
    g = tl.arange(0, G_PAD)
    power = scale * unit * tl.sqrt(tl.sum(q * q, axis=1))  # of the spread
    if SCORE == "second_moment":
        power = scale * unit * unit
    peak = tl.full((G_PAD,), -float("inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    end = tl.minimum((part + 1) * PART, candidates)
    for tile in tl.range(0, tl.cdiv(PART, BLOCK), num_stages=STAGES):
        position = part * PART + tile * BLOCK + tl.arange(0, BLOCK)
        mine = position < end
        page, eligible, forced = _locate_candidates(
            position, within, candidates, supers, first, newest, UNIT, PER_SUPER, SINK, RECENT
        )
        eligible &= mine
        block, place = locate(page, sequence, table, table_stride, eligible, PER_BLOCK)
        place += (block * heads + head) * pages_each
        if SCORE == "quest":
            if QUANTIZED:
                score = _product(tl.maximum(q, 0.0), unit, s2, s3, place, eligible, d, D, QUANTIZED, OPERAND, PRECISION)
            else:
                score = _product(tl.maximum(q, 0.0), unit, s1, s1, place, eligible, d, D, QUANTIZED, OPERAND, PRECISION)
            score += _product(tl.minimum(q, 0.0), unit, s0, s1, place, eligible, d, D, QUANTIZED, OPERAND, PRECISION)
        else:
            score = _product(q, unit, s0, s1, place, eligible, d, D, QUANTIZED, OPERAND, PRECISION)
        spread = s1
        spread_scale = s1
        if QUANTIZED:
            spread = s2
            spread_scale = s3
        if SCORE == "unique":
            score += power[None, :] * tl.load(spread + place, mask=eligible, other=0.0).to(tl.float32)[:, None]
        elif SCORE == "second_moment":
            score += _product(q * q, power, spread, spread_scale, place, eligible, d, D, QUANTIZED, OPERAND, PRECISION)

        if SHARE:
            score *= scaling * 1.4426950408889634  # in units of log 2
            score = tl.where(eligible[:, None] & (g < G)[None, :] & (score == score), score, -float("inf"))  # not NaN
            score = tl.minimum(score, GREATEST)
            target = head_scores + g[None, :] * candidates + position[:, None]
            tl.store(target, score, mask=(g < G)[None, :] & mine[:, None])
            highest = tl.maximum(peak, tl.max(score, axis=0))
            base = tl.where(highest > -float("inf"), highest, 0.0)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(score - base[None, :]), axis=0)
            peak = highest
        else:
            best = tl.max(tl.where((g < G)[None, :] & (score == score), score, -float("inf")), axis=1)  # not NaN
            best = tl.where(forced, float("inf"), tl.minimum(best, GREATEST))
            best = tl.where(eligible, best, -float("inf"))
            tl.store(scores + position, best, mask=mine)
    if SHARE:
        tl.store(peaks + part * G_PAD + g, peak)
        tl.store(sums + part * G_PAD + g, total)


@triton.jit
def choose_pages(
    within, head_scores, peaks, sums, scores, selected, first, newest, candidates, supers,
    SHARE: tl.constexpr, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr, CANDIDATES_PAD: tl.constexpr,
    UNIT: tl.constexpr, PER_SUPER: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, G: tl.constexpr,
    G_PAD: tl.constexpr, PROGRAMS: tl.constexpr, PROGRAMS_PAD: tl.constexpr,
):  # fmt: skip
    """What needs all scores of a row: the softmax of `share`, and its COUNT best pages if COUNT > 0."""
    if SHARE:
        _share(
            head_scores, peaks, sums, scores, within, candidates, supers, first, newest,
            UNIT, PER_SUPER, SINK, RECENT, G, G_PAD, PROGRAMS, PROGRAMS_PAD,
        )  # fmt: skip
        tl.debug_barrier()
    if COUNT > 0:
        position = tl.arange(0, CANDIDATES_PAD)
        page, eligible, _ = _locate_candidates(
            position, within, candidates, supers, first, newest, UNIT, PER_SUPER, SINK, RECENT
        )
        score = tl.load(scores + position, mask=eligible, other=-float("inf"), cache_modifier=".cg")
        store_selected(selected, page, to_sortable(score), COUNT, COUNT_PAD)


@triton.jit
def _share(
    head_scores, peaks, sums, scores, within, candidates, supers, first, newest,
    UNIT: tl.constexpr, PER_SUPER: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, G: tl.constexpr,
    G_PAD: tl.constexpr, PROGRAMS: tl.constexpr, PROGRAMS_PAD: tl.constexpr,
):  # fmt: skip
    """Scores of one row: the mean over heads of each head's softmax over pages, from the parts of its programs."""
    HEADS: tl.constexpr = triton.next_power_of_2(G)
    TILE: tl.constexpr = 4096 // HEADS
    g = tl.arange(0, HEADS)
    part = tl.arange(0, PROGRAMS_PAD)
    mask = (part < PROGRAMS)[:, None] & (g < G)[None, :]
    own = part[:, None] * G_PAD + g[None, :]
    peak_parts = tl.load(peaks + own, mask=mask, other=-float("inf"), cache_modifier=".cg")
    total_parts = tl.load(sums + own, mask=mask, other=0.0, cache_modifier=".cg")
    peak = tl.max(peak_parts, axis=0)
    peak = tl.where(peak > -float("inf"), peak, 0.0)
    total = tl.sum(total_parts * tl.exp2(peak_parts - peak[None, :]), axis=0)
    weight = 1.0 / (G * tl.where(total > 0, total, 1.0))
    for begin in range(0, candidates, TILE):
        position = begin + tl.arange(0, TILE)
        _, eligible, forced = _locate_candidates(
            position, within, candidates, supers, first, newest, UNIT, PER_SUPER, SINK, RECENT
        )
        score = tl.load(
            head_scores + g[:, None] * candidates + position[None, :],
            mask=(g < G)[:, None] & eligible[None, :], other=-float("inf"), cache_modifier=".cg",
        )  # fmt: skip
        share = tl.sum(tl.exp2(score - peak[:, None]) * weight[:, None], axis=0)
        share = tl.where(tl.max(score, axis=0) > -float("inf"), share, -float("inf"))  # NaN for every head
        share = tl.where(eligible, tl.where(forced, float("inf"), share), -float("inf"))
        tl.store(scores + position, share, mask=position < candidates)


@triton.jit
def _scores(
    query, s0, s1, s2, s3, lengths, starts, table, within, head_scores, peaks, sums, scores, selected, arrivals,
    scale, scaling, heads, query_row, query_head, table_stride, pages_each, candidates, supers,
    SCORE: tl.constexpr, SHARE: tl.constexpr, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr,
    CANDIDATES_PAD: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, PER_SUPER: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr,
    PROGRAMS_PAD: tl.constexpr, PER_BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr, QUANTIZED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [R, candidates] of the rows, and `selected` [R, COUNT] if COUNT > 0; PROGRAMS programs a row."""
    part = tl.program_id(0) % PROGRAMS
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    sequence, head = row // heads, row % heads
    newest = (tl.load(lengths + sequence).to(tl.int32) - 1) // S
    first = 0
    if HAS_STARTS:
        first = tl.load(starts + sequence).to(tl.int32) // S
    within += row * supers
    head_scores += row * G * candidates
    peaks += row * PROGRAMS * G_PAD
    sums += row * PROGRAMS * G_PAD
    scores += row * candidates
    q, unit = load_query(query, sequence, head, query_row, query_head, G, G_PAD, D, D_PAD)
    score_part(
        q, unit, s0, s1, s2, s3, table, within, head_scores, peaks, sums, scores, sequence, head, part, first, newest,
        scale, scaling, heads, table_stride, pages_each, candidates, supers,
        SCORE, SHARE, UNIT, PER_SUPER, SINK, RECENT, G, G_PAD, D, D_PAD, BLOCK * TILES, BLOCK, STAGES, PER_BLOCK,
        QUANTIZED, OPERAND, PRECISION,
    )  # fmt: skip
    if SHARE or COUNT > 0:  # noqa: SIM102 (compiled or not, then at run time)
        if is_last(arrivals + row, PROGRAMS):
            choose_pages(
                within, head_scores, peaks, sums, scores, selected + row * COUNT, first, newest, candidates, supers,
                SHARE, COUNT, COUNT_PAD, CANDIDATES_PAD, UNIT, PER_SUPER, SINK, RECENT, G, G_PAD, PROGRAMS,
                PROGRAMS_PAD,
            )  # fmt: skip


def choose_dot_types(query: Tensor, statistics: Sequence[Tensor]) -> tuple[tl.dtype, str]:
    """Return the type in which queries and statistics are multiplied, and the precision of float32 products."""
    if query.dtype == torch.float32:
        return tl.float32, "ieee"
    return tl.bfloat16 if statistics[0].dtype == torch.bfloat16 else tl.float16, "tf32"


def resolve_factors(score: str, scale: float, scaling: float | None, dim: int) -> tuple[float, float]:
    """Return the factors that kernels multiply the spread, and the scores of `share`, by."""
    return scale * dim**-0.5 if score == "second_moment" else scale, dim**-0.5 if scaling is None else scaling


def make_share_buffers(
    share: bool, scores: Tensor, rows: int, group: int, programs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Make what `share` keeps beside `scores` [..., P]; without `share`, `scores` takes the place of each.

    Returns:
        Scores of the heads [rows, G, P], and the peak and the sum of each program of a row, [rows, programs, G padded].
    """
    if not share:
        return scores, scores, scores
    peaks, sums = scores.new_empty(2, rows, programs, pad_group(group))
    return scores.new_empty(rows, group, scores.shape[-1]), peaks, sums


def pad_group(group: int) -> int:
    """Return the rows of the matrix that holds the queries of a group: tensor cores take 16 at least."""
    return max(16, triton.next_power_of_2(group))


def _launch(
    query: Tensor,
    statistics: Sequence[Tensor],
    lengths: Tensor,
    score: str,
    scale: float,
    page_size: int,
    combine: str,
    sink: int,
    recent: int,
    starts: Tensor | None,
    block_table: Tensor | None,
    scaling: float | None,
    unit: int,
    tile: ScoreTile | None,
    scores: Tensor | None = None,
    count: int = 0,
    selected: Tensor | None = None,
    within: Tensor | None = None,
    pages_per_super: int = 1,
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel: scores [B, K, candidates], and the pages [B, K, count] selected if count > 0."""
    sequences, query_heads, dim = query.shape
    heads, per_block = statistics[0].shape[1:3]
    rows, group = sequences * heads, query_heads // heads
    candidates = per_block if block_table is None else block_table.shape[1] * per_block
    supers = 0
    if within is not None:
        supers = within.shape[-1]
        candidates = (supers + 1) * pages_per_super
    if scores is None:
        scores = query.new_empty(sequences, heads, candidates, dtype=torch.float32)
    if count and selected is None:
        selected = query.new_empty(sequences, heads, count, dtype=torch.int32)

    stored = statistics[0].dtype
    candidates_pad = triton.next_power_of_2(candidates)
    warps = 8 if count and candidates_pad > 4096 else 4  # they choose, too
    tile = tile or score_tile(rows, candidates, dim, warps)
    programs = triton.cdiv(candidates, tile.pages * tile.tiles)
    share = combine == "share"
    head_scores, peaks, sums = make_share_buffers(share, scores, rows, group, programs)
    operand, precision = choose_dot_types(query, statistics)
    table, table_stride = make_table_arguments(block_table, query)
    if arrivals is None and (share or count):
        arrivals = get_counters(rows, query.device)
    _scores[(rows * programs,)](
        query, *pad_to_four(statistics, query), lengths, query if starts is None else starts, table,
        query if within is None else within, head_scores, peaks, sums, scores, selected if count else scores,
        lengths if arrivals is None else arrivals,
        *resolve_factors(score, scale, scaling, dim), heads, *query.stride()[:2], table_stride, per_block, candidates,
        supers,
        SCORE=score, SHARE=share, COUNT=count, COUNT_PAD=triton.next_power_of_2(max(1, count)),
        CANDIDATES_PAD=candidates_pad, S=page_size, UNIT=unit, PER_SUPER=pages_per_super if within is not None else 1,
        SINK=sink, RECENT=recent, G=group, G_PAD=pad_group(group), D=dim, D_PAD=triton.next_power_of_2(dim),
        BLOCK=tile.pages, TILES=tile.tiles, STAGES=tile.stages, PROGRAMS=programs,
        PROGRAMS_PAD=triton.next_power_of_2(programs), PER_BLOCK=0 if block_table is None else per_block,
        HAS_STARTS=starts is not None,
        QUANTIZED=stored in LARGEST, OPERAND=operand, PRECISION=precision, num_warps=max(warps, tile.warps),
    )  # fmt: skip
    return scores, selected


@launch_on_its_device
def page_scores(
    query: Tensor,
    statistics: Sequence[Tensor],
    lengths: Tensor,
    score: str,
    scale: float,
    page_size: int,
    combine: str = "max",
    sink: int = 1,
    recent: int = 2,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    scaling: float | None = None,
    out: Tensor | None = None,
    unit: int = 1,
    tile: ScoreTile | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Score every page for every KV head (arXiv 2605.27740, section 3).

    The plain PyTorch twins are `scores.PageScore.scores` and `reference.combine_biased`.

    Args:
        query: [B, H, D].
        statistics: of the pages, as in `page_statistics.py`.
        lengths: int [B], the tokens of each sequence, the newest included.
        score: unique, mean, quest or second_moment; `scale` is its lambda.
        page_size: tokens of a page.
        combine: max over the heads of a group, or share, the mean of their softmax over pages of score * scaling.
        sink: first pages that are forced; recent: last pages that are forced, the newest one counted.
        starts: int [B], the padding on the left, in tokens; None: no padding.
        block_table: int32 [B, blocks], as in `paging.py`; None: pages lie by position.
        scaling: of the attention logits; None: 1 / sqrt(D).
        out: where to write; None: a new tensor.
        unit: with the statistics of super-pages, the pages of each; a super-page that holds a forced page is forced.
        tile: how the work is cut; None: `score_tile`.
        arrivals: int32 [B K or more], 0 before and after a launch; launches that may overlap need their own. None:
            those of the stream (`get_counters`).

    Returns:
        float32 [B, K, P]: inf where forced, -inf from the newest page on and before `starts`. NaN, which a key or a
        query may hold, counts as -inf, and other scores are finite.
    """
    how = score, scale, page_size, combine, sink, recent, starts, block_table, scaling, unit, tile
    return _launch(query, statistics, lengths, *how, scores=out, arrivals=arrivals)[0]


@launch_on_its_device
def select_pages(
    query: Tensor,
    statistics: Sequence[Tensor],
    lengths: Tensor,
    count: int,
    score: str,
    scale: float,
    page_size: int,
    combine: str = "max",
    sink: int = 1,
    recent: int = 2,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    scaling: float | None = None,
    within: Tensor | None = None,
    pages_per_super: int = 1,
    out: Tensor | None = None,
    unit: int = 1,
    fused: bool | None = None,
    tile: ScoreTile | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Score pages and select the best, as `top_pages(page_scores(...), count)` does.

    The plain PyTorch twin is `unique_asr.attention.page_selector.PageSelector.select`.

    Args:
        count: pages to select; further arguments as for `page_scores`.
        within: int32 [B, K, m], contiguous: super-pages, of `pages_per_super` pages each, that this function selected
            with the statistics of super-pages and `unit` = pages_per_super. The choice is limited to their pages and
            to those of the newest super-page.
        fused: whether scores and choice are one launch; None: up to `FUSED_PAGES` pages a row.

    Returns:
        int32 [B, K, count], ascending; -1 at the end where there are too few pages.
    """
    how = score, scale, page_size, combine, sink, recent, starts, block_table, scaling, unit, tile
    if within is not None:
        inside = {"within": within, "pages_per_super": pages_per_super, "arrivals": arrivals}
        return _launch(query, statistics, lengths, *how, count=count, selected=out, **inside)[1]
    if fused is None:
        per_block = statistics[0].shape[2]
        fused = (per_block if block_table is None else block_table.shape[1] * per_block) <= FUSED_PAGES
    if fused:
        return _launch(query, statistics, lengths, *how, count=count, selected=out, arrivals=arrivals)[1]
    return top_pages(_launch(query, statistics, lengths, *how, arrivals=arrivals)[0], count, out)


@launch_on_its_device
def select_pages_in_two_levels(
    query: Tensor,
    statistics: Sequence[Tensor],
    super_statistics: Sequence[Tensor],
    lengths: Tensor,
    count: int,
    super_count: int,
    score: str,
    scale: float,
    page_size: int,
    pages_per_super: int,
    combine: str = "max",
    sink: int = 1,
    recent: int = 2,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    scaling: float | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Select super-pages, then pages among theirs and those of the newest super-page: `select_pages` twice.

    Forced pages are forced on both levels. The plain PyTorch twin is `PageSelector.select` with super-pages.

    Args:
        super_statistics: of the super-pages, [B, K, P / pages_per_super, width] each.
        count: pages to select; super_count: super-pages to select.
        pages_per_super: pages of a super-page; further arguments as for `page_scores`.

    Returns:
        int32 [B, K, count], ascending; -1 at the end where there are too few pages.
    """
    how = score, scale, page_size, combine, sink, recent, starts, block_table, scaling
    best = select_pages(query, super_statistics, lengths, super_count, *how, unit=pages_per_super, arrivals=arrivals)
    within = {"within": best, "pages_per_super": pages_per_super, "arrivals": arrivals}
    return select_pages(query, statistics, lengths, count, *how, **within)
