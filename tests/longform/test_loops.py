"""Repetition at the end of a token sequence."""

import pytest

from unique_asr.longform.loops import LoopDetector


@pytest.mark.parametrize(
    ("period", "copies", "expected"), [(1, 30, True), (1, 12, False), (10, 5, True), (10, 3, False)]
)
def test_loop_detector(period, copies, expected):
    detector = LoopDetector()
    found = [detector.push(token) for token in list(range(100, 140)) + list(range(period)) * copies]
    assert any(found) is expected
    if expected:
        assert next(filter(None, found)) <= period * copies
