"""A step of fixed shapes as a CUDA graph: one launch in place of one a kernel."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

ALONE = threading.Lock()  # beginning a capture waits for the whole device, which no other capture survives


def captured(step: Callable[[], None], changed: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    """The graph of a step that reads and writes tensors in place, and nothing on the host; threads may call it.

    changed: the tensors that a step must not change twice. A first run, which CUDA's libraries need, is taken back in
        them; what it wrote elsewhere the first replay writes again.
    """
    before = [state.clone() for state in changed]
    with ALONE:
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        for state, value in zip(changed, before, strict=True):
            state.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with garbage_kept(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()  # other threads may use the device
    return graph


@contextmanager
def garbage_kept() -> Iterator[None]:
    """No cycle is collected meanwhile: one may hold a graph, and to free a graph ends the capture of another.

    For the whole process, so for one thread at a time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: PyTorch has 32 streams in all, and gives them out again, to other threads too."""
    return torch.cuda.Stream(device)
