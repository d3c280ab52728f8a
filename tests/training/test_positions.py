"""Cached positions: what the head heard, stored, learned from, and simulated from texts."""

import itertools

import numpy as np
import pytest
import torch

from unique_asr.training.augment import AugmentConfig
from unique_asr.training.batches import Batcher
from unique_asr.training.corpus import Item, read_manifests
from unique_asr.training.positions import UNITS, Heard, PositionBank, PositionBatcher, listen

CLEAN = AugmentConfig(speed=0, gain_db=0, noise_share=0, frequency_masks=0, time_masks=0)


def heard(path, text="", cased=None, weight=0.75):
    """A span of which each position holds one unit, or none where it is None."""
    units, weights = np.zeros((len(path), UNITS), np.int16), np.zeros((len(path), UNITS), np.float16)
    for place, unit in enumerate(path):
        if unit is not None:
            units[place, 0], weights[place, 0] = unit, weight
    return Heard(units, weights, text, cased)


def assert_same(one, other):
    assert np.array_equal(one.units, other.units)
    assert np.array_equal(one.weights, other.weights)
    assert (one.text, one.cased) == (other.text, other.cased)


def test_a_bank_survives_the_disk(tmp_path):
    recordings = [
        [heard([1, None, 2], "the cat", "The cat"), heard([3], "sat")],
        [heard([], "nothing"), heard([4, 4], "ço", "Ço!")],
        [heard([5])],
    ]
    paths = [tmp_path / "one.npz", tmp_path / "two.npz"]
    PositionBank(recordings[:2]).save(paths[0])
    PositionBank(recordings[2:]).save(paths[1])
    loaded = PositionBank.load(paths).recordings
    assert [len(recording) for recording in loaded] == [2, 2, 1]
    for recording, expected in zip(loaded, recordings, strict=True):
        for span, original in zip(recording, expected, strict=True):
            assert_same(span, original)
            assert (span.units.dtype, span.weights.dtype) == (np.int32, np.float16)


def learned(path, reference):
    bank = PositionBank([[heard(path, "text")]])
    bank.learn({"text": reference})
    return {
        unit: [None if event is None else int(event[0][0]) for event in events] for unit, events in bank.heard.items()
    }


@pytest.mark.parametrize(
    ("path", "reference", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], {1: [1], 2: [2], 3: [3]}),
        ([1, 9, 3], [1, 2, 3], {1: [1], 2: [9], 3: [3]}),  # 9 in place of 2
        ([1, 3], [1, 2, 3], {1: [1], 2: [None], 3: [3]}),  # 2 was missed
        ([1, 9, 3], [1, 3], {1: [1], 3: [3]}),  # 9 was invented
        ([None, 1, None, 3], [1, 3], {1: [1], 3: [3]}),  # pauses are no units
        ([1, 9, 3], [1, 2, 4, 3], {1: [1], 2: [9], 4: [None], 3: [3]}),
        ([1, 2, 1], [1, 2, 1], {1: [1, 1], 2: [2]}),
        ([], [1], {1: [None]}),
    ],
)
def test_a_bank_learns_how_units_are_heard(path, reference, expected):
    assert learned(path, reference) == expected


def test_simulated_units_are_heard_as_in_the_bank():
    bank = PositionBank([[heard([7, 5], "ab"), heard([8, 5], "ab"), heard([5], "ab")]])
    bank.learn({"ab": [4, 5]})
    random = np.random.default_rng(0)
    units, weights = bank.simulate([4, 5, 6] * 400, random, clean=0.5, noise=0.0)
    assert units.shape == weights.shape == (len(units), UNITS)
    said = units[weights[:, 0] > 0, 0].tolist()
    assert (said.count(5), said.count(6), said.count(4)) == (400, 400, 0)
    assert said.count(7) == pytest.approx(133, abs=30)  # 4 is heard as 7, as 8, or missed
    assert said.count(8) == pytest.approx(133, abs=30)
    never = weights[(units[:, 0] == 6) & (weights[:, 0] > 0)]
    assert (never[:, 0] == 0.5).all()
    assert not never[:, 1:].any()
    assert (weights[:, 0] == 0).sum() == pytest.approx(0.12 * 1200, abs=40)  # pauses


def test_noise_loses_and_replaces_units():
    bank = PositionBank([[heard([1, 2], "ab")]])
    bank.learn({"ab": [1, 2]})
    units, weights = bank.simulate([1] * 2000, np.random.default_rng(0), noise=0.3)
    said = units[weights[:, 0] > 0, 0].tolist()
    assert len(said) == pytest.approx(1800, abs=60)
    assert said.count(2) == pytest.approx(200, abs=50)


def test_a_text_without_units_is_one_silent_position():
    units, weights = PositionBank([]).simulate([], np.random.default_rng(0))
    assert units.shape == weights.shape == (1, UNITS)
    assert not weights.any()


@pytest.fixture
def spans(write_manifest):
    (source,) = read_manifests([write_manifest()], {}, torch.device("cpu"), min_match=0.4)
    (cat, mat, clock), (baker,) = source.recordings
    return [
        Item([(source, cat, 0.0), (source, mat, 0.5)], cased=False),
        Item([(source, clock, 0.0), (source, baker, 0.25)], cased=True),
    ]


