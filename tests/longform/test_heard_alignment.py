"""Words of a text among the words heard."""

from unique_asr.longform.heard_alignment import normalize_word, place_words, time_words
from unique_asr.models.listening_llm import HeardWord

TEXT = "it is sixteen years since John Birxen died his wife"
HEARD = [HeardWord(f" {word}", float(index), index + 0.9) for index, word in enumerate(TEXT.split())]
SPOKEN = [normalize_word(word.text) for word in HEARD]


def place(text, cursor=0):
    return place_words([normalize_word(word) for word in text.split()], SPOKEN, cursor)


def test_the_same_words_have_the_same_places_whatever_their_case_and_punctuation():
    placed = place("It is sixteen years, since John")
    assert (placed.places, placed.cursor, placed.agreeing) == ([0, 1, 2, 3, 4, 5], 6, 6)
    assert time_words(placed, HEARD, 0, 10.0)[3] == (3.0, 3.9)


def test_a_corrected_word_has_the_time_of_what_was_heard():
    placed = place("since John Bergson died.", 4)
    assert placed.places == [4, 5, -1, 7]
    start, end = time_words(placed, HEARD, 4, 10.0)[2]
    assert 5.9 <= start < end <= 7.0


def test_corrected_words_at_the_end_take_as_many_heard_ones():
    placed = place("since John Bergson", 4)
    assert (placed.places, placed.cursor) == ([4, 5, -1], 7)


def test_text_that_was_not_heard_gets_no_place():
    placed = place("nothing like that")
    assert (placed.places, placed.cursor) == ([-1, -1, -1], 0)


def test_a_word_that_agrees_by_chance_far_ahead_does_not_count():
    spoken = ["a"] + [f"w{index}" for index in range(20)] + ["the", "end"]
    placed = place_words(["a", "the", "cat"], spoken, 0)
    assert placed.places == [0, -1, -1]


def test_words_before_the_first_heard_one_have_times_too():
    placed = place_words(["well", "it", "is"], SPOKEN, 0)
    times = time_words(placed, HEARD, 0, 10.0)
    assert times[0] == (0.0, 0.0)
    assert times[1] == (0.0, 0.9)
