"""Cues as a subtitle checker and a reader would judge them."""

import random
from itertools import pairwise

import pytest

from unique_asr.subtitle_units import measure_width
from unique_asr.subtitles import GAP_SECONDS, SubtitleLimits, build_cues
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo, Word
from unique_asr.writers import make_writers

PROSE = (
    "From the graveyard gate one can count a dozen gaily painted farmhouses, and the gilded weather vanes on the big "
    "red barns wink at each other across the green and brown and yellow fields. Yes. The air and the earth are "
    "curiously mated and intermingled as if the one were the breath of the other. He was a splendid figure of a boy, "
    "tall and straight as a young pine tree, with a handsome head and stormy gray eyes deeply set under a serious "
    "brow. Mr. Smith said so. No!"
)
CHINESE = "我们今天要谈的是语音识别，尤其是很长的录音。大家都知道（或者应该知道）：这并不容易！" * 4


def say(text, start=0.0, speed=14.0, pause=0.0, timed=True, speaker=None):
    """Segments, one a sentence, at so many characters a second and with so long a pause between them."""
    segments, words, time = [], [], start
    tokens = text.split()
    for index, token in enumerate(tokens):
        words.append(Word(token, time, time + len(token) / speed))
        time = words[-1].end + 1 / speed
        if index + 1 == len(tokens) or (token[-1] in ".!?" and token != "Mr."):
            line = " ".join(word.text for word in words)
            first, last = words[0].start, words[-1].end
            segments.append(Segment(len(segments), first, last, line, words if timed else [], speaker=speaker))
            words, time = [], time + pause
    return segments


def check(cues, limits=None):
    """What checkers of subtitles check."""
    limits = limits or SubtitleLimits()
    assert cues
    for cue in cues:
        assert 1 <= len(cue.lines) <= limits.max_lines
        assert all(line.strip() == line != "" for line in cue.lines)
        assert max(map(measure_width, cue.lines)) <= limits.max_line_width
        assert limits.min_cue_seconds - 1e-6 <= cue.end - cue.start <= limits.max_cue_seconds + 1e-6
    for cue, following in pairwise(cues):
        gap = following.start - cue.end
        assert gap >= GAP_SECONDS - 1e-6
        # 3 to 11 frames are a flicker
        assert gap < GAP_SECONDS + 1e-6 or gap >= 0.499 or cue.end - cue.start > limits.max_cue_seconds - 1e-6


