"""What was heard: alternatives, passes, and the LLM's prompt."""

import pytest

from unique_asr.models.listening_llm import HeardPrompt, HeardSpeech, HeardWord
from unique_asr.models.listening_llm.heard import mark_alternatives


def words(text, start=0.0, seconds=0.5):
    return [
        HeardWord(f" {word}", start + index * seconds, start + (index + 1) * seconds)
        for index, word in enumerate(text.split())
    ]


def test_alternatives_stand_where_hypotheses_differ():
    marked = mark_alternatives(
        words("the wheat fields of John Birxen"),
        [[" the", " wheatfields", " of", " John", " Bergson"], [" the", " wheat", " fields", " of", " Jon", " Birxen"]],
    )
    assert [(word.text, word.alternative, word.span) for word in marked if word.alternative] == [
        (" wheat", " wheatfields", 2),
        (" John", " Jon", 1),
        (" Birxen", " Bergson", 1),
    ]


def test_passes_are_about_equal_and_end_with_windows():
    speech = HeardSpeech(words("a b c d e f g h", seconds=10.0), cuts=[25.0, 50.0, 70.0, 80.0])
    assert list(speech.split(100)) == [(0.0, 80.0)]
    assert list(speech.split(50)) == [(0.0, 50.0), (50.0, 80.0)]
    assert [word.text for word in speech.select(50.0, 80.0)] == [" f", " g", " h"]
    assert list(speech.split(30)) == [(0.0, 25.0), (25.0, 50.0), (50.0, 80.0)]
    assert list(HeardSpeech().split(10)) == []


@pytest.fixture
def prompt(marked_tokenizer):
    return HeardPrompt(marked_tokenizer())


def test_the_prompt_is_the_words_heard_and_loses_none_of_their_letters(prompt):
    heard = words("the wheat fields of Birxen")
    tokens = prompt.tokenize_heard(heard)
    ids = prompt.make(tokens.ids, ["Bergson", "Ivar"])
    assert prompt.tokenizer.decode(ids) == (
        "<|im_start|> Bergson, Ivar<repo_name> the wheat fields of Birxen<reponame>"
    )
    for index, word in enumerate(heard):
        assert prompt.tokenizer.decode([i for i, owner in zip(tokens.ids, tokens.owner) if owner == index]) == word.text


def test_alternatives_stand_behind_the_words_that_they_replace(prompt):
    heard = mark_alternatives(words("the wheat fields of Birxen"), [[" the", " wheatfields", " of", " Bergson"]])
    tokens = prompt.tokenize_heard(heard)
    assert prompt.tokenizer.decode(tokens.ids) == (
        " the wheat fields<file_sep> wheatfields<filename> of Birxen<file_sep> Bergson<filename>"
    )
    assert sorted(set(tokens.owner.tolist())) == [-1, 0, 1, 2, 3, 4]


def test_an_answer_begins_like_a_text_and_ends_with_the_end(prompt):
    assert prompt.tokenizer.decode(prompt.tokenize_answer("the cat")) == " the cat<|im_end|>"


def test_a_vocabulary_without_the_marks_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="lacks <repo_name>"):
        HeardPrompt(byte_tokenizer())
