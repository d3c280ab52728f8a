"""A step of fixed shapes as a CUDA graph: one launch instead of one for each kernel."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from unique_asr.kernels.launch import use_device

CAPTURE_LOCK = threading.Lock()  # beginning a capture waits for the whole device, which no other capture survives


def capture_graph(step: Callable[[], None], changed: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    """Capture a step in a CUDA graph. Several threads may call this.

    Args:
        step: reads and writes tensors in place, and touches nothing on the host. It runs twice: once to warm up, which
            CUDA's libraries need, and once to be captured.
        changed: tensors that a step must not change twice, on its device. The warm-up is undone in them; what it wrote
            elsewhere the first replay writes again.

    Returns:
        The graph; its `replay()` runs the step.
    """
    before = [state.clone() for state in changed]
    with CAPTURE_LOCK, use_device(changed[0]):
        stream = get_capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        for state, value in zip(changed, before, strict=True):
            state.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with pause_garbage_collection(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()  # other threads may use the device
    return graph


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Keep Python from collecting cycles within the block: freeing a CUDA graph ends the capture of another one.

    It holds for the whole process, so only one thread at a time may be in such a block.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def get_capture_stream(device: int) -> torch.cuda.Stream:
    """Return one stream for all captures: PyTorch has only 32, and gives them out again, to other threads too."""
    return torch.cuda.Stream(device)
