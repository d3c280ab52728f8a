"""Times of words against utterances with known times."""

import pytest

from unique_asr.data import Utterance
from unique_asr.evaluation.timing import TimingErrors, measure_timing
from unique_asr.transcript import Word

UTTERANCES = [Utterance(0.0, 2.0, "the old mill"), Utterance(2.0, 5.0, "stood by the river")]


def test_words_inside_and_outside_their_utterance():
    words = [
        Word("The", 0.3, 0.5),
        Word("cold", 0.5, 0.9),  # no word of the reference
        Word("mill,", 1.0, 1.4),
        Word("stood", 1.4, 1.7),  # half a second before its utterance
        Word("by", 3.0, 3.2),
        Word("the", 3.2, 3.3),
        Word("river.", 5.0, 5.3),  # within the tolerance
    ]
    errors = measure_timing(UTTERANCES, words)
    assert (errors.words, errors.misplaced) == (6, 1)
    assert errors.starts == pytest.approx((0.3, -0.6))
    assert errors.to_dict() == {"words": 6, "misplaced": pytest.approx(1 / 6), "start_error": pytest.approx(0.45)}


def test_recordings_add_up():
    errors = measure_timing(UTTERANCES, [Word("the", 0.1, 0.2)]) + TimingErrors(words=3, misplaced=2)
    assert (errors.words, errors.misplaced, len(errors.starts)) == (4, 2, 1)
    assert measure_timing(UTTERANCES, []).to_dict() == {"words": 0, "misplaced": 0.0, "start_error": None}
