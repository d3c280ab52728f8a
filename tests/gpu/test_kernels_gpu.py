"""The Triton kernels on a GPU against float64, on fresh random inputs; about a minute, most of it compilation.

python -m pytest tests/gpu/test_kernels_gpu.py -m gpu -s
"""

import pytest
import torch
from kernel_cases import make_case, raw
from unique_asr.kernels.page_scores import ScoreTile, page_scores, select_pages, select_pages_in_two_levels
from unique_asr.kernels.page_statistics import append, write_page_statistics
from unique_asr.kernels.sparse_decode import DecodeTile, sparse_decode
from unique_asr.kernels.sparse_step import StepTile, sparse_step
from unique_asr.kernels.top_pages import top_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = [4096, 4093, 1000, 9]
# score, statistics, combine, dtype, head dim, group, page size, more
CASES = [
    ("unique", "keys", "max", BF16, 128, 4, 8, {}),
    ("unique", "fp8", "share", BF16, 128, 4, 8, {"block_tokens": 64}),
    ("unique", "fp8", "max", FP16, 256, 12, 8, {"block_tokens": 16, "starts": [0, 3000, 7, 8]}),
    ("unique", "keys", "share", FP32, 128, 16, 64, {}),
    ("unique", "int8", "max", BF16, 64, 3, 16, {"starts": [5, 0, 999, 0]}),
    ("second_moment", "fp8", "share", BF16, 64, 2, 16, {}),
    ("second_moment", "keys", "max", BF16, 80, 5, 8, {"block_tokens": 256}),
    ("quest", "keys", "max", FP16, 96, 7, 8, {}),
    ("quest", "fp8", "share", BF16, 128, 1, 32, {"starts": [100, 0, 0, 0]}),
    ("mean", "int8", "max", FP32, 80, 6, 8, {}),
]
SHARE_TOLERANCE = 2e-2


@pytest.fixture(params=CASES, ids=lambda case: "-".join(str(part) for part in case[:7]).replace("torch.", ""))
def case_and_combine(request):
    score, statistics_dtype, combine, dtype, dim, group, page_size, more = request.param
    case = make_case(
        LENGTHS, 4352, group=group, dim=dim, page_size=page_size, dtype=dtype, score=score,
        statistics_dtype=statistics_dtype, device="cuda", **more,
    )  # fmt: skip
    return case, combine


def difference(got, want):
    """Largest absolute difference against the largest number expected."""
    got, want = got.double(), want.double()
    assert got.isfinite().all()
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def report(name, value, limit):
    print(f"  {name}: {value:.1e}")
    assert value <= limit, f"{name}: {value:.1e} > {limit}"


def assert_statistics(case, buffers, size, pages):
    for index, (buffer, expected) in enumerate(zip(buffers, case.expected_statistics(size))):
        got, want = case.by_position(buffer).float(), expected.float()
        pick = pages[:, None].expand(got.shape[:3])
        # A sum in another order may move a number by one step of its type, and its page's scale by one of its own.
        limit = {torch.int8: 2.01 / 127, torch.float8_e4m3fn: 33 / 448}.get(buffer.dtype, 1e-2)
        report(f"statistic {index} of {size} tokens", difference(got[pick], want[pick]), limit)


