"""A whole decode step of one layer in one launch: write the token, score and choose pages, attend.

The first programs of the launch score, a second level follows where there is one, then those that write tokens, and the
last attend. Each waits until what it reads is there for its own row, which a counter of the row tells; the last program
of a row to end a stage does what needs the whole row. So the stages of different rows overlap, and nothing waits for a
launch. Nobody waits for the statistics of a page that a token completes: it is the newest, which is never scored.
Programs wait for those of a lower number alone. A GPU starts programs in the order of their number: whatever a program
waits for is running or has ended, however few programs fit the GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from unique_asr.kernels.launch import launch_on_its_device
from unique_asr.kernels.page_scores import (
    choose_dot_types,
    choose_pages,
    load_query,
    make_share_buffers,
    pad_group,
    resolve_factors,
    score_part,
)
from unique_asr.kernels.page_statistics import LARGEST, complete_pages, find_page_size, pad_to_four, store_token
from unique_asr.kernels.paging import arrive, get_counters, make_table_arguments, wait_for
from unique_asr.kernels.sparse_decode import attend, merge, store_part

STEP_PAGES = 8192  # of a row: what eight warps choose from in registers
WRITTEN = tl.constexpr(1 << 20)  # what a row's writer adds to its counter; the other programs of a row add 1


class StepTile(NamedTuple):
    """How the work is cut: pages of a tile and tiles of a program that scores; tokens of a tile and tiles of a program
    that attends; warps of a program, stages of its pipelines, registers of a thread at most; tiles of a program that
    scores in the second level.
    """

    pages: int = 64
    tiles: int = 8
    tokens: int = 64
    token_tiles: int = 1
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    second_tiles: int = 1


def step_tile(rows: int, candidates: int, key_bytes: int, bytes_each: int, widest: int = 0) -> StepTile:
    """Choose the fastest tile of those tried on an H100 (benchmarks/h100.md).

    Args:
        rows: B K; candidates: pages of a row that are scored first.
        key_bytes: of one key; bytes_each: of one number of a statistic.
        widest: pages that the second level chooses from; 0: there is none.

    Keys of more than 256 bytes have not been tried: without pipelines, they need no more than other keys do.
    """
    warps = 4 if max(candidates, widest) <= STEP_PAGES // 2 else 8
    tiles = min(16 if bytes_each == 1 else 8, triton.cdiv(candidates, 64))
    programs = 512 if rows >= 32 else 1024 // warps  # that score, at least
    while tiles > 1 and rows * triton.cdiv(candidates, 64 * tiles) < programs:
        tiles //= 2
    many, small = rows >= 256, key_bytes <= 256
    return StepTile(
        pages=64,
        tiles=tiles,
        tokens=64,
        token_tiles=4 if many else 1,
        warps=warps,
        stages=3 if tiles > 1 and small else 1,
        registers=128 if small else None,
        second_tiles=9 if many else 1,
    )


@triton.jit
def _sparse_step(
    query, key, value, keys, values, s0, s1, s2, s3, u0, u1, u2, u3, lengths, starts, table,
    head_scores, peaks, sums, scores, supers, selected, parts, part_peaks, part_sums, out, arrivals,
    scale, scaling, rows, heads, query_row, query_head, key_row, key_head, value_row, value_head, table_stride,
    stride_block, stride_head, stride_token, block_tokens, candidates,
    SCORE: tl.constexpr, SHARE: tl.constexpr, COUNT: tl.constexpr, SUPER_COUNT: tl.constexpr,
    CANDIDATES_PAD: tl.constexpr, S: tl.constexpr, PER_SUPER: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SCORERS: tl.constexpr, SECOND_SCORERS: tl.constexpr, READERS: tl.constexpr, PAGES: tl.constexpr,
    TILES: tl.constexpr, SECOND_TILES: tl.constexpr, TOKENS: tl.constexpr, TOKEN_TILES: tl.constexpr,
    STAGES: tl.constexpr, PER_BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr, LARGEST: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run one step. Of each row SCORERS programs score `candidates` pages (super-pages if PER_SUPER > 1),
    SECOND_SCORERS score the pages of the best super-pages, one program writes the token, and READERS attend.
    """
    QUANTIZED: tl.constexpr = LARGEST > 0
    TWO_LEVELS: tl.constexpr = PER_SUPER > 1
    WIDEST: tl.constexpr = (SUPER_COUNT + 1) * PER_SUPER if TWO_LEVELS else 0  # candidates of the second level
    BEST: tl.constexpr = SUPER_COUNT if TWO_LEVELS else COUNT  # of the first level
    FIRST_DONE: tl.constexpr = SCORERS + 1  # counted in a row once the first level has been scored and selected
    DONE: tl.constexpr = FIRST_DONE + SECOND_SCORERS + 1 if TWO_LEVELS else FIRST_DONE
    program = tl.program_id(0)
    second = rows * SCORERS
    third = second + rows * SECOND_SCORERS
    fourth = third + rows
    if program < second:
        row = program // SCORERS
        part = program % SCORERS
    elif program < third:
        row = (program - second) // max(1, SECOND_SCORERS)
        part = (program - second) % max(1, SECOND_SCORERS)
    elif program < fourth:
        row = program - third
        part = 0
    else:
        row = (program - fourth) // READERS
        part = (program - fourth) % READERS
    row = row.to(tl.int64)
    sequence, head = row // heads, row % heads
    length = tl.load(lengths + sequence).to(tl.int32)
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + sequence).to(tl.int32)
    first, newest = start // S, (length - 1) // S
    arrivals += row
    selected += row * COUNT
    supers += row * SUPER_COUNT
    head_scores += row * G * tl.maximum(candidates, WIDEST)
    scores += row * tl.maximum(candidates, WIDEST)
    peaks += row * max(SCORERS, SECOND_SCORERS) * G_PAD
    sums += row * max(SCORERS, SECOND_SCORERS) * G_PAD

    q, unit = load_query(query, sequence, head, query_row, query_head, G, G_PAD, D, D_PAD)
    if program < second:
        score_part(
            q, unit, u0 if TWO_LEVELS else s0, u1 if TWO_LEVELS else s1, u2 if TWO_LEVELS else s2,
            u3 if TWO_LEVELS else s3, table, supers, head_scores, peaks, sums, scores, sequence, head, part, first,
            newest, scale, scaling, heads, table_stride, block_tokens // (S * PER_SUPER), candidates, 0,
            SCORE, SHARE, PER_SUPER, 1, SINK, RECENT, G, G_PAD, D, D_PAD, PAGES * TILES, PAGES, STAGES,
            PER_BLOCK // (S * PER_SUPER), QUANTIZED, OPERAND, PRECISION,
        )  # fmt: skip
        if arrive(arrivals) % WRITTEN == SCORERS - 1:
            choose_pages(
                supers, head_scores, peaks, sums, scores, supers if TWO_LEVELS else selected, first, newest, candidates,
                0, SHARE, BEST, triton.next_power_of_2(BEST), CANDIDATES_PAD, PER_SUPER, 1, SINK, RECENT, G, G_PAD,
                SCORERS, triton.next_power_of_2(SCORERS),
            )  # fmt: skip
            arrive(arrivals)
    elif program < third:
        if TWO_LEVELS:
            wait_for(arrivals, FIRST_DONE, WRITTEN - 1)
            score_part(
                q, unit, s0, s1, s2, s3, table, supers, head_scores, peaks, sums, scores, sequence, head, part, first,
                newest, scale, scaling, heads, table_stride, block_tokens // S, WIDEST, SUPER_COUNT,
                SCORE, SHARE, 1, PER_SUPER, SINK, RECENT, G, G_PAD, D, D_PAD, PAGES * SECOND_TILES, PAGES,
                STAGES if SECOND_TILES > 1 else 1, PER_BLOCK // S, QUANTIZED, OPERAND, PRECISION,
            )  # fmt: skip
            if arrive(arrivals) % WRITTEN == FIRST_DONE + SECOND_SCORERS - 1:
                choose_pages(
                    supers, head_scores, peaks, sums, scores, selected, first, newest, WIDEST, SUPER_COUNT,
                    SHARE, COUNT, triton.next_power_of_2(COUNT), triton.next_power_of_2(WIDEST), 1, PER_SUPER, SINK,
                    RECENT, G, G_PAD, SECOND_SCORERS, triton.next_power_of_2(SECOND_SCORERS),
                )  # fmt: skip
                arrive(arrivals)
    elif program < fourth:
        new_key = store_token(
            key, value, keys, values, table, table_stride, sequence, head, length, key_row, key_head, value_row,
            value_head, stride_block, stride_head, stride_token, D, D_PAD, PER_BLOCK,
        )  # fmt: skip
        arrive(arrivals, WRITTEN)
        complete_pages(
            new_key, keys, table, table_stride, s0, s1, s2, s3, u0, u1, u2, u3, sequence, head, start, length, heads,
            stride_block, stride_head, stride_token, block_tokens, SCORE, S, S * PER_SUPER if TWO_LEVELS else 0, D,
            D_PAD, PER_BLOCK, LARGEST,
        )  # fmt: skip
    else:
        wait_for(arrivals, WRITTEN + DONE)
        output, total, peak = attend(
            (q * unit[:, None]).to(keys.dtype.element_ty), keys, values, selected, table, sequence, head, part, start,
            length, scaling, COUNT, table_stride, stride_block, stride_head, stride_token,
            G_PAD, D, D_PAD, S, TOKENS * TOKEN_TILES, TOKENS, STAGES, PER_BLOCK // S, PRECISION,
        )  # fmt: skip
        store_part(output, total, peak, out, parts, part_peaks, part_sums, row, part, G, G_PAD, D, D_PAD, READERS)
        if arrive(arrivals) == WRITTEN + DONE + READERS - 1:
            if READERS > 1:
                merge(out, parts, part_peaks, part_sums, row, G, D, D_PAD, READERS, triton.next_power_of_2(READERS))
            tl.store(arrivals, 0)


