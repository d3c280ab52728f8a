"""Page statistics in Triton against the plain PyTorch twin, in bulk and token by token."""

import pytest
import torch
from kernel_cases import DTYPES, make_case, raw
from unique_asr.kernels.page_statistics import append, write_page_statistics

from unique_asr.attention.scores import SCORES


def assert_same(case, buffers, size, pages):
    """`pages` [B, P] of the physical buffers are as expected; 8-bit numbers may differ by one step of rounding."""
    for buffer, expected in zip(buffers, case.expected_statistics(size)):
        got, want = case.by_position(buffer).float(), expected.float()
        assert got.isfinite().all() or buffer.dtype not in (torch.float32, torch.float16)
        step = {torch.float8_e4m3fn: (0.13, 0.1), torch.int8: (0, 1)}.get(buffer.dtype, (2e-3, 1e-4))
        pick = pages[:, None].expand(got.shape[:3])
        torch.testing.assert_close(got[pick], want[pick], rtol=step[0], atol=step[1])


@pytest.mark.parametrize("statistics_dtype", ["keys", "fp8", "int8"])
@pytest.mark.parametrize("score", SCORES)
def test_bulk(score, statistics_dtype):
    for options in ({"dtype": torch.float16, "dim": 80}, {"starts": [0, 21]}, {"block_tokens": 32, "page_size": 16}):
        torch.manual_seed(0)
        case = make_case([192, 192], 192, score=score, statistics_dtype=statistics_dtype, **options)
        size = case.page_size
        buffers = case.empty_statistics(size)
        before = [raw(buffer).clone() for buffer in buffers]
        write_page_statistics(case.keys, buffers, 1, 9, score, case.starts, case.block_table)
        page = torch.arange(192 // size).expand(2, -1)
        assert_same(case, buffers, size, (page >= 1) & (page < 9))
        for buffer, old in zip(buffers, before):
            for other in (0, *range(9, 192 // size)):
                kept, was = case.by_position(raw(buffer))[:, :, other], case.by_position(old)[:, :, other]
                assert torch.equal(kept, was)


@pytest.mark.parametrize(
    ("score", "statistics_dtype"),
    [("unique", "keys"), ("mean", "int8"), ("quest", "int8"), ("second_moment", "keys"), ("unique", "fp8")],
)
def test_append(score, statistics_dtype):
    """Rows of different lengths: one completes a page and a super-page, one only a page, one neither."""
    for options in ({"starts": [3, 0, 60]}, {"block_tokens": 32, "dim": 96}):
        torch.manual_seed(0)
        case = make_case([64, 88, 61], 96, score=score, statistics_dtype=statistics_dtype, **options)
        buffers, supers = case.empty_statistics(8), case.empty_statistics(32)
        keys, values = case.keys.clone(), case.values.clone()
        last = (case.lengths.long() - 1).view(3, 1, 1, 1).expand(-1, 2, 1, case.query.shape[-1])
        new = case.plain_keys.gather(2, last), case.plain_values.gather(2, last)
        poison = torch.full_like(case.plain_keys, 7.0).scatter(2, last, torch.nan)
        keys = torch.where(case.physical(poison).isnan(), torch.nan, keys)
        for _ in range(2):
            append(*new, keys, values, buffers, case.lengths, score, case.starts, case.block_table, supers)
            torch.testing.assert_close(keys, case.keys, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(values, case.values, rtol=0, atol=0, equal_nan=True)
            page = torch.arange(12).expand(3, -1)
            assert_same(case, buffers, 8, page == torch.tensor([[7], [10], [-1]]))
            assert_same(case, supers, 32, page[:, :3] == torch.tensor([[1], [-1], [-1]]))
        for buffer, fresh in zip(buffers, case.empty_statistics(8)):
            untouched = torch.ones(3, 12, dtype=torch.bool)
            untouched[0, 7] = untouched[1, 10] = False
            pick = untouched[:, None].expand(3, 2, 12)
            assert torch.equal(case.by_position(raw(buffer))[pick], case.by_position(raw(fresh))[pick])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_append_to_a_dense_layer(dtype):
    case = make_case([5, 9], 64, dtype=DTYPES[dtype])
    keys, values = torch.zeros_like(case.keys), torch.zeros_like(case.values)
    key, value = torch.randn(2, 2, 2, 1, 64).to(keys.dtype)
    append(key, value, keys, values, (), case.lengths, "unique")
    for row, length in enumerate((5, 9)):
        assert torch.equal(keys[row, :, length - 1], key[row, :, 0])
        assert torch.equal(values[row, :, length - 1], value[row, :, 0])
    assert keys.count_nonzero() == key.count_nonzero()


@pytest.mark.parametrize("score", SCORES)
def test_a_large_mean_costs_no_precision(score):
    torch.manual_seed(0)
    keys = 1000.0 + torch.randn(1, 1, 64, 64)
    stored = [torch.empty(1, 1, 1, width) for width in SCORES[score].widths(64)]
    write_page_statistics(keys, stored, 0, 1, score)
    for got, want in zip(stored, SCORES[score].statistics(keys.view(1, 1, 1, 64, 64).double())):
        torch.testing.assert_close(got, want.to(torch.float32), rtol=1e-4, atol=1e-5)
