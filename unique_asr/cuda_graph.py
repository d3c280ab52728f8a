"""A step of fixed shapes as a CUDA graph: one launch in place of one a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def captured(step: Callable[[], None], changed: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    """The graph of a step that reads and writes tensors in place, and nothing on the host.

    changed: the tensors that a step must not change twice. A first run, which CUDA's libraries need, is taken back in
        them; what it wrote elsewhere the first replay writes again.
    """
    before = [state.clone() for state in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for state, value in zip(changed, before, strict=True):
        state.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
        step()
    return graph
