"""What a player, an editor and a script would read out of the files."""

import json
import os

import pytest

from unique_asr.transcript import Segment, Transcript, TranscriptionInfo, Word
from unique_asr.writers import WRITERS, SegmentLog, format_timestamp, read_transcript


@pytest.fixture
def transcript():
    words = [Word("Good", 0.0, 0.31, 0.9), Word("morning.", 0.31, 1.2345)]
    segments = [
        Segment(0, 0.0, 1.2345, " Good morning.", words, 0.95),
        Segment(1, 3599.9996, 3723.4, "A --> B\nis <5 & é 会议\t."),
    ]
    return Transcript(segments, TranscriptionInfo("talk.m4a", duration=3724.0, sparsity={"steps": 3}))


@pytest.fixture
def written(transcript, tmp_path):
    def write(extension):
        path = tmp_path / f"talk.{extension}"
        WRITERS[extension].write_file(transcript, path)
        return path.read_bytes().decode("utf-8")

    return write


def test_timestamps():
    assert format_timestamp(0) == "00:00:00.000"
    assert format_timestamp(59.9996) == "00:01:00.000"
    assert format_timestamp(3723.4567, ",") == "01:02:03,457"
    assert format_timestamp(36000 * 11) == "110:00:00.000"
    assert format_timestamp(-0.2) == "00:00:00.000"


def test_txt(written):
    assert written("txt") == "Good morning.\nA --> B is <5 & é 会议 .\n"


def test_srt(written):
    first, second, rest = written("srt").split("\n\n")
    assert first == "1\n00:00:00,000 --> 00:00:01,234\nGood morning."
    assert second == "2\n01:00:00,000 --> 01:00:03,400\nA -> B is <5 & é 会议 ."  # nobody says this for two minutes
    assert rest == ""


def test_vtt(written):
    first, *cues = written("vtt").split("\n\n")
    assert first == "WEBVTT"
    assert cues[0] == "00:00:00.000 --> 00:00:01.234\nGood morning."
    assert cues[1] == "01:00:00.000 --> 01:00:03.400\nA --&gt; B is &lt;5 &amp; é 会议 ."


def test_tsv(written):
    assert written("tsv") == "start\tend\ttext\n0\t1234\tGood morning.\n3600000\t3723400\tA --> B is <5 & é 会议 .\n"


def test_json(written, transcript, tmp_path):
    values = json.loads(written("json"))
    assert values["text"].startswith("Good morning. A")
    assert values["segments"][0]["words"][1] == {"text": "morning.", "start": 0.31, "end": 1.2345, "confidence": None}
    assert values["info"]["duration"] == 3724.0
    assert read_transcript(tmp_path / "talk.json") == transcript


@pytest.mark.parametrize("extension", ["txt", "srt", "vtt", "tsv"])
def test_speakers_stand_before_what_they_say(extension, transcript, written):
    transcript.segments[0].speaker = "S01"
    text = written(extension)
    assert "S01: Good morning." in text
    assert text.count(": ") == 1


@pytest.mark.parametrize("extension", WRITERS)
def test_nothing_said(extension, tmp_path):
    WRITERS[extension].write_file(Transcript([], TranscriptionInfo("silence.wav")), tmp_path / f"a.{extension}")
    assert (tmp_path / f"a.{extension}").exists()


@pytest.mark.parametrize("extension", WRITERS)
def test_no_byte_order_mark_and_unix_lines(extension, transcript, tmp_path):
    path = tmp_path / f"talk.{extension}"
    WRITERS[extension].write_file(transcript, path)
    assert not path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert b"\r" not in path.read_bytes()


def test_a_write_that_fails_keeps_the_old_file(transcript, tmp_path):
    path = tmp_path / "talk.json"
    WRITERS["json"].write_file(transcript, path)
    before = path.read_bytes()
    transcript.info.sparsity = {"steps": object()}  # JSON cannot hold it
    with pytest.raises(TypeError):
        WRITERS["json"].write_file(transcript, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_log_holds_every_segment_at_once(transcript, tmp_path):
    log = SegmentLog(tmp_path / "talk.partial.jsonl")
    log.append(transcript.segments[0])
    assert SegmentLog.read(log.path) == transcript.segments[:1]  # before it is closed: as after a crash
    log.append(transcript.segments[1])
    with log.path.open("a") as file:
        file.write('{"id": 2, "sta')  # a line that was cut off
    assert SegmentLog.read(log.path) == transcript.segments
    log.close(keep=False)
    assert not log.path.exists()


def test_log_of_an_earlier_attempt_stays_until_there_is_something_newer(transcript, tmp_path):
    path = tmp_path / "talk.partial.jsonl"
    path.write_text("earlier\n")
    log = SegmentLog(path)
    assert path.read_text() == "earlier\n"
    log.append(transcript.segments[0])
    log.close(keep=True)
    assert SegmentLog.read(path) == transcript.segments[:1]


def test_a_file_that_the_place_of_a_new_one_links_to_stays(transcript, tmp_path):
    (tmp_path / "kept").write_text("kept\n")
    for name in ("talk.txt", "talk.partial.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "kept")
    WRITERS["txt"].write_file(transcript, tmp_path / "talk.txt")
    SegmentLog(tmp_path / "talk.partial.jsonl").append(transcript.segments[0])
    assert (tmp_path / "kept").read_text() == "kept\n"


def test_a_recording_whose_name_is_not_utf8(transcript, tmp_path):
    transcript.info.audio = os.fsdecode(b"caf\xe9.mp3")
    WRITERS["json"].write_file(transcript, tmp_path / "a.json")
    assert read_transcript(tmp_path / "a.json") == transcript
    log = SegmentLog(tmp_path / "a.jsonl")
    log.info = transcript.info
    log.begin_pass({})
    log.append(transcript.segments[0])
    assert SegmentLog.read_unfinished(log.path)[0] == transcript.info
