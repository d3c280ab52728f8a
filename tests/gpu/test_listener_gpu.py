"""On a GPU: what a listener hears in captured steps is what it hears in eager ones.

python -m pytest tests/gpu/test_listener_gpu.py -m gpu
"""

import copy
import threading

import pytest
import torch
from small_whisper import SETTINGS, STOP, whisper_config

from unique_asr.models.speech_llm import listener as listening
from unique_asr.models.speech_llm.listener import MAX_CAPTURED_WINDOWS, Listener

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def listener():
    torch.manual_seed(0)
    made = Listener(whisper_config(80), **SETTINGS).cuda().eval()
    with torch.no_grad():
        table = made.decoder.embed_tokens.weight
        table[STOP] = 1.5 * table[38]  # so that texts end, at different lengths
    return made


def windows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 300, 32, generator=generator) + torch.randn(count, 1, 32, generator=generator)
    steps = torch.rand(count, 300, generator=generator) < 0.3 * torch.rand(count, 1, generator=generator)
    return states.cuda(), (steps.sum(1, keepdim=True) - steps.long().cumsum(1)).cuda()


def eager(listener, states, unheard, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(listening, "MAX_CAPTURED_WINDOWS", 0)
        return listener(states, unheard=unheard)


def assert_same(found, expected):
    assert found.counts.tolist() == expected.counts.tolist()
    assert torch.equal(found.tokens, expected.tokens)
    for row, count in enumerate(expected.counts.tolist()):
        assert torch.equal(found.frames[row, :count], expected.frames[row, :count])
        torch.testing.assert_close(found.hidden[row, :count], expected.hidden[row, :count], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.weights[row, :count], expected.weights[row, :count], atol=1e-4, rtol=1e-3)


def test_captured_steps_hear_what_eager_ones_do(listener, monkeypatch):
    """Groups of several sizes, larger than the one before or smaller; windows that are read again are among them."""
    readings, lengths = [], set()
    read = listener._read
    monkeypatch.setattr(listener, "_read", lambda states, *rest: readings.append(len(states)) or read(states, *rest))
    for seed, count in enumerate([3, 6, 2, 9, 9]):
        states, unheard = windows(count, seed)
        expected = eager(listener, states, unheard, monkeypatch)
        assert_same(listener(states, unheard=unheard), expected)
        lengths |= set(expected.counts.tolist())
    assert listener._captured.reading.windows == 16
    assert len(readings) > 10  # some were read again
    assert len(lengths) > 2


def test_more_windows_than_a_graph_is_made_for_are_heard_eagerly(listener, monkeypatch):
    states, unheard = windows(MAX_CAPTURED_WINDOWS + 1, 0)
    assert_same(listener(states, unheard=unheard), eager(listener, states, unheard, monkeypatch))
    assert listener._captured.reading is None or listener._captured.reading.windows <= MAX_CAPTURED_WINDOWS


def test_weights_that_move_or_change_are_heard_with(listener, monkeypatch):
    states, unheard = windows(4, 1)
    before = listener(states, unheard=unheard)
    with torch.no_grad():
        listener.decoder.embed_tokens.weight[:STOP] += 0.5 * torch.randn(STOP, 32, device="cuda")
    changed = listener(states, unheard=unheard)
    assert not torch.equal(changed.weights, before.weights)
    assert_same(changed, eager(listener, states, unheard, monkeypatch))
    listener.cpu()
    kept = torch.randn(1 << 20, device="cuda")  # where the weights were
    listener.cuda()
    assert_same(listener(states, unheard=unheard), changed)
    del kept


def test_a_copy_has_a_graph_of_its_own(listener):
    states, unheard = windows(4, 2)
    before = listener(states, unheard=unheard)
    other = copy.deepcopy(listener)
    assert other._captured.reading is None
    assert_same(other(states, unheard=unheard), before)
    assert_same(listener(states, unheard=unheard), before)


def test_two_threads_hear_at_once(listener):
    cases = [windows(4, seed) for seed in range(6)]
    expected = [listener(states, unheard=unheard) for states, unheard in cases]
    found = [None] * len(cases)

    def hear(index):
        states, unheard = cases[index]
        found[index] = listener(states, unheard=unheard)

    threads = [threading.Thread(target=hear, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected):
        assert_same(one, other)