def joined(cues):
    return " ".join(line for cue in cues for line in cue.lines)


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("pause", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("speed", [9.0, 14.0, 19.0, 30.0])
def test_limits_are_kept_and_no_word_is_lost(speed, pause, timed):
    segments = say(PROSE, 3.0, speed, pause, timed)
    cues = build_cues(segments)
    check(cues)
    assert joined(cues) == PROSE
    if speed < 20:
        assert all(measure_width(" ".join(cue.lines)) <= 20.2 * (cue.end - cue.start) for cue in cues)


@pytest.mark.parametrize(
    "limits",
    [SubtitleLimits(32, 1), SubtitleLimits(16, 3), SubtitleLimits(42, 2, 3.0, 1.5), SubtitleLimits(80, 1, 5.0, 0.0)],
    ids=str,
)
def test_other_limits(limits):
    cues = build_cues(say(PROSE, speed=12.0), limits)
    check(cues, limits)
    assert joined(cues) == PROSE


def test_a_cue_is_shown_when_its_words_are_said():
    segments = say(PROSE, 3.0, 14.0, 1.2)
    said = [word for segment in segments for word in segment.words]
    place = 0
    for cue in build_cues(segments):
        words = said[place : place + len(" ".join(cue.lines).split())]
        place += len(words)
        assert cue.start == pytest.approx(words[0].start, abs=0.001)
        assert cue.end >= words[-1].end - GAP_SECONDS


def test_sentences_have_cues_of_their_own_unless_too_short():
    cues = build_cues(say("One sentence stands here. Another one follows it. Yes. It does.", speed=14.0))
    assert [cue.text for cue in cues] == ["One sentence stands here.", "Another one follows it.", "Yes. It does."]


def test_breaks_are_at_phrases():
    cues = build_cues(say("He was a splendid figure of a boy, tall and straight as a young pine tree, we said."))
    assert cues[0].lines[0] == "He was a splendid figure of a boy,"
    assert cues[-1].lines[0].startswith("tall")
    for cue in build_cues(say(PROSE)):
        for line in cue.lines:
            assert line.split()[-1].lower() not in ("the", "a", "of", "and", "mr.")


def test_no_word_of_a_sentence_stands_alone_on_a_line():
    (cue, *_) = build_cues(say("Thus, it is that the honor of three is saved, our country, our masters and our own."))
    assert cue.text == "Thus, it is that the honor\nof three is saved,"
    (cue,) = build_cues(say("Yes. And then he said nothing at all of it.", speed=30.0))
    assert cue.text == "Yes.\nAnd then he said nothing at all of it."  # a sentence may


def test_a_pause_ends_a_cue():
    segment = Segment(0, 0.0, 9.0, "we went out then we came home again", [])
    times = [0.0, 0.3, 0.7, 4.0, 4.4, 4.7, 5.0, 5.4]
    segment.words = [Word(word, time, time + 0.25) for word, time in zip(segment.text.split(), times)]
    assert [cue.text for cue in build_cues([segment])] == ["we went out", "then we came home again"]


def test_short_text_of_a_long_segment_is_not_spread():
    """Without times of words nobody knows when it was said; nobody speaks that slowly."""
    (cue,) = build_cues([Segment(0, 10.0, 133.0, "A few words.")])
    assert (cue.start, cue.lines) == (10.0, ("A few words.",))
    assert cue.end <= 17.0


def test_words_that_are_not_the_text_are_not_used():
    cues = build_cues([Segment(0, 0.0, 9.0, PROSE[:120], [Word("something", 0.0, 0.1), Word("else", 0.1, 0.2)])])
    check(cues)
    assert cues[-1].end == pytest.approx(9.0)


def test_the_end_of_the_recording_is_the_end():
    (cue,) = build_cues([Segment(0, 4.8, 5.0, "Yes.")], duration=5.0)
    assert (cue.start, cue.end) == (4.16, 5.0)
    check(build_cues(say("Well, this is what we had to say. Yes.", speed=19.0), duration=2.1))


def test_segments_that_overlap():
    """Two people at once, the second one inside what the first one says; and two who begin together."""
    first = say("This is a long story, and I am going to tell it as I like.", 0.0, speaker="S01")
    second = say("No, not again!", 1.5, speaker="S02")
    third = say("Please, not again!", 1.5, speaker="S03")
    cues = build_cues([*first, *second, *third])
    check(cues)
    for label in ("S01: ", "S02: No, not again!", "S03: Please, not again!"):
        assert label in joined(cues)


def test_speakers_stand_before_every_cue_and_change_on_a_new_line():
    segments = [
        Segment(0, 0.0, 0.3, "Yes.", speaker="S01"),
        Segment(1, 0.3, 0.6, "No.", speaker="S02"),
        *say(PROSE[:150], 0.6, speaker="S01"),
    ]
    cues = build_cues(segments)
    check(cues)
    assert cues[0].lines == ("S01: Yes.", "S02: No.")
    assert all(cue.lines[0].startswith("S01: ") for cue in cues)


def test_chinese_breaks_between_characters_but_not_before_a_comma():
    cues = build_cues([Segment(0, 0.0, 60.0, CHINESE)])
    check(cues)
    assert "".join(line for cue in cues for line in cue.lines) == CHINESE
    lines = [line for cue in cues for line in cue.lines]
    assert not any(line[0] in "，。）：！" or line[-1] == "（" for line in lines)
    assert max(map(len, lines)) <= 16


@pytest.mark.parametrize("text", ["https://example.org/" + 200 * "x", "ก็" * 120, "👩‍👩‍👧" * 60, 90 * "한국어"])
def test_words_longer_than_a_line_are_cut(text):
    cues = build_cues([Segment(0, 0.0, 40.0, text)])
    check(cues)
    assert "".join(line for cue in cues for line in cue.lines) == text
    assert not any(line[0] in "็\u200d" for cue in cues for line in cue.lines)  # what combines with the one before


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_times(seed):
    """Zero durations, overlaps, words out of order: the result is in order all the same, and complete."""
    rng = random.Random(seed)
    segments, time = [], 0.0
    for index in range(60):
        text = " ".join(rng.choices(PROSE.split(), k=rng.randint(1, 30)))
        start = time + rng.choice([-1.0, -0.2, 0.0, 0.5, 3.0])
        end = start + rng.choice([0.0, 0.1, len(text) / 15, len(text) / 40])
        words = [Word(word, start + rng.random(), start + rng.random()) for word in text.split()]
        segments.append(Segment(index, max(start, 0.0), max(end, 0.0), text, words if rng.random() < 0.5 else []))
        time = max(time, end)
    cues = build_cues(segments)
    check(cues)
    in_order = sorted(segments, key=lambda segment: segment.start)
    assert joined(cues) == " ".join(segment.text for segment in in_order)


def test_nothing_said():
    assert build_cues([]) == []
    assert build_cues([Segment(0, 0.0, 1.0, "  ")], duration=1.0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_line_width": 8}, "output.max_line_width=8: give a whole number of columns, 16 or more"),
        ({"max_line_width": 42.5}, "max_line_width=42.5: give a whole number"),
        ({"max_lines": 0}, "output.max_lines=0: give a whole number of lines, 1 or more"),
        ({"max_lines": True}, "max_lines=True"),
        ({"max_cue_seconds": 0.5}, "output.max_cue_seconds=0.5: give seconds, 1 or more"),
        ({"max_cue_seconds": None}, "max_cue_seconds=None"),
        ({"min_cue_seconds": float("nan")}, "min_cue_seconds=nan: give seconds, 0 or more"),
        ({"min_cue_seconds": 8}, "output.min_cue_seconds=8: is more than max_cue_seconds=7"),
    ],
)
def test_limits_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        SubtitleLimits(**options)


@pytest.mark.parametrize("extension", ["srt", "vtt"])
def test_files_keep_to_their_limits(extension, tmp_path):
    transcript = Transcript(say(PROSE, 7.0), TranscriptionInfo("a.wav", duration=40.0, settings={"start": 5.0}))
    path = tmp_path / f"a.{extension}"
    make_writers(SubtitleLimits(30, 1))[extension].write_file(transcript, path)
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= 30
    assert sum("-->" in line for line in lines) > 15
