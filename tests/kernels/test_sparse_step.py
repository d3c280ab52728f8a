"""The decode step in one launch against the launches that it replaces."""

import pytest
import torch
from kernel_cases import make_case, raw
from unique_asr.kernels.page_scores import select_pages, select_pages_in_two_levels
from unique_asr.kernels.page_statistics import append
from unique_asr.kernels.paging import get_counters
from unique_asr.kernels.sparse_decode import sparse_decode
from unique_asr.kernels.sparse_step import STEP_PAGES, StepTile, sparse_step, step_tile

LAYOUTS = {
    "even": {"lengths": [640, 488], "dim": 64, "group": 4},
    "odd": {"lengths": [633, 9], "dim": 80, "group": 3, "heads": 3},
    "padded": {"lengths": [640, 640], "starts": [0, 131], "group": 1},
    "blocks": {"lengths": [640, 290], "block_tokens": 64, "group": 7, "page_size": 16},
    "blocks_padded": {"lengths": [640, 290], "block_tokens": 32, "starts": [17, 64], "dtype": torch.float16},
}


def check(case, combine="max", per_super=1, count=12, super_count=5, tile=None):
    """The same pages, output, token and statistics, twice: the counters are ready for the next step."""
    size, scaling = case.page_size, case.query.shape[-1] ** -0.5
    levels = [size] if per_super == 1 else [size, size * per_super]
    last = (case.lengths.long() - 1).view(-1, 1, 1, 1).expand(-1, case.heads, 1, case.query.shape[-1])
    token = case.plain_keys.gather(2, last), case.plain_values.gather(2, last)
    poison = case.physical(torch.full_like(case.plain_keys, 7.0).scatter(2, last, torch.nan)).isnan()

    def buffers():
        keys, values = (torch.where(poison, torch.nan, each) for each in (case.keys, case.values))
        statistics = [case.readable(case.expected_statistics(each), each) for each in levels]
        return keys, values, *statistics

    place = {"starts": case.starts, "block_table": case.block_table}
    how = combine, 1, 2
    keys, values, *statistics = expected = buffers()
    supers = {"super_statistics": statistics[1]} if per_super > 1 else {}
    append(*token, keys, values, statistics[0], case.lengths, case.score, **place, **supers)
    if per_super > 1:
        pages = select_pages_in_two_levels(
            case.query, *statistics, case.lengths, count, super_count, case.score, 0.5, size, per_super, *how, **place
        )
    else:
        pages = select_pages(case.query, *statistics, case.lengths, count, case.score, 0.5, size, *how, **place)
    output = sparse_decode(case.query, keys, values, pages, case.lengths, scaling, size, **place)

    keys, values, *statistics = got = buffers()
    supers = {"super_statistics": statistics[1], "super_count": super_count} if per_super > 1 else {}
    for arrivals in (None, torch.zeros(case.keys.shape[0] * case.heads, dtype=torch.int32)):
        out, chosen = torch.full_like(case.query, torch.nan), torch.full_like(pages, -7)
        sparse_step(
            case.query, *token, keys, values, statistics[0], case.lengths, count, case.score, 0.5, *how, **place,
            **supers, out=out, selected=chosen, tile=tile, arrivals=arrivals,
        )  # fmt: skip
        assert torch.equal(chosen, pages)
        tolerance = 4e-3 if out.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(out, output, rtol=tolerance, atol=tolerance)
        assert not (get_counters(1, out.device) if arrivals is None else arrivals).any()
    for left, right in zip(got[:2], expected[:2]):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    for level, other in zip(got[2:], expected[2:]):
        for left, right in zip(level, other):
            assert torch.equal(raw(left).nan_to_num(99.0), raw(right).nan_to_num(99.0))


@pytest.mark.parametrize("per_super", [1, 2])
@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, combine, per_super):
    torch.manual_seed(0)
    check(make_case(capacity=640, **LAYOUTS[layout]), combine, per_super)


@pytest.mark.parametrize(
    ("score", "statistics_dtype"), [("mean", "int8"), ("quest", "keys"), ("second_moment", "fp8"), ("unique", "fp8")]
)
def test_scores(score, statistics_dtype):
    torch.manual_seed(0)
    check(make_case([640, 77], 640, score=score, statistics_dtype=statistics_dtype), per_super=8, super_count=3)


@pytest.mark.parametrize(
    "tile", [StepTile(32, 1, 16, 2), StepTile(16, 3, 32, 8, second_tiles=2), StepTile(64, 1, stages=1, second_tiles=3)]
)
@pytest.mark.parametrize("per_super", [1, 4])
def test_tiles(tile, per_super):
    torch.manual_seed(0)
    check(make_case([800, 640], 800, starts=[11, 0]), per_super=per_super, count=20, super_count=7, tile=tile)


def test_too_many_pages_are_refused():
    case = make_case([8], 8 * (STEP_PAGES + 1), heads=1, group=1, dim=16)
    token = torch.zeros(2, 1, 1, 1, 16)
    with pytest.raises(ValueError, match="at most"):
        sparse_step(case.query, *token, case.keys, case.values, case.statistics, case.lengths, 4, "unique", 0.5)
    case = make_case([8], 512, heads=1, group=1, dim=16)
    two = {"super_statistics": case.expected_statistics(32), "super_count": STEP_PAGES // 4}
    with pytest.raises(ValueError, match="at most"):
        sparse_step(case.query, *token, case.keys, case.values, case.statistics, case.lengths, 4, "unique", 0.5, **two)


def test_counters_stay_where_captured_graphs_know_them():
    few = get_counters(1, torch.device("cpu"))
    assert len(get_counters(len(few) + 1, few.device)) > len(few)
    assert get_counters(len(few), few.device) is few


def test_keys_of_many_bytes_are_not_pipelined():
    assert step_tile(64, 4096, 2 * 128, 1).stages == 3
    assert step_tile(64, 4096, 4 * 128, 4).stages == 1


def test_either_level_of_many_pages_gets_more_warps() -> None:
    assert step_tile(8, STEP_PAGES, 128, 1).warps == 8
    assert step_tile(8, 512, 128, 1, widest=STEP_PAGES // 2 + 1).warps == 8
    assert step_tile(8, 512, 128, 1, widest=STEP_PAGES // 2).warps == 4
