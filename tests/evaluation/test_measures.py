"""Entities, repetition and peak memory, by hand."""

import numpy as np
import pytest

from unique_asr.evaluation.entities import EntityErrors, count_entity_errors, find_names
from unique_asr.evaluation.peak_memory import PeakMemory
from unique_asr.evaluation.repetition import measure_longest_repeat


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Yesterday Ada Lovelace met Mr. Babbage, and I left.", ["Ada Lovelace", "Mr", "Babbage"]),
        ("He went to Paris. Then nobody saw London's fog.", ["Paris", "London"]),
        ("all lower case with ada", []),
        ("ALL CAPITALS HERE", []),
        ("", []),
    ],
)
def test_names_in_a_text(text, names):
    assert find_names(text) == names


@pytest.mark.parametrize(
    ("hypothesis", "missed"),
    [
        ("Yesterday Ada Lovelace bought 12 books in Paris.", 0),
        ("yesterday ada lovelace bought twelve books in paris", 0),  # case and spelled numbers do not matter
        ("Yesterday Ada Loveless bought 20 books in Paris.", 2),  # one wrong word loses the name
        ("Yesterday Lovelace Ada bought 12 books in", 2),  # so does their order
        ("", 3),
    ],
)
def test_an_entity_counts_if_all_of_it_is_verbatim(hypothesis, missed):
    errors = count_entity_errors("Yesterday Ada Lovelace bought 12 books in Paris.", hypothesis)
    assert errors == EntityErrors(3, missed)
    assert errors.rate == missed / 3


def test_listed_entities_and_occurrences():
    reference = "the fed said the fed would act in march"
    errors = count_entity_errors(reference, "the fed would act in march", ["the Fed", "March", "never said"])
    assert errors == EntityErrors(3, 1)
    assert count_entity_errors(reference, reference, []) == EntityErrors()
    assert EntityErrors().rate is None
    assert EntityErrors(3, 1) + EntityErrors(2, 2) == EntityErrors(5, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b c d", 0),
        ("", 0),
        ("no no no", 3),
        ("well I think so I think so and on", 6),
        ("Yes. Yes. Yes. Yes. done", 4),
        ("one two one two one", 5),  # the phrase twice, and begun again
        ("the cat the dog the cow", 0),
        (" ".join(f"w{n}" for n in range(31)) * 2, 0),
    ],
)
def test_longest_repeated_run(text, words):
    assert measure_longest_repeat(text) == words


def test_peak_memory_sees_what_was_freed():
    memory = PeakMemory()
    before = memory.read()
    if before is None:
        pytest.skip("this system does not tell the peak of memory, or does not count it anew")
    block = np.ones(30_000_000)  # 240 MB
    del block
    peak = memory.read()
    assert peak >= before + 200_000_000
    assert PeakMemory().read() <= peak - 200_000_000, "a new measurement begins from what is in use"


def test_no_peak_is_told_where_it_cannot_begin_anew(monkeypatch):
    def refuse(path, text):
        raise PermissionError(path)

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert PeakMemory().read() is None
