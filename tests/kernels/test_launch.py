"""Functions that launch kernels do so on the device of their tensors, with counters of their stream."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import make_case
from unique_asr.kernels.page_scores import page_scores, select_pages, select_pages_in_two_levels
from unique_asr.kernels.page_statistics import append, write_page_statistics
from unique_asr.kernels.soft_mask_attention import training_attention
from unique_asr.kernels.sparse_decode import sparse_decode
from unique_asr.kernels.sparse_step import sparse_step
from unique_asr.kernels.top_pages import _top_pages, top_pages

from unique_asr.attention import TrainingAttentionConfig
from unique_asr.kernels import launch, paging


def run_every_function():
    case = make_case([64], 64, heads=1, group=1, dim=16)
    step, how = (case.query, case.statistics, case.lengths), ("unique", 0.5, 8)
    token = torch.zeros(2, 1, 1, 1, 16)
    page_scores(*step, *how)
    pages = select_pages(*step, 2, *how)
    select_pages(*step, 2, *how, fused=False)
    select_pages_in_two_levels(*step[:2], case.expected_statistics(16), case.lengths, 2, 2, *how, 2)
    top_pages(torch.randn(1, 8), 2)
    write_page_statistics(case.plain_keys, case.empty_statistics(8), 0, 4, "unique")
    append(key=token[0], value=token[1], keys=case.keys, values=case.values, statistics=case.statistics,
           lengths=case.lengths, score="unique")  # fmt: skip
    sparse_decode(case.query, case.keys, case.values, pages, case.lengths, 0.25, 8)
    sparse_step(case.query, *token, case.keys, case.values, case.statistics, case.lengths, 2, "unique", 0.5)
    query, key, value = torch.randn(3, 1, 1, 64, 16, requires_grad=True)
    config = TrainingAttentionConfig.from_dict({"budget": 32})
    training_attention(query, key, value, config).sum().backward()


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    inside, launches = [], []

    @contextmanager
    def use_device(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    kind = type(_top_pages)
    find = kind.__getitem__

    def record(kernel, grid):
        launches.append((kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__, bool(inside)))
        return find(kernel, grid)

    monkeypatch.setattr(launch, "use_device", use_device)
    monkeypatch.setattr(kind, "__getitem__", record)
    run_every_function()
    assert len({name for name, _ in launches}) == 12
    assert not {name for name, guarded in launches if not guarded}


def test_only_another_device_is_made_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("used", device.index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    on = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in range(2)]
    assert launch.use_device(on[1]) == ("used", 1)
    for tensor in (on[0], torch.zeros(1)):
        assert launch.use_device(tensor) is launch.HERE
        with launch.use_device(tensor):
            pass


@pytest.fixture
def streams(monkeypatch):
    """CUDA without a GPU: `streams.now` is the current stream."""
    made = SimpleNamespace(now=1, capturing=False)
    zeros = torch.zeros
    monkeypatch.setattr(paging, "_pools", {})
    monkeypatch.setattr(paging, "_counters", {})
    current = lambda device: SimpleNamespace(cuda_stream=made.now, synchronize=lambda: None)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **how: zeros(*size, **how))
    return made


def test_each_stream_has_counters_of_its_own(streams):
    device, found = torch.device("cuda:0"), {}
    for streams.now in range(1, 40):
        found[streams.now] = paging.get_counters(5, device)
    assert len({each.data_ptr() for each in found.values()}) == 39
    for streams.now in range(1, 40):
        assert paging.get_counters(5, device) is found[streams.now]


def test_a_capture_on_another_stream_finds_counters_once_a_step_has_run(streams):
    device = torch.device("cuda:0")
    streams.capturing = True
    with pytest.raises(RuntimeError, match="once before it is captured"):
        paging.get_counters(5, device)
    streams.capturing = False
    first = paging.get_counters(5, device)
    streams.now, streams.capturing = 2, True
    assert paging.get_counters(5, device).data_ptr() != first.data_ptr()
