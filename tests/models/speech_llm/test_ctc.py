"""Units of the CTC head: the text that they spell, which tokens they are, and how words are cut into them."""

import pytest

from unique_asr.models.speech_llm.ctc import CTCUnits, choose_ctc_vocabulary, normalize_ctc_text

UNITS = {"Ġthe": 0, "Ġ": 1, "a": 2, "b": 3, "n": 4, "an": 5, "Ġban": 6, "'": 7, "t": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The END, of it.", "the end of it"),
        ("don't  DON\u2019T", "don't don't"),
        ("Zoë’s naïve façade", "zoe's naive facade"),
        ("a well-known 3rd try\n", "a well known rd try"),
        ("' '' -- 1984", ""),
        ("", ""),
    ],
)
def test_text(text, expected):
    assert normalize_ctc_text(text) == expected
    assert normalize_ctc_text(expected) == expected


@pytest.mark.parametrize(
    ("text", "ids", "words"),
    [
        ("the ban", [0, 6], [0, 1]),
        ("The Banana!", [0, 6, 5, 2], [0, 1, 1, 1]),  # the longest unit first
        ("an the", [1, 5, 0], [0, 0, 1]),  # "an" has no unit with its space
        ("ban - the 12 ban", [6, 0, 6], [0, 2, 4]),  # words without letters have no unit
        ("the-ban the", [0, 6, 0], [0, 0, 1]),
        ("bat's", [1, 3, 2, 8, 7], [0] * 5),  # no unit has an s
        ("", [], []),
    ],
)
def test_words_are_cut_into_units(text, ids, words):
    assert CTCUnits(UNITS).tokenize(text) == (ids, words)


def test_units_without_spaces():
    assert CTCUnits({"a": 0, "b": 1}).tokenize("ab A") == ([0, 1, 0], [0, 0, 1])


def test_vocabulary_is_the_frequent_tokens_and_all_letters(byte_tokenizer):
    tokenizer = byte_tokenizer()
    tokens = tokenizer.get_vocab()
    letters = {tokens[letter] for letter in "abcdefghijklmnopqrstuvwxyz'"} | {tokens["Ġa"]}
    everything = choose_ctc_vocabulary(tokenizer)
    assert set(everything) == letters | {tokens[token] for token in ("th", "the", "Ġthe")}
    assert everything == sorted(everything)
    assert set(choose_ctc_vocabulary(tokenizer, ["The the. THE, a bathe"], 1)) == letters | {tokens["Ġthe"]}
    # "ba" + "the": the token inside a word is rarer than " the" and than the letters of "bb"
    assert tokens["the"] not in choose_ctc_vocabulary(tokenizer, ["the the bathe bb bb"], 3)
    assert tokens["the"] in choose_ctc_vocabulary(tokenizer, ["the the bathe bb bb"], 10)


def test_the_units_of_a_text_spell_it(tiny):
    _, processor = tiny
    text = "The other day, a man wasn't at the theatre."
    ids, words = processor.tokenize_ctc(text)
    assert processor.tokenizer.decode(ids).replace(" ", "") == normalize_ctc_text(text).replace(" ", "")
    assert words == sorted(words)
    assert set(words) == set(range(9))
    assert set(ids) <= set(processor.ctc_tokens)
