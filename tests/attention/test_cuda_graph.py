"""What a capture asks of Python, without a GPU; tests/gpu/test_batch_gpu.py captures."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from unique_asr.attention import cuda_graph
from unique_asr.attention.cuda_graph import capture_graph, pause_garbage_collection


def test_a_step_runs_once_to_warm_up_and_once_to_be_captured(monkeypatch):
    """With CUDA's part replaced: what the first run changed is taken back, and nothing is collected in the second."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(cuda_graph, "get_capture_stream", lambda device: stream)
    for name, value in {
        "current_device": lambda: 0,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "CUDAGraph": object,
        "graph": lambda graph, **how: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    numbers, collecting = torch.zeros(4), []

    def step():
        collecting.append(gc.isenabled())
        numbers.add_(1)

    capture_graph(step, [numbers])
    assert collecting == [True, False]
    assert numbers.tolist() == [1.0] * 4
    assert gc.isenabled()


def test_nothing_is_collected_during_a_capture():
    with pause_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collecting_goes_on_after_an_error_and_stays_off_where_it_was():
    with pytest.raises(RuntimeError), pause_garbage_collection():
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with pause_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
