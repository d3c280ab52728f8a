"""The scorer against cases worked out by hand, and against jiwer."""

import jiwer
import numpy as np
import pytest

from unique_asr.evaluation.scoring import (
    Errors,
    Score,
    compare_rates,
    count_character_errors,
    count_word_errors,
    estimate_interval,
    load_english_normalizer,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("a b c", "a b c", (3, 0, 0, 0)),
        ("a b c", "a x c", (3, 1, 0, 0)),
        ("a b c", "a c", (3, 0, 1, 0)),
        ("a b c", "a b x c", (3, 0, 0, 1)),
        ("a b c", "", (3, 0, 3, 0)),
        ("", "a b", (0, 0, 0, 2)),
        ("", "", (0, 0, 0, 0)),
        ("  a   b ", "a b c d", (2, 0, 0, 2)),
    ],
)
def test_word_errors_by_hand(reference, hypothesis, edits):
    errors = count_word_errors(reference, hypothesis)
    assert errors == Errors(*edits)
    assert errors.rate == sum(edits[1:]) / max(edits[0], 1)


def test_characters_by_hand():
    assert count_character_errors("ab  cd", "ab cx") == Errors(5, substitutions=1)
    assert count_character_errors("", "ab").rate == 2


def test_same_as_jiwer_over_a_corpus():
    rng = np.random.default_rng(0)
    words = np.array(["cat", "dog", "house", "tree", "river", "stone"])
    score, references, hypotheses = Score(), [], []
    for length in rng.integers(1, 40, size=20):
        reference = rng.choice(words, length)
        hypothesis = np.where(rng.random(length) < 0.2, "bird", reference)[rng.random(length) > 0.1]
        references.append(" ".join(reference))
        hypotheses.append(" ".join(hypothesis))
        score.add(references[-1], hypotheses[-1])
    assert score.wer == pytest.approx(jiwer.wer(references, hypotheses))
    assert score.cer == pytest.approx(jiwer.cer(references, hypotheses))
    low, high = estimate_interval(score.words)
    assert low < score.wer < high


@pytest.mark.parametrize(
    ("written", "normalized"),
    [
        ("Mr. Smith's COLOUR, you know!", "mister smith is color you know"),
        ("It's twenty-one; I won't pay $5.", "it is 21 i will not pay $5"),
        ("Um, fourteen fifty-five [laughter]", "1455"),
    ],
)
def test_normalizer_of_whisper(written, normalized):
    assert load_english_normalizer()(written) == normalized


def test_normalized_and_raw():
    score = Score()
    score.add("he said twenty one colours", "He said 21 colors.")
    assert score.wer == score.cer == 0
    assert score.raw_wer == pytest.approx(4 / 5)
    assert score.to_dict()["words"] == 4
    assert str(score).startswith("WER 0.00% (S"), "one recording gives no interval"
    assert score.to_dict()["interval"] is None


def test_errors_are_summed_before_dividing():
    score = Score()
    score.add("one", "two")
    score.add("a house by the river in the wood", "a house by the river in the wood")
    assert score.wer == pytest.approx(1 / 9)


def test_relative_difference():
    dense = [Errors(100, substitutions=10)] * 5
    sparse = [Errors(100, substitutions=9, deletions=2)] * 5
    assert compare_rates(sparse, dense) == pytest.approx((0.1, 0.1, 0.1))
    once = [Errors(10), Errors(10, deletions=1)]
    assert compare_rates(once, once) == (0, 0, 0), "some draws have no error to compare with"
    assert compare_rates([Errors(10)], [Errors(10)]) == (0, 0, 0)
    assert compare_rates(once, [Errors(10)] * 2)[0] == float("inf")
    with pytest.raises(ValueError, match="score both on the same"):
        compare_rates(sparse, dense[1:])
