"""The rivals on contexts made so that their papers say what happens."""

import pytest
import torch
from decoded_prompts import decode_together
from simulated_speech import Model, Processor, ScriptedDecoder, encode, said, timeline
from transformers import LlamaConfig

from unique_asr.attention import DecodeStep, PagedCache, SparseAttentionConfig
from unique_asr.attention.huggingface import unique_attention_forward
from unique_asr.decoding import batch as batch_decoding
from unique_asr.decoding.batch import BatchEngine
from unique_asr.evaluation.methods import (
    H2O,
    METHODS,
    InfLLM,
    Murmur,
    RivalConfig,
    Sliding,
    StreamingLLM,
    rivals_active,
)
from unique_asr.evaluation.methods.base import rival_attention_forward
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.passes import PassRunner

DIM, PROMPT, NEEDLE, BUDGET = 16, 512, 200, 64
SCALING = DIM**-0.5


def rival(method, budget=BUDGET, **options):
    return RivalConfig(budget=budget, score="mean", method=method, **options)


class Layer:
    """One layer of a model: two query heads over one KV head, prompts and steps given as vectors."""

    def __init__(self, config):
        model = LlamaConfig(
            hidden_size=2 * DIM, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=DIM
        )
        self.cache = PagedCache(model, config)
        self.forward = rival_attention_forward if isinstance(config, RivalConfig) else unique_attention_forward
        self.module = torch.nn.Module()

    def __call__(self, queries, keys, values, mask=None):
        """queries [N, D] for both heads, keys and values [N, D] -> [N, D], the mean over the heads; or [B, N, D]."""
        if queries.dim() == 2:
            return self(queries[None], keys[None], values[None])[0]
        keys, values = self.cache.layers[0].update(keys[:, None], values[:, None])
        query = queries[:, None].expand(-1, 2, -1, -1)
        return self.forward(self.module, query, keys, values, mask, scaling=SCALING)[0].mean(dim=2)


