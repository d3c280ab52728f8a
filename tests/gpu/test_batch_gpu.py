"""On a GPU: rows side by side in captured steps, and what captured steps record of their selection.

python -m pytest tests/gpu/test_batch_gpu.py -m gpu
"""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from decoded_prompts import decode_together as ragged_together

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.cuda_graph import captured
from unique_asr.decoding import batch as batch_decoding
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.evaluation.methods import METHODS, RivalConfig, rivals_active
from unique_asr.longform.configuration import LongformConfig
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

SAMPLE = Path(__file__).parents[1] / "data" / "sample.opus"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def together(rows, prompts, count):
    """All prompts at once."""
    decoding = []
    for prompt in prompts:
        row = rows.new_sequence()
        row.prefill(prompt)
        decoding.append((row, row.tokens(count), []))
    while any(len(written) < count for _, _, written in decoding):
        rows.step()
        for _, tokens, written in decoding:
            for token in tokens:
                if token is PENDING:
                    break
                written.append(token)
    for row, _, _ in decoding:
        rows.remove(row)
    return [written for _, _, written in decoding]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("budget", [None, 1024])
def test_rows_write_what_they_write_alone(llama, budget, backend):
    """Dense, in float32; a second batch finds the captured steps of the first, and other padding."""
    llama.to("cuda")
    attention = SparseAttentionConfig(budget=budget, backend=backend)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1, length, 90, generator=generator).cuda() for length in (300, 77, 123, 64)]
    expected = []
    for prompt in prompts:
        decoder = GreedyDecoder(llama, attention, capacity=1024)
        decoder.prefill(prompt)
        expected.append(list(decoder.tokens(24)))
    rows = BatchEngine(llama, attention)
    assert rows.static
    assert together(rows, prompts, 24) == expected
    assert together(rows, prompts[::-1], 24) == expected[::-1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sparse_rows_are_those_of_uncaptured_steps(llama, backend):
    llama.to("cuda")
    attention = SparseAttentionConfig(budget=64, backend=backend)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1, length, 90, generator=generator).cuda() for length in (300, 177, 223)]
    captured, eager = (together(BatchEngine(llama, attention, static=static), prompts, 24) for static in (True, False))
    assert captured == eager


def ragged(count=16):
    """Prompts of 20 to 400 tokens on the GPU, and how many tokens are to follow."""
    generator = torch.Generator().manual_seed(1)
    lengths, counts = (torch.randint(*span, (count,), generator=generator).tolist() for span in ((20, 400), (4, 60)))
    return [torch.randn(1, length, 90, generator=generator).cuda() for length in lengths], counts


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("budget", [None, 1024])
def test_rows_that_begin_beside_others_write_what_they_write_alone(llama, budget, backend, monkeypatch):
    """In the places of those that ended, one at a time and several together."""
    llama.to("cuda")
    attention, (prompts, counts) = SparseAttentionConfig(budget=budget, backend=backend), ragged()
    for patience in (4, 1):
        monkeypatch.setattr(batch_decoding, "RUNNING_PER_WAITING", patience)
        for (tokens, _), prompt, count in zip(
            ragged_together(BatchEngine(llama, attention), prompts, counts, 4), prompts, counts, strict=True
        ):
            decoder = GreedyDecoder(llama, attention, capacity=1024)
            decoder.prefill(prompt)
            assert tokens == list(decoder.tokens(count))


def test_threads_decode_beside_each_other(llama):
    """Each on a stream of its own; captures of one do not disturb the others."""
    llama.to("cuda")
    attention = SparseAttentionConfig(budget=64)
    expected = [tokens for tokens, _ in ragged_together(BatchEngine(llama, attention), *ragged(), 4)]

    def decoded(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            return [tokens for tokens, _ in ragged_together(BatchEngine(llama, attention), *ragged(), 4)]

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decoded, range(8))) == [expected] * 8


