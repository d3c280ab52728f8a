"""Attention over selected pages in Triton against float64."""

import pytest
import torch
from kernel_cases import make_case
from unique_asr.kernels.sparse_decode import DecodeTile, sparse_decode

LAYOUTS = {
    "even": {"lengths": [256, 201], "dim": 64, "group": 4},
    "odd": {"lengths": [250, 3], "dim": 80, "group": 3, "heads": 3},
    "padded": {"lengths": [249, 249], "starts": [0, 131], "group": 1, "dim": 96},
    "blocks": {"lengths": [256, 130], "block_tokens": 64, "group": 7, "page_size": 16},
    "blocks_padded": {"lengths": [256, 130], "block_tokens": 16, "starts": [17, 64], "dtype": torch.float16},
    "large": {"lengths": [250], "page_size": 64, "dim": 256, "heads": 1, "group": 16},
}


def random_pages(case, count):
    """Complete pages of every row, in order, and -1 where there are not enough."""
    pages = torch.full((len(case.lengths), case.heads, count), -1, dtype=torch.int32)
    for b, length in enumerate(case.lengths.tolist()):
        complete = (length - 1) // case.page_size
        for h in range(case.heads):
            some = torch.randperm(complete)[:count].sort().values
            pages[b, h, : len(some)] = some
    return pages


def check(case, pages, **options):
    scaling = case.query.shape[-1] ** -0.5
    out = torch.full_like(case.query, torch.nan)
    got = sparse_decode(
        case.query, case.keys, case.values, pages, case.lengths, scaling, case.page_size,
        case.starts, case.block_table, out=out, **options,
    )  # fmt: skip
    assert got is out
    tolerance = 1e-5 if case.query.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got.double(), case.output(pages, scaling), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("splits", [None, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout, splits):
    torch.manual_seed(0)
    case = make_case(capacity=256, **LAYOUTS[layout])
    check(case, random_pages(case, 11 if case.page_size < 64 else 3), splits=splits)


@pytest.mark.parametrize("tile", [DecodeTile(16), DecodeTile(16, 2, stages=3), DecodeTile(64, 2), DecodeTile(128)])
def test_tiles(tile):
    torch.manual_seed(0)
    case = make_case([256, 120], 256, group=9)
    check(case, random_pages(case, 17), tile=tile)


def test_logits_of_any_size():
    torch.manual_seed(0)
    case = make_case([256, 256], 256)
    case.query *= 300
    check(case, random_pages(case, 9), tile=DecodeTile(16))


def test_an_empty_sequence_gives_zeros():
    torch.manual_seed(0)
    case = make_case([64, 40], 64)
    lengths = torch.tensor([0, 40], dtype=torch.int32)
    pages = torch.full((2, 2, 4), -1, dtype=torch.int32)
    out = sparse_decode(case.query, case.keys, case.values, pages, lengths, 0.1, 8)
    assert out[0].count_nonzero() == 0
    assert out[1].isfinite().all()


def test_keys_and_values_in_one_buffer():
    """Views of a packed cache have strides of their own."""
    torch.manual_seed(0)
    case = make_case([100, 77], 128)
    packed = torch.stack([case.keys, case.values]).transpose(2, 3).contiguous()  # [2, B, N, K, D]
    case.keys, case.values = packed.transpose(2, 3)
    check(case, random_pages(case, 5))