def needle_found(config, attended=False, later=0):
    """Whether a step that asks for the needle, a key of its own direction, reads its value.

    attended: the tokens after the needle look at it. later: steps before the question.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(PROMPT + later + 1, DIM, generator=generator) for _ in range(3))
    keys[:, 0] *= 0.1
    queries[:, 0] = 0
    keys[NEEDLE] = 0
    keys[NEEDLE, 0] = 12
    values[NEEDLE] = 100
    if attended:
        queries[NEEDLE + 1 : NEEDLE + 40, 0] = 6
    queries[-1] = 0
    queries[-1, 0] = 8
    layer = Layer(config)
    layer(queries[:PROMPT], keys[:PROMPT], values[:PROMPT])
    for step in range(PROMPT, PROMPT + later + 1):
        output = layer(*(vectors[step : step + 1] for vectors in (queries, keys, values)))
    assert layer.cache.counters.sparse_steps == (later + 1 if config.budget else 0)
    return bool((output > 90).all())


@pytest.mark.parametrize("attended", [False, True])
@pytest.mark.parametrize("score", ["unique", "quest", "mean", "second_moment"])
def test_every_token_stays_reachable_for_scores_of_pages(score, attended):
    assert needle_found(SparseAttentionConfig(budget=None), attended)
    assert needle_found(SparseAttentionConfig(budget=BUDGET, score=score), attended)


@pytest.mark.parametrize(
    ("method", "unattended", "attended"),
    [
        (StreamingLLM(), False, False),  # beyond the window all is lost
        (H2O(), False, True),  # only what got attention before is kept
        (InfLLM(), False, True),  # only what its local window looked at represents a block
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_needle_beyond_the_window(method, unattended, attended):
    assert needle_found(rival(method)) is unattended
    assert needle_found(rival(method), attended=True) is attended


def test_streaming_keeps_what_the_window_and_the_sinks_hold():
    assert needle_found(rival(StreamingLLM(sink=4), budget=PROMPT + 1 - NEEDLE + 4 + 3))
    assert needle_found(rival(StreamingLLM(sink=NEEDLE + 1), budget=256))


def test_murmur_evicts_speech_as_the_text_advances():
    method = Murmur(sink=8, delay=4, rate=4.0, output_sink=2)
    assert needle_found(rival(method), later=2)
    assert needle_found(rival(method), later=4 + (NEEDLE - 8) // 4 - 1)
    assert not needle_found(rival(method), later=4 + (NEEDLE - 8) // 4 + 1)


def test_murmur_keeps_its_windows():
    method = Murmur(sink=8, delay=4, rate=1.0, output_sink=2)
    method.begin(rival(method))
    method.reset(torch.zeros(1))
    method.prompt(None, torch.zeros(1, 1, 100, DIM), None, SCALING)
    window = (BUDGET - 10) // 2
    for total, gone in ((101, 0), (104, 0), (110, 6), (150, 46), (1000, 100 - 8 - window)):
        read = method.choose(None, None, torch.arange(total).view(1, 1, -1), torch.tensor([total - 1]))[0, 0]
        assert method.reads(total) == read.sum()
        assert read[:8].all()
        assert read[8:100].tolist() == [False] * gone + [True] * (92 - gone)
        latest = max(102, total - window)
        assert read[100:].tolist() == ([True] * 2 + [False] * (latest - 102) + [True] * (total - latest))[: total - 100]
    assert method.reads(1000) == BUDGET


def naive_attention(queries, keys):
    """[2 heads merged, N, N]: what every token of a prompt gave to those before it, both heads alike."""
    logits = queries @ keys.T * SCALING
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("chunks", [(300,), (100, 150, 50)])
def test_heavy_hitters_are_the_column_sums_of_attention(chunks):
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(301, DIM, generator=generator) for _ in range(3))
    layer, start = Layer(rival(H2O())), 0
    for count in (*chunks, 1):
        span = slice(start, start + count)
        layer(queries[span], keys[span], values[span])
        start += count
    method = layer.cache.layers[0].method
    mass = 2 * naive_attention(queries[:300], keys[:300]).sum(dim=0)
    kept_mass = method.masses[0, 0, :301, 301 % 2]
    kept = kept_mass.isfinite().nonzero().flatten().tolist()
    heavy = mass[: 301 - BUDGET // 2].topk(BUDGET // 2).indices.sort().values.tolist()
    assert kept == heavy + list(range(301 - BUDGET // 2, 301))
    weights = (queries[300] @ keys[kept].T * SCALING).softmax(dim=-1)
    after = torch.nn.functional.pad(mass, (0, 1)).index_add(0, torch.tensor(kept), 2 * weights)
    torch.testing.assert_close(kept_mass[kept], after[kept])


@pytest.mark.parametrize("chunks", [(300,), (100, 150, 50)])
def test_representatives_are_what_the_following_queries_look_at(chunks):
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(301, DIM, generator=generator) for _ in range(3))
    layer, start = Layer(rival(InfLLM(representatives=2), page_size=8)), 0
    for count in (*chunks, 1):
        span = slice(start, start + count)
        output = layer(queries[span], keys[span], values[span])
        start += count
    window, local = BUDGET // 2, (301 - BUDGET // 2) // 8 * 8
    represented = []
    for first in range(0, local, 8):
        score = [2 * (queries[m + 1 : m + 1 + window] @ keys[m]).sum() for m in range(first, first + 8)]
        best = torch.stack(score).topk(2).indices + first
        represented.append(keys[best].sum(dim=0))
    method = layer.cache.layers[0].method
    torch.testing.assert_close(method.represented[0, 0, : local // 8], torch.stack(represented), rtol=1e-4, atol=1e-4)
    relevance = torch.stack(represented)[1:] @ queries[300]
    count = (BUDGET - (301 - local)) // 8 - 1
    blocks = [0, *(relevance.topk(count).indices + 1).tolist()]
    tokens = sorted(token for block in blocks for token in range(8 * block, 8 * block + 8)) + list(range(local, 301))
    assert len(tokens) <= BUDGET
    weights = (queries[300] @ keys[tokens].T * SCALING).softmax(dim=-1)
    torch.testing.assert_close(output[0], weights @ values[tokens])


def batch_outputs(name, padding, rows=slice(None), garbage=1e3, begin=0):
    """[B, 20, D]: steps after a prompt in two chunks, for two rows of which the second is padded with `garbage`."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(2, 420, DIM, generator=generator) for _ in range(3)]
    for each in vectors:
        each[1, :padding] = garbage
    layer = Layer(rival(METHODS[name](), budget=96, page_size=8))
    mask, outputs, start = torch.arange(420) >= torch.tensor([[0], [padding]]), [], begin
    for end in (250, *range(400, 421)):
        if end <= start:
            continue
        seen = mask[rows, None, None, begin:end]
        outputs.append(layer(*(each[rows, start:end] for each in vectors), None if seen.all() else seen))
        start = end
    return torch.stack([output[:, 0] for output in outputs[-20:]], dim=1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padding", [40, 312, 320])
def test_a_row_of_a_batch_reads_what_it_reads_alone(name, padding):
    together = batch_outputs(name, padding)
    torch.testing.assert_close(together[:1], batch_outputs(name, padding, rows=slice(1)))
    torch.testing.assert_close(together[1:], batch_outputs(name, padding, rows=slice(1, 2), begin=padding))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padding", [3, 45, 309])  # pages are cut by it
def test_nobody_reads_padding(name, padding):
    torch.testing.assert_close(batch_outputs(name, padding), batch_outputs(name, padding, garbage=-7.0))


def test_the_first_block_of_a_row_is_read_however_short():
    assert torch.isfinite(batch_outputs("infllm", 45)).all()
    layer = Layer(rival(InfLLM(), page_size=8))
    keys, values = torch.zeros(1, 301, DIM), torch.zeros(1, 301, DIM)
    values[0, 45:48] = 100  # the rest of its page
    mask = (torch.arange(301) >= 45)[None, None, None]
    for span in (slice(0, 300), slice(300, 301)):
        output = layer(keys[:, span], keys[:, span], values[:, span], mask[..., : span.stop])
    assert output.mean() > 100 * 3 / BUDGET - 0.1


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_holds_everything_is_dense(name):
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(60, DIM, generator=generator) for _ in range(3))
    outputs = []
    for config in (rival(METHODS[name](), budget=128), SparseAttentionConfig(budget=None)):
        layer = Layer(config)
        layer(queries[:59], keys[:59], values[:59])
        outputs.append(layer(queries[59:], keys[59:], values[59:]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("budget", [96, 160])  # sparse from the first step on, and after some steps
@pytest.mark.parametrize("name", METHODS)
def test_static_steps_choose_what_eager_ones_do(llama, name, budget, monkeypatch):
    """Padded rows, two waves, a cache that grows, and every step run twice, as the warm-up of a capture does."""
    static = DecodeStep.static

    def twice(step, sparse):
        token = step.token.clone()
        static(step, sparse)
        step.token.copy_(token)
        static(step, sparse)

    monkeypatch.setattr(DecodeStep, "static", twice)
    monkeypatch.setattr(batch_decoding, "HEADROOM", 0)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1, length, 90, generator=generator) for length in (150, 137, 121)]
    config = rival(METHODS[name](), budget, page_size=8)
    with rivals_active():
        eager, captured = (BatchEngine(llama, config, static=value) for value in (False, True))
        for wave in (prompts, prompts[::-1]):
            expected = [(tokens, row.counters) for tokens, row in decode_together(eager, wave, [16] * 3, 3)]
            assert [(tokens, row.counters) for tokens, row in decode_together(captured, wave, [16] * 3, 3)] == expected
            assert any(counted.sparse_steps for _, counted in expected)


