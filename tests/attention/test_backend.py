"""Which backend runs."""

import pytest
import torch
from paged_layers import DEVICE

from unique_asr.attention import (
    SparseAttentionConfig,
    SparsityCounters,
    backend,
)
from unique_asr.attention.paged_layer import PagedLayer


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CUDA")
def test_triton_without_cuda_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not backend.uses_triton("auto", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        PagedLayer(SparseAttentionConfig(backend="triton"), None).update(*torch.zeros(2, 1, 1, 8, 16))


def test_values_of_another_width_are_left_to_pytorch():
    layer = PagedLayer(SparseAttentionConfig(budget=96, backend="triton"), SparsityCounters())
    layer.update(torch.randn(1, 2, 301, 16, device=DEVICE), torch.randn(1, 2, 301, 8, device=DEVICE))
    assert not layer.triton
