"""The choice of pages against a stable sort."""

import pytest
import torch
from unique_asr.kernels.top_pages import MAX_PAGES, top_pages


def expected(scores, count):
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
    return best.to(torch.int32)


@pytest.mark.parametrize(
    ("pages", "count"), [(1, 1), (7, 3), (64, 64), (100, 99), (500, 63), (4096, 64), (4225, 512), (MAX_PAGES, 64)]
)
def test_exact(pages, count):
    torch.manual_seed(pages)
    scores = torch.randn(6, pages)
    scores[1] = torch.randint(-3, 3, (pages,)).float()  # many equal ones
    scores[2] *= 0.0  # both zeros
    scores[3, ::3] = torch.inf
    scores[4] = -torch.rand(pages) * 1e-40  # subnormal
    scores[5] = torch.randn(pages).exp() * 1e30
    out = torch.full((6, count), -7, dtype=torch.int32)
    assert top_pages(scores, count, out) is out
    assert torch.equal(out, expected(scores, count))


def test_pages_that_may_not_be_chosen():
    scores = torch.full((2, 3, 90), -torch.inf)
    scores[0, 0, [4, 70]] = torch.tensor([-1e38, 3.0])
    scores[1, 2, 5:15] = torch.arange(10.0)
    chosen = top_pages(scores, 8)
    assert chosen.shape == (2, 3, 8)
    assert chosen[0, 0].tolist() == [4, 70] + [-1] * 6
    assert chosen[1, 2].tolist() == list(range(7, 15))
    assert (chosen[0, 1] == -1).all()


def test_nan_is_never_chosen():
    scores = torch.randn(2, 90)
    scores[0, [3, 40]] = torch.tensor([torch.nan, -torch.nan])
    scores[0, 7] = torch.inf
    scores[1, 5:] = torch.nan
    chosen = top_pages(scores, 60)
    assert torch.equal(chosen[:1], expected(scores[:1].nan_to_num(-torch.inf, torch.inf), 60))
    assert chosen[1].tolist() == [0, 1, 2, 3, 4] + [-1] * 55


def test_too_many_pages_are_refused():
    with pytest.raises(ValueError, match="at most"):
        top_pages(torch.zeros(1, MAX_PAGES + 1), 4)
