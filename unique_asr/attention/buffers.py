"""Buffers that follow the slots of a cache: [B, K, slots, width], or [B, K, slots / S, width] with an entry a page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unique_asr.attention.scores import LARGEST


@contextmanager
def writable_in_any_mode() -> Iterator[None]:
    """Make buffers within the block: what `torch.inference_mode` makes cannot be written outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def make_buffer(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Make a buffer of zeros on the device of `like` that may be written in any mode.

    Args:
        dtype: None: that of `like`.
    """
    with writable_in_any_mode():
        return torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)


def grow_buffer(buffer: Tensor, used: int, size: int) -> Tensor:
    """Copy a buffer into a larger one.

    Args:
        buffer: [B, K, n, width].
        used: entries of dimension 2 to keep, from the first on.
        size: entries of the new buffer.

    Returns:
        [B, K, size, width], zero beyond `used`.
    """
    new = make_buffer(buffer, *buffer.shape[:2], size, buffer.shape[-1])
    new[:, :, :used] = buffer[:, :, :used]
    return new


def shift_entries(buffer: Tensor, by: int, used: int) -> None:
    """Move the first `used` entries of dimension 2 by `by` places, in place; entries before the first are dropped."""
    kept = slice(max(0, -by), used)
    if kept.start < used:
        buffer[:, :, kept.start + by : used + by] = buffer[:, :, kept].clone()


def view_as_bytes(statistic: Tensor) -> Tensor:
    """View 8-bit statistics as bytes, for operations that PyTorch has for few dtypes; return others unchanged."""
    return statistic.view(torch.uint8) if statistic.dtype in LARGEST else statistic