def test_statistics(case_and_combine):
    case, _ = case_and_combine
    size, count = case.page_size, 4352 // case.page_size
    buffers = case.empty_statistics(size)
    untouched = [raw(buffer).clone() for buffer in buffers]
    write_page_statistics(case.plain_keys if case.block_table is None else case.physical(case.plain_keys), buffers,
                          3, 60, case.score, case.starts, case.block_table)  # fmt: skip
    page = torch.arange(count, device="cuda").expand(len(LENGTHS), -1)
    complete = (page + 1) * size <= case.lengths[:, None]
    assert_statistics(case, buffers, size, (page >= 3) & (page < 60) & complete)
    outside = ((page < 3) | (page >= 60))[:, None].expand(-1, case.heads, -1)
    for buffer, old in zip(buffers, untouched):
        assert torch.equal(case.by_position(raw(buffer))[outside], case.by_position(old)[outside])

    buffers = case.empty_statistics(size)
    levels = case.block_table is None or case.block_tokens >= 64
    supers = case.empty_statistics(64) if levels and size < 64 else ()
    last = (case.lengths.long() - 1).view(-1, 1, 1, 1).expand(-1, case.heads, 1, case.query.shape[-1])
    new = case.plain_keys.gather(2, last), case.plain_values.gather(2, last)
    for _ in range(2):
        append(*new, case.keys, case.values, buffers, case.lengths, case.score, case.starts, case.block_table, supers)
    assert torch.equal(case.by_position(case.keys).gather(2, last), new[0])
    assert torch.equal(case.by_position(case.values).gather(2, last), new[1])
    closed = (page + 1) * size == case.lengths[:, None]
    assert_statistics(case, buffers, size, closed)
    if supers:
        assert_statistics(case, supers, 64, (page[:, : 4352 // 64] + 1) * 64 == case.lengths[:, None])


def test_scores_and_choice(case_and_combine):
    case, combine = case_and_combine
    step = case.query, case.statistics, case.lengths
    how = {"starts": case.starts, "block_table": case.block_table}
    for sink, recent in ((1, 2), (3, 5)):
        rest = case.score, 0.5, case.page_size, combine, sink, recent
        want = case.scores(0.5, combine, sink, recent)
        finite = want.isfinite()
        for tile in (None, ScoreTile(64, 3, 4, 3)):
            out = torch.full(want.shape, torch.nan, device="cuda")
            got = page_scores(*step, *rest, **how, out=out, tile=tile)
            assert torch.equal(got[~finite].double(), want[~finite])
            error = difference(got[finite], want[finite])
            report(f"scores with tile {tile}", error, SHARE_TOLERANCE if combine == "share" else 5e-3)
            chosen = top_pages(got, 63)
            for fused in (True, False):
                pages = torch.full_like(chosen, -7)
                select_pages(*step, 63, *rest, **how, tile=tile, fused=fused, out=pages)
                assert torch.equal(pages, chosen), f"fused={fused} chooses other pages than top_pages(page_scores)"


def test_attention(case_and_combine):
    case, _ = case_and_combine
    count = 512 // case.page_size - 1
    pages = torch.full((len(LENGTHS), case.heads, count), -1, dtype=torch.int32)
    for b, length in enumerate(LENGTHS):
        for h in range(case.heads):
            some = torch.randperm((length - 1) // case.page_size)[:count].sort().values
            pages[b, h, : len(some)] = some
    pages = pages.cuda()
    scaling = case.query.shape[-1] ** -0.5
    want = case.output(pages.cpu(), scaling)
    limit = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[case.query.dtype]
    for options in ({}, {"splits": 1}, {"tile": DecodeTile(32, 3, 4, 3)}, {"tile": DecodeTile(128, 1, 8)}):
        if case.query.dtype == FP32 and "tile" in options:
            continue  # too large for the registers and shared memory of a type that nobody decodes in
        for _ in range(2):
            out = torch.full_like(case.query, torch.nan)
            sparse_decode(case.query, case.keys, case.values, pages, case.lengths, scaling, case.page_size,
                          case.starts, case.block_table, out=out, **options)  # fmt: skip
            report(f"attention {options}", difference(out, want), limit)


@pytest.mark.parametrize("rows", [1, 300])
def test_top_pages(rows):
    for pages, count in ((1, 1), (63, 62), (1000, 64), (4096, 64), (4224, 512), (16384, 64), (32768, 512)):
        scores = torch.randn(rows, pages, device="cuda")
        scores[rows // 2 :] = scores[rows // 2 :].round()
        scores[::7, ::5] = torch.inf
        want = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(dim=-1).values.int()
        out = torch.full((rows, count), -7, dtype=torch.int32, device="cuda")
        for _ in range(3):
            assert torch.equal(top_pages(scores, count, out), want), f"{pages} pages, {count} of them"


@pytest.mark.parametrize("combine", ["max", "share"])
def test_two_levels(combine):
    """Against the definition on the scores of the kernel; super-pages that hold everything change nothing."""
    case = make_case([4096, 3001], 4096, group=4, dim=128, dtype=BF16, statistics_dtype="fp8", device="cuda")
    supers = case.readable(case.expected_statistics(64), 64)
    step = case.query, case.statistics
    rest = "unique", 0.5, 8
    everything = select_pages_in_two_levels(*step, supers, case.lengths, 63, 64, *rest, 8, combine)
    assert torch.equal(everything, select_pages(*step, case.lengths, 63, *rest, combine))
    if combine == "max":
        best = top_pages(page_scores(case.query, supers, case.lengths, *rest, unit=8), 20)
        page = torch.arange(512, device="cuda")
        keep = (page[:, None] // 8 == best[:, :, None]).any(-1) | (page // 8 == (case.lengths[:, None, None] - 1) // 64)
        scores = page_scores(*step, case.lengths, *rest).masked_fill(~keep, -torch.inf)
        chosen = select_pages_in_two_levels(*step, supers, case.lengths, 63, 20, *rest, 8)
        assert torch.equal(chosen, top_pages(scores, 63))


@pytest.mark.parametrize("statistics_dtype", ["keys", "fp8"])
@pytest.mark.parametrize("combine", ["max", "share"])
def test_many_rows_choose_the_same_every_time(combine, statistics_dtype):
    """The last program of a row must see what the others wrote: 640 rows, over and over."""
    torch.manual_seed(0)
    batch, heads, pages, dim = 80, 8, 4224, 128
    numbers = torch.randn(batch, heads, pages, dim, device="cuda", dtype=BF16)
    std = torch.rand(batch, heads, pages, 1, device="cuda", dtype=BF16)
    scale = torch.rand(batch, heads, pages, 1, device="cuda", dtype=BF16)
    statistics = (numbers, std) if statistics_dtype == "keys" else (numbers.to(torch.float8_e4m3fn), scale, std)
    lengths = torch.full((batch,), 32768, dtype=torch.int32, device="cuda")
    for repeat in range(20):
        query = torch.randn(batch, heads * 4, dim, device="cuda", dtype=BF16)
        rest = query, statistics, lengths
        expected = top_pages(page_scores(*rest, "unique", 0.5, 8, combine), 63)
        chosen = select_pages(*rest, 63, "unique", 0.5, 8, combine, fused=True)
        assert torch.equal(chosen, expected), f"repeat {repeat}"
        few = slice(0, 1)
        part = query[few], tuple(each[few] for each in statistics), lengths[few]
        assert torch.equal(select_pages(*part, 63, "unique", 0.5, 8, combine, fused=True), expected[few])


def test_one_launch(case_and_combine):
    """Writes, chooses and attends as the separate launches do, whatever the tiles and however often it runs."""
    case, combine = case_and_combine
    size, count, scaling = case.page_size, 512 // case.page_size - 1, case.query.shape[-1] ** -0.5
    place = {"starts": case.starts, "block_table": case.block_table}
    how = case.score, 0.5, combine, 1, 2
    last = (case.lengths.long() - 1).view(-1, 1, 1, 1).expand(-1, case.heads, 1, case.query.shape[-1])
    token = case.plain_keys.gather(2, last), case.plain_values.gather(2, last)
    levels = case.block_table is None or case.block_tokens >= 128
    supers = case.readable(case.expected_statistics(128), 128) if levels and size < 64 else ()
    unwritten = case.physical(torch.zeros_like(case.plain_keys).scatter(2, last, 1.0), fill=0.0) > 0
    limit = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[case.query.dtype]
    tiles = [None, StepTile(64, 2, 64, 3, 4, 3, second_tiles=3), StepTile(32, 1, 32, 1, 8, 1)]
    for per_super in (1, 128 // size) if supers else (1,):
        rest = case.score, 0.5, size, combine, 1, 2
        step = case.query, case.statistics
        if per_super > 1:
            pages = select_pages_in_two_levels(
                *step, supers, case.lengths, count, 24, case.score, 0.5, size, per_super, combine, 1, 2, **place
            )
        else:
            pages = select_pages(*step, case.lengths, count, *rest, **place)
        want = case.output(pages.cpu(), scaling)
        more = {"super_statistics": supers, "super_count": 24} if per_super > 1 else {}
        for tile in tiles if case.query.dtype != FP32 else tiles[:1]:
            for _ in range(3):
                keys, values = (torch.where(unwritten, torch.nan, each) for each in (case.keys, case.values))
                out, chosen = torch.full_like(case.query, torch.nan), torch.full_like(pages, -7)
                sparse_step(
                    case.query, *token, keys, values, [each.clone() for each in case.statistics], case.lengths, count,
                    *how, **place, **more, out=out, selected=chosen, tile=tile,
                )  # fmt: skip
                assert torch.equal(chosen, pages), f"{per_super}, {tile}: other pages than the separate launches"
                report(f"output, per_super {per_super}, {tile}", difference(out, want), limit)
                assert torch.equal(case.by_position(keys).gather(2, last), token[0])
                assert torch.equal(case.by_position(values).gather(2, last), token[1])


@pytest.mark.parametrize("statistics_dtype", ["keys", "fp8"])
@pytest.mark.parametrize("batch", [1, 8, 80])
@pytest.mark.parametrize("per_super", [1, 8])
def test_one_launch_of_many_rows(per_super, batch, statistics_dtype):
    """Rows and stages in a race with each other, over and over: the pages of the separate launches."""
    torch.manual_seed(0)
    heads, pages, dim = 8, 8192 if per_super == 1 and batch == 8 else 4096, 128

    def statistics(count):
        numbers = torch.randn(batch, heads, count, dim, device="cuda", dtype=BF16)
        std, scale = torch.rand(2, batch, heads, count, 1, device="cuda").to(BF16)
        return (numbers, std) if statistics_dtype == "keys" else (numbers.to(torch.float8_e4m3fn), scale, std)

    one, two = statistics(pages), statistics(pages // per_super)
    keys = torch.randn(batch, heads, 8 * pages, dim, device="cuda", dtype=BF16)
    values = torch.randn_like(keys)
    more = {"super_statistics": two, "super_count": 64} if per_super > 1 else {}
    for repeat in range(20):
        length = 8 * pages - 1 - 8 * repeat  # completes no page
        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        query = torch.randn(batch, heads * 4, dim, device="cuda", dtype=BF16)
        token = keys[:, :, length - 1 : length].clone(), values[:, :, length - 1 : length].clone()
        if per_super > 1:
            expected = select_pages_in_two_levels(query, one, two, lengths, 63, 64, "unique", 0.5, 8, per_super)
        else:
            expected = select_pages(query, one, lengths, 63, "unique", 0.5, 8)
        want = sparse_decode(query, keys, values, expected, lengths, dim**-0.5, 8)
        out, chosen = sparse_step(query, *token, keys, values, one, lengths, 63, "unique", 0.5, **more)
        assert torch.equal(chosen, expected), f"repeat {repeat}"
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_addresses_beyond_32_bits():
    """The last of 70 sequences of 32 K tokens lies beyond 2^31 numbers."""
    batch, heads, tokens, dim = 70, 8, 32768, 128
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    case = make_case([tokens], tokens, heads=heads, group=4, dim=dim, dtype=BF16, device="cuda")
    keys = torch.empty(batch, heads, tokens, dim, dtype=BF16, device="cuda")
    values = torch.empty_like(keys)
    keys[-1], values[-1] = case.keys[0], case.values[0]
    statistics = [torch.empty(batch, heads, tokens // 8, width, dtype=BF16, device="cuda") for width in (dim, 1)]
    lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
    lengths[-1] = tokens
    write_page_statistics(keys, statistics, 0, tokens // 8, "unique")
    for got, want in zip(statistics, case.plain_statistics):
        report("statistics", difference(got[-1], want[0]), 1e-2)
    query = case.query.expand(batch, -1, -1).contiguous()
    pages = select_pages(query, statistics, lengths, 63, "unique", 0.5, 8)
    assert (pages[:-1] == -1).all()
    out = sparse_decode(query, keys, values, pages, lengths, dim**-0.5, 8)
    report("attention", difference(out[-1], case.output(pages[-1:].cpu(), dim**-0.5)[0]), 1e-2)
    new = torch.randn(2, batch, heads, 1, dim, device="cuda").to(BF16)
    append(*new, keys, values, statistics, lengths, "unique")
    assert torch.equal(keys[-1, :, -1:], new[0, -1])
    assert torch.equal(values[-1, :, -1:], new[1, -1])


def test_a_captured_step_follows_the_lengths():
    """Append, choose and attend in a CUDA graph, replayed over several pages, against the same eagerly."""
    torch.manual_seed(0)
    batch, heads, group, dim, capacity = 3, 4, 4, 128, 2048
    lengths = torch.tensor([1001, 777, 1016], dtype=torch.int32, device="cuda")
    query = torch.randn(batch, heads * group, dim, device="cuda", dtype=BF16)
    new = torch.randn(2, batch, heads, 1, dim, device="cuda").to(BF16)
    keys, values = torch.randn(2, batch, heads, capacity, dim, device="cuda").to(BF16)
    statistics = [torch.zeros(batch, heads, capacity // 8, width, dtype=BF16, device="cuda") for width in (dim, 1)]
    write_page_statistics(keys, statistics, 0, 96, "unique")

    def step(state, lengths):
        keys, values, statistics = state
        append(*new, keys, values, statistics, lengths, "unique")
        pages = select_pages(query, statistics, lengths, 31, "unique", 0.5, 8)
        return sparse_decode(query, keys, values, pages, lengths, dim**-0.5, 8)

    state = keys, values, statistics
    copy = keys.clone(), values.clone(), [each.clone() for each in statistics]
    step(state, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(state, lengths)
    eager_lengths = lengths.clone()
    for _ in range(20):
        for buffer in (query, new):
            buffer.copy_(torch.randn_like(buffer))
        graph.replay()
        expected = step(copy, eager_lengths)
        assert torch.equal(output, expected)
        lengths += 1
        eager_lengths += 1