def test_listening_keeps_what_the_llm_reads(speech_llm, spans):
    """A sharp head puts nearly all its weight on the units that are kept."""
    model, processor = speech_llm()
    model.projector.down.weight.data *= 50
    found = listen(model, Batcher(model, processor, CLEAN, 0), spans)
    assert [span.text for span in found] == ["the cat sat on a mat", "it's ten o'clock mr bell the baker"]
    assert [span.cased for span in found] == [None, "It's ten o'clock! Mr. Bell, the baker"]
    batcher = PositionBatcher(model, processor, PositionBank([found]), [], seed=0)
    (batch,) = itertools.islice(batcher.batches(lambda random: (1, 4), cased_share=0.0), 1)
    expected = {}
    for item, span in zip(spans, found, strict=True):
        wave = Batcher(model, processor, CLEAN, 0)._waveform(item).numpy()
        expected[span.text] = model.encode([wave], processor).embeds
    for row, embeds in enumerate(batcher.embed(batch)):
        text = processor.decode(batch.after[row][-batch.labels[row] :])
        torch.testing.assert_close(embeds, expected[text], atol=0.02, rtol=0.02)


@pytest.fixture
def batcher(tiny):
    model, processor = tiny
    index = {int(token): place for place, token in enumerate(model.ctc_tokens)}

    def spoken(text, cased=None):
        return heard([index[token] for token in processor.ctc_ids(text)[0]], text, cased)

    bank = PositionBank(
        [
            [spoken("the cat", "The cat."), spoken("a hat", "A hat?"), spoken("no case")],
            [spoken("tea at ten", "Tea at ten!")],
        ]
    )
    texts = [["The sea.", "Isn't it?", "Yes, it is."], ["plain lines", "of text"]]
    return PositionBatcher(model, processor, bank, texts, seed=0, simulated=0.5)


def rows_of(batcher, batch):
    """(text, prompt and all before the text) of each row."""
    decode = batcher.processor.tokenizer.decode
    for before, after, labels in zip(batch.before, batch.after, batch.labels, strict=True):
        yield decode(after[-labels:]).removesuffix("<|im_end|>"), decode([*before, *after[:-labels]])


def test_rows_join_spans(batcher):
    random = np.random.default_rng(0)
    texts = set()
    for _ in range(30):
        batch = batcher.draw(random, 20, 2, cased_share=0.5)
        audio = batcher.embed(batch)
        assert [len(embeds) for embeds in audio] == batch.windows.tolist()
        assert all(20 <= len(embeds) < 45 and embeds.shape[1] == 32 for embeds in audio)
        for text, prompt in rows_of(batcher, batch):
            texts.add(text)
            assert ("lower case" in prompt) == (text == text.lower())
            assert "no case" not in text or text == text.lower()
    joined = " ".join(texts)
    for text in ("The cat. A hat?", "Tea at ten!", "the cat a hat no case", "Isn't it? Yes, it is.", "plain lines of"):
        assert text in joined


@pytest.mark.parametrize("simulated", [0.0, 1.0])
def test_the_share_of_simulated_rows(batcher, simulated):
    batcher.simulated = simulated
    batch = batcher.draw(np.random.default_rng(0), 10, 10, cased_share=1.0)
    for text, _ in rows_of(batcher, batch):
        assert any(word in text for word in ("sea", "Isn't", "Yes")) == bool(simulated)


def test_positions_embed_as_the_weighted_tokens(batcher):
    batcher.simulated = 0.0
    batch = batcher.draw(np.random.default_rng(0), 1, 1, cased_share=0.0)
    ((text, _),) = rows_of(batcher, batch)
    ids = torch.tensor(batcher.processor.ctc_ids(text)[0])
    (embeds,) = batcher.embed(batch)
    table = batcher.embeddings[torch.tensor([batcher.index[int(token)] for token in ids])]
    torch.testing.assert_close(embeds, 0.75 * table)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_endless(batcher, workers):
    batcher.workers = workers
    batches = batcher.batches(lambda random: (int(random.integers(5, 10)), 2), cased_share=0.5)
    found = [batch.after for batch in itertools.islice(batches, 5)]
    assert any(after != found[0] for after in found)


class Impatient:
    """A generator that gives up after so many draws."""

    def __init__(self, draws=10_000):
        self.generator, self.draws = np.random.default_rng(0), draws

    def __getattr__(self, name):
        self.draws -= 1
        assert self.draws > 0, "no end of draws"
        return getattr(self.generator, name)


def test_a_bank_without_case_gives_lower_case(tiny):
    batcher = PositionBatcher(*tiny, PositionBank([[heard([1, 2], "the cat")]]), [], seed=0)
    batch = batcher.draw(Impatient(), 5, 1, cased_share=1.0)
    ((_, prompt),) = rows_of(batcher, batch)
    assert "lower case" in prompt


def test_texts_without_case_give_lower_case(tiny):
    batcher = PositionBatcher(*tiny, PositionBank([]), [["plain lines", "of text"]], seed=0, simulated=1.0)
    batch = batcher.draw(np.random.default_rng(0), 5, 1, cased_share=1.0)
    ((text, prompt),) = rows_of(batcher, batch)
    assert text == text.lower()
    assert "lower case" in prompt


def test_listening_to_speech_slowed_down_beyond_a_window(tiny, write_manifest):
    """Twelve percent slower, a span of 28 s no longer fits into 30 s; here 5.7 s into 6 s."""
    segments = [{"start": 0, "end": 5.7, "text": "the cat"}]
    (source,) = read_manifests([write_manifest({"a.wav": segments}, seconds=6)], {}, torch.device("cpu"))
    item = Item([(source, source.recordings[0][0], 0.0)], cased=False)
    batcher = Batcher(*tiny, AugmentConfig(), seed=0)
    for _ in range(10):
        assert len(listen(tiny[0], batcher, [item])) == 1
