"""How long GPU work takes: medians over replays of a CUDA graph, each over inputs that do not fit the L2 cache."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unique_asr.attention.cuda_graph import pause_garbage_collection

REPLAYS = 25
GRAPH_SECONDS = 4e-3  # of work in a graph, at least: what starting it costs disappears


def describe(device: torch.device) -> str:
    """Return one line about the device and the versions that a number belongs to."""
    parts = [f"torch {torch.__version__}", f"Python {sys.version.split()[0]}"]
    if device.type == "cuda":
        import triton

        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        parts = [f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB", *parts, f"triton {triton.__version__}"]
    else:
        parts = [f"CPU, {torch.get_num_threads()} threads", *parts]
    return " | ".join(parts)


def time_graph(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Return the seconds of one call, in one captured graph: the median over replays.

    Args:
        calls: differ in the memory that they read.
        replays: of the graph that are timed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        stream.synchronize()
        once = time.perf_counter() - start
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, min(200 // len(calls), round(GRAPH_SECONDS / once)))
    graph = torch.cuda.CUDAGraph()
    with pause_garbage_collection(), torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for replay in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times) / (rounds * len(calls))


def measure_copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second, read and written, of copying 2 GB on the device."""
    source = torch.empty(1 << 30, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_graph([lambda: target.copy_(source)])


def attempt(measure: Callable[[], Any]) -> Any:
    """Return the result of a measurement; if it fails, print why and return None."""
    try:
        return measure()
    except Exception as error:
        print(f"  failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
        traceback.print_exc(limit=-4)
        return None