@pytest.mark.parametrize("config", ["torch", "triton", *METHODS])
def test_sparse_rows_that_begin_beside_others_are_those_of_uncaptured_steps(llama, config, monkeypatch):
    monkeypatch.setattr(batch_decoding, "RUNNING_PER_WAITING", 1000)  # as uncaptured ones begin
    llama.to("cuda")
    if config in METHODS:
        attention = RivalConfig(budget=96, score="mean", method=METHODS[config]())
    else:
        attention = SparseAttentionConfig(budget=64, backend=config)
    with rivals_active():
        captured, eager = (
            ragged_together(BatchEngine(llama, attention, static=static), *ragged(), 4) for static in (True, False)
        )
    assert [tokens for tokens, _ in captured] == [tokens for tokens, _ in eager]
    assert [row.counters for _, row in captured] == [row.counters for _, row in eager]


@pytest.mark.parametrize("budget", [96, 320])
@pytest.mark.parametrize("name", METHODS)
def test_captured_rivals_choose_what_eager_ones_do(llama, name, budget):
    """Twice: the second time finds the captured steps of the first, and other prompts."""
    llama.to("cuda")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1, length, 90, generator=generator).cuda() for length in (250, 237, 301)]
    config = RivalConfig(budget=budget, score="mean", method=METHODS[name]())
    with rivals_active():
        captured, eager = (BatchEngine(llama, config, static=static) for static in (True, False))
        for wave in (prompts, prompts[::-1]):
            assert together(captured, wave, 40) == together(eager, wave, 40)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_captured_steps_keep_what_they_select(llama, backend):
    llama.to("cuda")
    attention = SparseAttentionConfig(budget=64, backend=backend)
    prompt = torch.randn(1, 300, 90, generator=torch.Generator().manual_seed(1)).cuda()
    kept = []
    for static in (True, False):
        decoder = GreedyDecoder(llama, attention, capacity=1024, static=static)
        for layer in decoder.cache.paged_layers:
            layer.keeps_selection = True
        decoder.prefill(prompt)
        steps = []
        for index, _ in enumerate(decoder.tokens(12)):
            if index:
                pages = torch.stack([layer.selected for layer in decoder.cache.paged_layers])
                steps.append(pages.sort(-1).values.tolist())
        kept.append(steps)
    assert kept[0] == kept[1]
    assert len({str(pages) for pages in kept[0]}) > 1  # not those of one step again and again


@pytest.mark.parametrize("attention", ["dense", "unique"])
def test_passes_of_one_recording_side_by_side(attention):
    """Of the shipped model, in float32: dense, what one pass after the other writes where all get to their end."""
    longform = LongformConfig(max_pass_seconds=15.0)
    texts = []
    for passes in (1, 3):
        transcriber = SpeechLLMTranscriber(
            device="cuda", dtype="float32", attention=attention, budget=64, longform=longform, parallel_passes=passes
        )
        segments, info = transcriber.transcribe(SAMPLE)
        texts.append(" ".join(segment.text for segment in segments))
        assert info.coverage > 0.95
        assert info.passes > 3
        assert (info.sparsity["sparse_steps"] > 0) is (attention == "unique")
        assert all(info.timings[stage] > 0 for stage in ("prefill", "decode"))
    if attention == "dense":
        assert texts[0] == texts[1]


def test_a_capture_outlives_what_is_collected_meanwhile():
    """A graph in a cycle, as that of a batch that got wider, is freed whenever Python collects."""
    numbers = torch.zeros(4, device="cuda")
    old = [captured(lambda: numbers.add_(1), [numbers]) for _ in range(4)]

    def step():  # runs twice, captured the second time
        loop = [old.pop(), old.pop()]
        loop.append(loop)
        del loop
        if gc.isenabled():
            gc.collect()  # as Python may at any time
        numbers.add_(100)

    graph = captured(step, [numbers])
    graph.replay()
    assert numbers.tolist() == [100.0] * 4
