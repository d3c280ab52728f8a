"""RULER's tasks: what is in a prompt, what it costs, and how an answer counts."""

import re
from collections import Counter

import pytest

from unique_asr.evaluation.ruler import TASKS, Sources, make_sample, split_sentences

ESSAY = split_sentences("A river ran by the mill. Nobody came there now. Was it closed? It was.")
QUESTIONS = tuple(
    {"question": f"Who lives in house {n}?", "answers": [f"Person{n}"], "context": f"In house {n} lives Person{n}."}
    for n in range(50)
)
SOURCES = Sources(ESSAY, QUESTIONS)


def words(text):
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
def test_items_fill_their_length_and_never_exceed_it(task):
    for length in (1200, 3000):
        sample = make_sample(task, length, words, 1, SOURCES)
        used = words(sample.prompt + sample.begin) + sample.answer_tokens
        assert used <= length
        if task != "qa":  # it runs out of documents
            assert used > 0.9 * length
        assert sample == make_sample(task, length, words, 1, SOURCES)
        assert sample.prompt != make_sample(task, length, words, 2, SOURCES).prompt
        assert sample.score(f"Sure: {' '.join(sample.answers).upper()}") == 1
        assert sample.score("I do not know.") == 0


@pytest.mark.parametrize(("task", "told", "asked"), [("single", 1, 1), ("essay", 1, 1), ("multikey", 4, 1),
                                                     ("multivalue", 4, 4), ("multiquery", 4, 4)])  # fmt: skip
def test_needles(task, told, asked):
    sample = make_sample(task, 1000, words, 0, SOURCES)
    found = dict(re.findall(r"numbers for [\w-]+ is: (\d{7})(\.)", sample.prompt))
    assert len(found) == told
    assert len(sample.answers) == asked
    assert set(sample.answers) <= set(found)
    hay = "The grass is green." if task == "single" else "Nobody came there now."
    assert hay in sample.prompt
    if asked == 4:
        assert sample.score(f"{sample.answers[0]} and {sample.answers[2]}") == 0.5


def test_tracking_names_every_variable_of_the_chain():
    sample = make_sample("tracking", 1000, words, 0, SOURCES)
    text = sample.prompt.rpartition("\n\n")[2]
    (value,) = re.findall(r"VAR [A-Z]{5} = (\d+)\.", text)
    assert f"assigned the value {value}" in text
    known = {value}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text):
        assert source in known, "a variable is assigned before it is used"
        known.add(name)
    assert known - {value} == set(sample.answers)
    assert len(sample.answers) == 5


def test_common_words_are_the_most_common():
    sample = make_sample("common_words", 2000, words, 0, SOURCES)
    listed = re.findall(r"\d+\. (\w+)", sample.prompt.rpartition("Below")[2])
    counts = Counter(listed)
    assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
    assert {counts[word] for word in sample.answers} == {30}
    assert {count for word, count in counts.items() if word not in sample.answers} == {3}
    assert len(set(sample.others)) == 10
    assert {counts[word] for word in sample.others} == {3}


def test_frequent_words_follow_zipf():
    sample = make_sample("frequent_words", 2000, words, 0, SOURCES)
    counts = Counter(re.findall(r"\b[a-z]{6}\b|\.{4}", sample.prompt.partition("coded words.")[2].partition("\n")[0]))
    assert [word for word, _ in counts.most_common(4)] == ["....", *sample.answers]
    assert len(set(sample.others)) == 3
    assert all(0 < counts[word] < counts[sample.answers[-1]] for word in sample.others)


def test_questions():
    sample = make_sample("qa", 300, words, 0, SOURCES)
    (house,) = re.findall(r"house (\d+)\?", sample.prompt)
    assert sample.answers == (f"Person{house}",)
    assert f"In house {house} lives" in sample.prompt
    assert sample.prompt.count("Document") > 10
    with pytest.raises(ValueError, match=r"text\.qa=FILE"):
        make_sample("qa", 300, words, 0)


def test_errors_name_the_option():
    with pytest.raises(ValueError, match=r"text\.tasks names 'needle'"):
        make_sample("needle", 300, words)
    with pytest.raises(ValueError, match=r"text\.lengths has 100 tokens"):
        make_sample("single", 100, words)
