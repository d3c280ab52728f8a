"""Page scores and the fused choice of pages in Triton against float64."""

import pytest
import torch
from kernel_cases import make_case
from unique_asr.kernels.page_scores import ScoreTile, page_scores, select_pages, select_pages_in_two_levels
from unique_asr.kernels.page_statistics import write_page_statistics
from unique_asr.kernels.top_pages import top_pages

from unique_asr.attention.scores import SCORES

LAYOUTS = {
    "even": {"lengths": [400, 233], "dim": 64, "group": 4},
    "odd": {"lengths": [400, 9], "dim": 80, "group": 3, "heads": 3},
    "padded": {"lengths": [385, 385], "starts": [0, 131], "group": 1, "dim": 128},
    "blocks": {"lengths": [400, 290], "block_tokens": 80, "group": 7, "page_size": 16},
    "blocks_padded": {"lengths": [400, 290], "block_tokens": 16, "starts": [17, 64], "dtype": torch.float16},
    "large": {"lengths": [384], "page_size": 64, "dim": 256, "heads": 1, "group": 16},
}


def assert_scores(got, want, tolerance):
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite])
    torch.testing.assert_close(got[finite].double(), want[finite], rtol=tolerance, atol=tolerance)


def check(case, combine, sink, recent, count, tile=None, fused=(True,)):
    scores = torch.full((len(case.lengths), case.heads, case.plain_statistics[0].shape[2]), torch.nan)
    step = case.query, case.statistics, case.lengths
    how = {"starts": case.starts, "block_table": case.block_table, "tile": tile}
    rest = case.score, 0.5, case.page_size, combine, sink, recent
    assert page_scores(*step, *rest, **how, out=scores) is scores
    tolerance = 2e-2 if case.query.dtype == torch.float16 else 1e-4
    assert_scores(scores, case.scores(0.5, combine, sink, recent), tolerance)
    chosen = top_pages(scores, count)
    for each in fused:
        out = torch.full_like(chosen, -7)
        select_pages(*step, count, *rest, **how, out=out, fused=each)
        assert torch.equal(out, chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("score", "combine"),
    [("unique", "max"), ("unique", "share"), ("mean", "share"), ("quest", "max"), ("second_moment", "max")],
)
def test_scores_and_choice(score, combine, layout):
    torch.manual_seed(0)
    case = make_case(capacity=400 if layout != "large" else 448, score=score, **LAYOUTS[layout])
    check(case, combine, 1, 2, 9)


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("statistics_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("score", SCORES)
def test_8_bits(score, statistics_dtype, combine):
    torch.manual_seed(0)
    dtype = torch.float16 if combine == "max" else torch.float32
    check(make_case([200, 133], 200, score=score, statistics_dtype=statistics_dtype, dtype=dtype), combine, 2, 3, 9)


@pytest.mark.parametrize(
    ("tile", "sink", "recent"),
    [(ScoreTile(32), 0, 1), (ScoreTile(16, 2, stages=3), 0, 4), (ScoreTile(64, 4), 3, 1)],
)
@pytest.mark.parametrize("combine", ["max", "share"])
def test_forced_pages_and_tiles(combine, tile, sink, recent):
    torch.manual_seed(0)
    check(make_case([641, 77], 800, starts=[11, 0]), combine, sink, recent, 20, tile, fused=(True, False))


def test_the_range_of_a_query_does_not_matter():
    torch.manual_seed(0)
    case = make_case([400], 400, statistics_dtype="int8", dtype=torch.float16, score="second_moment")
    for factor in (0.0, 1e-4, 1e4):
        case.query = (torch.randn_like(case.query) * factor).half()
        rest = case.score, 0.5, case.page_size
        got = page_scores(case.query, case.statistics, case.lengths, *rest).double()
        want = case.scores(0.5, "max", 1, 2)
        finite = want.isfinite()
        assert (got - want)[finite].abs().max() <= 1e-2 * want[finite].abs().max()


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_inf_in_a_page_or_a_head(score, combine, dtype):
    """A page of NaN counts as -inf, one that overflows is below forced ones, and both leave the others alone."""
    torch.manual_seed(0)
    case = make_case([400], 400, score=score, dtype=dtype, group=2)
    clean = case.scores(0.5, combine, 1, 2)[0, 0]
    for statistic in case.statistics:
        statistic[0, 0, [0, 7]] = torch.nan  # the sink is forced
        statistic[0, 0, 9] = torch.inf
    how = score, 0.5, case.page_size, combine
    scores = page_scores(case.query, case.statistics, case.lengths, *how)[0, 0]
    assert not scores.isnan().any()
    assert scores[7] == -torch.inf
    assert (scores[[0, 48]] == torch.inf).all()
    assert scores[9] < torch.inf
    if combine == "max":
        others = clean.isfinite()
        others[[7, 9]] = False
        torch.testing.assert_close(scores[others].double(), clean[others], rtol=2e-2, atol=2e-2)
    chosen = select_pages(case.query, case.statistics, case.lengths, 40, *how)[0, 0].tolist()
    assert 7 not in chosen
    assert {0, 48} < set(chosen)

    case.query[0, 0] = torch.nan  # of two heads of the group
    scores = page_scores(case.query, case.statistics, case.lengths, *how)
    assert not scores.isnan().any()
    assert scores[0, 0, 1:48].isfinite().sum() > 40


@pytest.mark.parametrize(("layout", "sink", "recent"), [("even", 0, 1), ("padded", 1, 2), ("blocks", 5, 9)])
@pytest.mark.parametrize("combine", ["max", "share"])
def test_two_levels(layout, combine, sink, recent):
    torch.manual_seed(0)
    case = make_case(capacity=640, **LAYOUTS[layout] | {"lengths": [640, 501], "block_tokens": None})
    per_super, count, super_count = 4, 12, 6
    size = per_super * case.page_size
    supers = case.readable(case.expected_statistics(size), size)
    step = case.query, case.statistics, supers, case.lengths
    rest = case.score, 0.5, case.page_size, per_super, combine, sink, recent
    chosen = select_pages_in_two_levels(*step, count, super_count, *rest, case.starts)

    best = top_pages(case.scores(0.5, combine, sink, recent, per_super).float(), super_count)
    newest = (case.lengths - 1) // size
    scores = case.scores(0.5, combine, sink, recent)
    page = torch.arange(scores.shape[-1])
    if combine == "share":  # the softmax is over the pages of the chosen super-pages
        inside = (page // per_super == newest[:, None, None]) | (page[:, None] // per_super == best[:, :, None]).any(-1)
        heads = (case.head_scores(0.5) * case.query.shape[-1] ** -0.5).masked_fill(
            (~inside | ~scores.gt(-torch.inf))[:, :, None], -torch.inf
        )
        scores = torch.where(scores.isinf(), scores, heads.softmax(-1).mean(2))
    keep = (page // per_super == newest[:, None, None]) | (page[:, None] // per_super == best[:, :, None]).any(-1)
    expected = top_pages(scores.masked_fill(~keep, -torch.inf).float(), count)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("score", SCORES)
def test_from_keys_to_pages(score):
    """Statistics by the kernel, scores by the kernel: a page that is like the query is found."""
    torch.manual_seed(0)
    case = make_case([512], 512, score=score, group=1)
    case.plain_keys[0, :, 200:208] = 3 * case.query[0].view(2, 1, -1)
    buffers = case.empty_statistics(8)
    write_page_statistics(case.plain_keys, buffers, 0, 63, score)
    pages = select_pages(case.query, buffers, case.lengths, 4, score, 0.5, 8)
    assert (pages == 25).any(-1).all()
    assert (pages == 0).any(-1).all()
    assert (pages == 62).any(-1).all()
