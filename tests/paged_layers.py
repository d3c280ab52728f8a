"""Layers of a paged cache with random tokens, for tests of attention.

Their random keys have clearly different pages.
"""

import torch

from unique_asr.attention import (
    SparseAttentionConfig,
    SparsityCounters,
    backend,
)
from unique_asr.attention.paged_layer import PagedLayer

HEADS, GROUP, DIM = 3, 3, 16  # KV heads, query heads of each, head dim
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EIGHT_BITS = "fp8" if torch.cuda.is_available() else "int8"


def filled_layer(config, length, batch=1, seed=0):
    """A layer that holds random tokens of clearly different pages, and a query."""
    torch.manual_seed(seed)
    layer = PagedLayer(config, SparsityCounters())
    shift = torch.randn(batch, HEADS, length // 4 + 1, DIM).repeat_interleave(4, dim=2)[:, :, :length]
    layer.update(shift + torch.randn(batch, HEADS, length, DIM), torch.randn(batch, HEADS, length, DIM))
    return layer, torch.randn(batch, HEADS * GROUP, 1, DIM)


def make_layer_pair(config, length, batch=2, heads=2, group=3, dim=16, seed=0):
    """The same random tokens in a layer of each backend, PyTorch's first, and a query."""
    torch.manual_seed(seed)
    shift = torch.randn(batch, heads, length // 4 + 1, dim).repeat_interleave(4, dim=2)[:, :, :length]
    keys, values = shift + torch.randn(shift.shape), torch.randn(shift.shape)
    pair = []
    for name in ("torch", "triton"):
        options = config | {"backend": name}
        layer = PagedLayer(SparseAttentionConfig(**options), SparsityCounters())
        layer.update(keys.to(DEVICE), values.to(DEVICE))
        pair.append(layer)
    return *pair, torch.randn(batch, heads * group, 1, dim).to(DEVICE)


def record_calls(monkeypatch, name):
    """Let every call of this kernel be appended to the list that is returned."""
    calls, function = [], getattr(backend.load_kernels(), name)

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(backend.load_kernels(), name, spy)
    return calls
