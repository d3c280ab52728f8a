"""UNIQUE's selection."""

import torch
from paged_layers import make_layer_pair

from unique_asr.attention import (
    backend,
)
from unique_asr.attention.steps import attend_to_pages


def test_more_pages_than_the_kernel_can_choose_from(monkeypatch):
    plain, triton, query = make_layer_pair({"budget": 96}, 301)
    monkeypatch.setattr(backend.load_kernels(), "MAX_PAGES", 16)
    torch.testing.assert_close(
        attend_to_pages(triton, query, 0.25), attend_to_pages(plain, query, 0.25), rtol=1e-4, atol=1e-4
    )


def test_every_super_page_is_every_page():
    """Two levels that look into all super-pages select as one level does."""
    config = {"budget": 96, "super_page_size": 64}
    _, _, query = make_layer_pair({"budget": 96}, 501)
    one, _, _ = make_layer_pair({"budget": 96}, 501)
    two, _, _ = make_layer_pair(config | {"super_pages": 8}, 501)
    few, _, _ = make_layer_pair(config | {"super_pages": 3}, 501)
    expected = attend_to_pages(one, query, 0.25)
    assert torch.equal(attend_to_pages(two, query, 0.25), expected)
    assert not torch.allclose(attend_to_pages(few, query, 0.25), expected)