@launch_on_its_device
def sparse_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    statistics: Sequence[Tensor],
    lengths: Tensor,
    count: int,
    score: str,
    scale: float,
    combine: str = "max",
    sink: int = 1,
    recent: int = 2,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    scaling: float | None = None,
    super_statistics: Sequence[Tensor] = (),
    super_count: int = 0,
    out: Tensor | None = None,
    selected: Tensor | None = None,
    tile: StepTile | None = None,
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `append`, `select_pages` (in two levels with `super_statistics`) and `sparse_decode` in one launch.

    The plain PyTorch twin is `unique_asr.attention.steps.run_static_step` with backend=torch.

    Args:
        query: [B, H, D].
        key: [B, K, 1, D] and value: [B, K, 1, D] of the newest token, which `lengths` counts.
        count: complete pages to select; super_count: super-pages to select.
        selected: where the selected pages are written; out: where the output is; None: new tensors.
        tile: how the work is cut; None: `step_tile`.
        arrivals: int32 [B K or more], 0 before and after a launch; launches that may overlap need their own. None:
            those of the stream (`get_counters`).
        Further arguments are those of the three functions.

    Returns:
        The output [B, H, D], and the complete pages selected, int32 [B, K, count].

    Raises:
        ValueError: shapes or strides of keys and values differ, a buffer is not contiguous, or a row has more than
            STEP_PAGES pages (or super-pages, or pages in the best of them).
    """
    if keys.stride() != values.stride() or keys.shape != values.shape:
        raise ValueError("keys and values must have the same shape and strides")
    sequences, query_heads, dim = query.shape
    heads, block_tokens = keys.shape[1:3]
    rows, group = sequences * heads, query_heads // heads
    size = find_page_size(keys, statistics)
    pages_per_super = find_page_size(keys, super_statistics) // size if super_statistics else 1
    candidates = block_tokens // (size * pages_per_super) * (1 if block_table is None else block_table.shape[1])
    widest = (super_count + 1) * pages_per_super if pages_per_super > 1 else 0
    most = max(candidates, widest)
    if most > STEP_PAGES:
        raise ValueError(f"{most} pages to choose from: sparse_step takes at most {STEP_PAGES}")
    tile = tile or step_tile(rows, candidates, dim * keys.element_size(), statistics[0].element_size(), widest)
    scorers = triton.cdiv(candidates, tile.pages * tile.tiles)
    second_scorers = triton.cdiv(widest, tile.pages * tile.second_tiles)
    readers = triton.cdiv((count + 1) * size, tile.tokens * tile.token_tiles)
    share = combine == "share"
    if out is None:
        out = query.new_empty(sequences, query_heads, dim)
    if selected is None:
        selected = query.new_empty(sequences, heads, count, dtype=torch.int32)
    scores = query.new_empty(rows, most, dtype=torch.float32)
    supers = query.new_empty(rows, super_count, dtype=torch.int32) if pages_per_super > 1 else selected
    head_scores, peaks, sums = make_share_buffers(share, scores, rows, group, max(scorers, second_scorers))
    parts = part_peaks = part_sums = out
    if readers > 1:
        parts = query.new_empty(rows, readers, group, dim, dtype=torch.float32)
        part_peaks, part_sums = query.new_empty(2, rows, readers, group, dtype=torch.float32)
    table, table_stride = make_table_arguments(block_table, query)
    operand, precision = choose_dot_types(query, statistics)
    _sparse_step[(rows * (1 + scorers + second_scorers + readers),)](
        query, key, value, keys, values, *pad_to_four(statistics, query), *pad_to_four(super_statistics, query),
        lengths, query if starts is None else starts, table,
        head_scores, peaks, sums, scores, supers, selected, parts, part_peaks, part_sums, out,
        get_counters(rows, query.device) if arrivals is None else arrivals,
        *resolve_factors(score, scale, scaling, dim),
        rows, heads, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], table_stride, *keys.stride()[:3],
        block_tokens, candidates,
        SCORE=score, SHARE=share, COUNT=count, SUPER_COUNT=super_count,
        CANDIDATES_PAD=triton.next_power_of_2(candidates), S=size, PER_SUPER=pages_per_super, SINK=sink, RECENT=recent,
        G=group, G_PAD=pad_group(group), D=dim, D_PAD=triton.next_power_of_2(dim),
        SCORERS=scorers, SECOND_SCORERS=second_scorers, READERS=readers, PAGES=tile.pages, TILES=tile.tiles,
        SECOND_TILES=tile.second_tiles, TOKENS=tile.tokens, TOKEN_TILES=tile.token_tiles, STAGES=tile.stages,
        PER_BLOCK=0 if block_table is None else block_tokens, HAS_STARTS=starts is not None,
        LARGEST=LARGEST.get(statistics[0].dtype, 0.0), OPERAND=operand, PRECISION=precision, num_warps=tile.warps,
        maxnreg=tile.registers,
    )  # fmt: skip
    return out, selected
