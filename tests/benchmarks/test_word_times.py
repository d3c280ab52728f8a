"""Word times on joined recordings: benchmarks/tools/measure_word_times.py, and the shipped model under it."""

from pathlib import Path

import measure_word_times as script
import numpy as np
import pytest

from unique_asr.models import load
from unique_asr.transcript import Word

ROOT = Path(__file__).parents[2]

RATE = 16_000


def tone(*spans, seconds, noise=1e-4):
    samples = np.random.default_rng(0).normal(0, noise, int(seconds * RATE)).astype(np.float32)
    for start, end in spans:
        samples[int(start * RATE) : int(end * RATE)] += 0.3
    return samples


def test_where_an_utterance_sounds():
    samples = tone((0.5, 1.0), (1.5, 1.8), (2.4, 2.9), seconds=3.0)
    segments = [
        {"start": 0.0, "end": 2.0, "text": "Well-known, she said."},
        {"start": 2.0, "end": 3.0, "text": "Yes"},
        {"start": 3.0, "end": 4.0, "text": "beyond the end"},
    ]
    first, second = script.find_edges(segments, samples)
    assert first.words == ["well", "known", "she", "said"]
    assert (first.onset, first.offset) == pytest.approx((0.5, 1.8), abs=0.011)
    assert (second.onset, second.offset) == pytest.approx((2.4, 2.9), abs=0.011)


def test_errors_are_those_of_matching_words_at_an_edge():
    truth = [
        script.UtteranceEdges(0.0, 2.0, 0.5, 1.8, ["she", "had", "gone"]),
        script.UtteranceEdges(2.0, 4.0, 2.4, 3.9, ["nobody", "knew", "why"]),
        script.UtteranceEdges(4.0, 5.0, 4.0, 4.8, ["not", "even", "he"]),  # it sounds from the joint on
    ]
    words = [
        Word("She", 0.6, 0.9), Word("had", 0.9, 1.2), Word("gone.", 1.2, 1.7),
        Word("No", 2.4, 2.6), Word("knew", 2.8, 3.0), Word("why,", 3.0, 3.5),
        Word("not", 4.5, 4.6), Word("even", 4.6, 4.7), Word("he", 4.7, 4.9),
    ]  # fmt: skip
    found = [(edge, round(error, 6)) for edge, error in script.compare_times(truth, words)]
    assert found == [("start", 0.1), ("end", -0.1), ("end", -0.4), ("end", 0.1)]
    assert script.summarize([0.1, -0.4, 0.2])["within 0.3 s"] == 0.667


def test_the_shipped_model_is_within_a_third_of_a_second():
    """The reference of the two short clips of several utterances, aligned: starts and ends of utterances."""
    model, processor = load("default", device="cpu")
    rows = script.read_rows(ROOT / "tests" / "data" / "manifest.jsonl")
    short = [(path, segments) for path, segments in rows if path.name in ("milner.opus", "repose.opus")]
    results = script.measure(short, model, processor, transcribe=False)
    assert set(results) == {"reference, start", "reference, end"}
    for values in results.values():
        assert values["words"] >= 3
        assert values["mean"] < 0.3
