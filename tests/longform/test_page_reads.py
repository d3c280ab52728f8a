"""Which part of a recording each token was read from: the picture, and what fills it."""

from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from unique_asr.attention import PagedCache, SparseAttentionConfig
from unique_asr.attention.huggingface import NAME, set_attention
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.longform.page_reads import PageReads, choose_ticks
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

DATA = Path(__file__).parents[1] / "data"

ATTENTION = SparseAttentionConfig(budget=32, page_size=8)


def cache_of(*selections):
    """A stand-in with what the layers selected, [K, k - 1] each; None for a layer that is dense."""
    selected = [None if pages is None else torch.tensor(pages, dtype=torch.int32)[None] for pages in selections]
    return SimpleNamespace(attention=ATTENTION, paged_layers=[SimpleNamespace(selected=pages) for pages in selected])


@pytest.fixture
def recording():
    """Ten bins of a second; 40 positions a quarter of one apart after 8 tokens of text, so pages 1 to 5 last 2 s."""
    reads = PageReads(bins=10)

    def record(cache):
        selected = [None if layer.selected is None else layer.selected.clone() for layer in cache.paged_layers]
        reads.begin_pass(8, np.arange(41) / 4, 10.0, cache)
        for layer, pages in zip(cache.paged_layers, selected, strict=True):
            layer.selected = pages
        return reads

    return record


def test_pages_are_put_where_their_audio_is(recording):
    reads = recording(cache_of(None, [[0, 1, 3]], [[1, 1, 5]]))  # the first page is text
    reads.step(0)
    reads.place(0, 0, 6.2, 6.9)
    expected = np.zeros(10)
    expected[0:2], expected[4:6], expected[8:10] = 1.5, 0.5, 0.5  # of two layers; one has page 1 twice
    np.testing.assert_allclose(reads.shares[6], expected)
    assert np.isnan(np.delete(reads.shares, 6, axis=0)).all()


def test_a_word_has_the_mean_of_its_tokens_in_every_second_that_it_lasts(recording):
    cache = cache_of([[1, 2, 3]])
    reads = recording(cache)
    reads.step(0)
    cache.paged_layers[0].selected.fill_(-1)  # a dense step
    reads.step(1)
    reads.step(2)  # of a word that is dropped
    reads.place(0, 1, 3.5, 5.5)
    for row in (3, 4, 5):
        np.testing.assert_allclose(reads.shares[row], [1] * 6 + [0.5] * 4)
    reads.begin_pass(8, np.arange(41) / 4, 10.0, cache)
    reads.place(2, 2, 8.0, 9.0)  # forgotten with its pass
    assert np.isnan(reads.shares[8]).all()


def test_memory_does_not_grow(recording):
    reads = recording(cache_of([[1, 2, 3]]))
    for token in range(5000):
        reads.step(token)
        reads.place(token, token, 0.0, 10.0)
    assert len(reads._open) == 0
    assert reads.shares.shape == (10, 10)


@pytest.mark.parametrize("static", [False, True])
def test_steps_keep_what_they_select(llama, static):
    """The copies are those pages that the newest step chose, and no layer keeps any unless asked."""
    decoder = GreedyDecoder(llama, ATTENTION, capacity=256, static=static)
    for layer in decoder.cache.paged_layers[1:]:
        layer.keeps_selection = True
    decoder.prefill(torch.randn(1, 80, 90, generator=torch.Generator().manual_seed(0)))
    layers = decoder.cache.paged_layers
    seen = [[layer.selected.clone() for layer in layers if layer.selected is not None] for _ in decoder.tokens(4)]
    assert seen[0] == []  # the first token needs no step
    assert decoder.cache.paged_layers[0].selected is None
    for selections in seen[1:]:
        assert len(selections) == 2
        for pages in selections:
            assert pages.shape == (1, 3, ATTENTION.pages - 1)
            assert ((pages >= 0) & (pages < 80 // 8 + 1)).all()
    assert any((one != other).any() for one, other in zip(seen[1], seen[3], strict=True))
    set_attention(llama, NAME)
    assert PagedCache(llama.config).paged_layers[0].keeps_selection is False


def test_a_transcription_is_recorded_and_not_changed():
    """The shipped model on real speech, whose context of about 90 tokens is read in part."""
    transcriber = SpeechLLMTranscriber(device="cpu", budget=48)
    plain = list(transcriber.transcribe(DATA / "nomads.opus")[0])
    reads = PageReads(bins=24)
    segments, info = transcriber.transcribe(DATA / "nomads.opus", reads=reads)
    segments = list(segments)
    assert segments == plain
    assert info.sparsity["sparse_steps"] > 15
    shares = reads.shares
    said = {int(word.start / info.duration * 24) for segment in segments for word in segment.words}
    assert len(said) > 5
    assert said <= set(np.flatnonzero(~np.isnan(shares[:, 0])))
    assert np.nanmin(shares) >= 0
    assert np.nanmax(shares) <= 1
    assert 0.05 < np.nanmean(shares) < 0.9


def test_dense_steps_read_all(tiny):
    reads = PageReads(bins=24)
    decoder = GreedyDecoder(tiny[0].language_model, SparseAttentionConfig(budget=None), capacity=64)
    decoder.prefill(torch.randn(1, 20, 32))
    reads.begin_pass(4, 1 + np.arange(13) / 3, 6.0, decoder.cache)  # of a pass from the first second to the fifth
    for index, _ in enumerate(decoder.tokens(3)):
        reads.step(index)
        reads.place(index, index, index, index + 0.1)
    np.testing.assert_array_equal(reads.shares[4], [0] * 4 + [1] * 16 + [0] * 4)


def test_a_position_lasts_until_the_next(recording):
    """Positions that are far apart leave no holes, and those of one column share it by their time."""
    reads, cache = PageReads(bins=4), cache_of([[1, 1, 1]])
    pages = cache.paged_layers[0].selected.clone()
    reads.begin_pass(8, np.array([0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.5, 3.25, 4.0]), 4.0, cache)
    cache.paged_layers[0].selected = pages
    reads.step(0)
    reads.place(0, 0, 0.1, 0.2)
    np.testing.assert_allclose(reads.shares[0], [3, 3, 3, 0.75])


def test_the_picture_has_time_on_both_axes(recording):
    reads = recording(cache_of([[1, 2, 3]]))
    reads.step(0)
    reads.place(0, 0, 6.2, 6.9)
    root = ElementTree.fromstring(reads.svg())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("0:04") == texts.count("0:10") == 2
    assert {"audio that was read", "text, when said"} <= set(texts)
    assert ElementTree.fromstring(PageReads().svg()) is not None  # nothing was said
    reads.offset = 83.0  # of a part of a file
    assert ">1:27</text>" in reads.svg()


@pytest.mark.parametrize(("duration", "last"), [(0, 0), (9, 8), (62, 60), (3600, 3600), (36000, 36000)])
def test_choose_ticks(duration, last):
    times = choose_ticks(duration)
    assert times[0] == 0
    assert times[-1] == last
    assert len(times) <= 7