@pytest.mark.parametrize("name", ["unique", *METHODS])
@pytest.mark.parametrize("static", [False, True])
def test_rows_that_begin_beside_others_read_what_they_read_alone(llama, name, static, monkeypatch):
    """Those whose pages are cut as they are alone; every row, if the method has no pages."""
    starts, join = {}, BatchEngine._join

    def joined(rows, running, joining):
        chosen = join(rows, running, joining)
        starts.update((row, start) for row, start in zip(rows._places, rows._starts, strict=True) if row in joining)
        return chosen

    monkeypatch.setattr(BatchEngine, "_join", joined)
    generator = torch.Generator().manual_seed(3)
    lengths = [150, 137, 121, *torch.randint(100, 260, (21,), generator=generator).tolist()]
    counts = torch.randint(8, 40, (24,), generator=generator).tolist()
    prompts = [torch.randn(1, length, 90, generator=generator) for length in lengths]
    config = rival(METHODS[name](), 96, page_size=8) if name in METHODS else SparseAttentionConfig(budget=96)
    compared = 0
    with rivals_active():
        results = decode_together(BatchEngine(llama, config, static=static), prompts, counts, 3)
        for (tokens, row), prompt, count in zip(results, prompts, counts, strict=True):
            if name in ("unique", "infllm") and starts.get(row, 1) % 8:
                continue
            expected = decode_together(BatchEngine(llama, config, static=static), [prompt], [count], 1)[0]
            assert tokens == expected[0]
            torch.testing.assert_close(row.log_probs, expected[1].log_probs, rtol=1e-3, atol=1e-4)
            assert row.counters == expected[1].counters
            assert row.counters.sparse_steps == count - 1
            compared += 1
    assert len(starts) > 15
    assert compared >= (2 if name in ("unique", "infllm") else 24)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (StreamingLLM(sink=64), "needs more than its 64 sinks"),
        (InfLLM(local=0.9), "raise it"),
        (Murmur(), "sinks alone"),
    ],
)
def test_a_budget_too_small_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        rival(method, budget=64 if not isinstance(method, Murmur) else 32)


def test_sliding_windows_are_stitched_in_time():
    text = " ".join(f"w{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10]} went on{'.' * (n % 5 == 4)}" for n in range(100))
    model, processor = Model(), Processor()
    words = timeline(text)
    encoded = encode(model, processor, words)
    assert encoded.duration > 60
    sliding = Sliding(seconds=20.0, overlap=4.0)
    report = LongformReport()
    decoder = ScriptedDecoder(processor, lambda start, end: said(words, start, end))
    runner = PassRunner(model, processor)
    windows = sliding.transcribe(lambda part, own: runner.run(part, decoder, own), encoded, report)
    segments = list(windows)
    heard = " ".join(segment.text for segment in segments).split()
    assert heard == text.split(), "no word twice, and none left out"
    times = [word.start for segment in segments for word in segment.words]
    assert times == sorted(times)
    assert report.passes == len(decoder.passes) > 3
    assert report.coverage > 0.95
    with pytest.raises(ValueError, match="fills"):
        Sliding(seconds=10, overlap=5)
