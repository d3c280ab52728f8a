"""What a thread makes ready while the model is busy."""

import threading

import pytest

from unique_asr.models.speech_llm.modeling import prefetch


def test_the_next_item_is_made_meanwhile():
    made = [threading.Event() for _ in range(3)]

    def items():
        for index, event in enumerate(made):
            event.set()
            yield index

    for index, item in enumerate(prefetch(items())):
        assert item == index
        assert all(event.wait(10) for event in made[: index + 2])
    assert list(prefetch(iter([]))) == []


def test_an_error_comes_after_what_was_made_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("the file is damaged")

    made = prefetch(items())
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(ValueError, match="damaged"):
        next(made)


def test_no_more_is_made_for_one_that_stops():
    made = []

    def items():
        for index in range(9):
            made.append(index)
            yield index

    some = prefetch(items())
    next(some)
    some.close()
    assert len(made) <= 2
