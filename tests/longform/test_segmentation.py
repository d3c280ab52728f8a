"""Words and sentences from tokens, segments from words with times."""

import pytest
from simulated_speech import Tokenizer

from unique_asr.longform.segmentation import SegmentationConfig, Segmenter, WordStream
from unique_asr.sentences import ends_sentence
from unique_asr.transcript import Word


class Bytes:
    """A tokenizer of single bytes, whose characters may take several tokens."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("word", "following", "expected"),
    [
        ("home.", "Then", True),
        ("home.", None, True),
        ("home,", "Then", False),
        ("Mr.", "Smith", False),
        ("J.", "Smith", False),
        ("I.", "Then", True),
        ("U.S.", "Army", False),
        ("No.", "5", False),
        ("No.", "Never", True),
        ("3.5", "per", False),
        ('"Oh!"', "he", False),
        ("(really?)", "Yes", True),
        ("said.”", "“Then", True),
        ("well...", "maybe", False),
        ("well...", "Maybe", True),
        ("etc.", "and", False),
    ],
)
def test_sentence_ends(word, following, expected):
    assert ends_sentence(word, following) is expected


def test_words_come_one_word_late_and_keep_their_tokens():
    tokenizer, text = Tokenizer(), " Transcription works, Mr. Smith. It does 3.5 times."
    stream, words = WordStream(tokenizer), []
    tokens = tokenizer.encode(text)
    for index, token in enumerate(tokens):
        words += stream.push(token, -float(index))
    assert [word.text for word in words] == text.split()[:-1]
    words += stream.flush()
    assert [word.text for word in words] == text.split()
    assert [word.text for word in words if word.ends_sentence] == ["Smith.", "times."]
    assert [value for word in words for value in word.log_probs] == [-float(index) for index in range(len(tokens))]
    assert len(words[0].log_probs) == 2


def test_characters_of_several_tokens():
    stream, text = WordStream(Bytes()), "Où était-il ? 🙂 là\n“Oui.”"
    words = [word.text for token in text.encode() for word in stream.push(token, 0.0)]
    assert words + [word.text for word in stream.flush()] == text.split()


def segments(words, **config):
    segmenter = Segmenter(SegmentationConfig(**config))
    groups = [group for word in words for group in segmenter.push(word, word.text.endswith("."))]
    return [" ".join(word.text for word in group) for group in [*groups, *segmenter.flush()]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (", our master . Then", ["our", "master", ".", "Then"]),
        (". . Then", ["Then"]),
        ('"Oh!" he', ['"Oh!"', "he"]),
        ("- 5", ["5"]),
        (" ...", []),
    ],
)
def test_marks_before_the_first_word_are_dropped(text, words):
    stream = WordStream(Bytes())
    found = [word for byte in text.encode() for word in stream.push(byte, -0.1)]
    assert [word.text for word in found + stream.flush()] == words


def test_segments_end_at_sentences_and_pauses():
    words = [Word("One", 0, 0.5), Word("two.", 0.5, 1), Word("Three", 1, 1.5), Word("four", 3, 3.5), Word("five", 4, 5)]
    assert segments(words) == ["One two.", "Three", "four five"]


def test_long_sentences_are_cut_at_a_comma_or_the_longest_pause():
    words = [Word(f"w{index}", index, index + 0.9) for index in range(20)]
    words[6].text += ","
    assert segments(words, max_segment_seconds=10.0)[0].split()[-1] == "w6,"
    words[8].end = 8.2
    assert segments(words, max_segment_seconds=10.0)[0].split()[-1] == "w8"


def test_no_segment_is_too_long():
    words = [Word(f"w{index}", index / 3, (index + 1) / 3) for index in range(200)]
    found = segments(words, max_segment_seconds=10.0)
    assert " ".join(found) == " ".join(word.text for word in words)
    assert all(len(text.split()) <= 30 for text in found)
