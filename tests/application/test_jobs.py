"""Which recordings are meant, where their transcripts go, and that no transcript replaces another's."""

from pathlib import Path

import pytest

from unique_asr.application.jobs import Job, OutputError, find_recordings, plan, resolve_formats
from unique_asr.audio import AudioError
from unique_asr.transcript import Transcript, TranscriptionInfo


@pytest.fixture
def talks(tmp_path):
    for name in ("b.mp3", "a.WAV", "notes.txt", ".hidden.mp3", "[x].ogg"):
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.m4a").touch()
    return tmp_path


def test_a_file_of_any_name(talks):
    assert find_recordings(str(talks / "notes.txt")) == [talks / "notes.txt"]
    assert find_recordings(talks / "none.mp3") == [talks / "none.mp3"]  # opening it says what is wrong


def test_a_folder(talks):
    assert find_recordings(talks) == [talks / "[x].ogg", talks / "a.WAV", talks / "b.mp3"]


def test_globs(talks):
    assert find_recordings(str(talks / "*.mp3")) == [talks / "b.mp3"]
    assert find_recordings(str(talks / "*")) == [talks / "[x].ogg", talks / "a.WAV", talks / "b.mp3"]
    assert talks / "inner" / "c.m4a" in find_recordings(str(talks / "**" / "*"))


def test_a_name_with_brackets_is_no_glob_if_it_exists(talks):
    assert find_recordings(str(talks / "[x].ogg")) == [talks / "[x].ogg"]


def test_a_list_without_repetitions(talks):
    assert find_recordings([str(talks / "b.mp3"), str(talks)]) == [talks / "b.mp3", talks / "[x].ogg", talks / "a.WAV"]


@pytest.mark.parametrize("name", ["empty", "*.flac"])
def test_nothing_found(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AudioError, match="no "):
        find_recordings(str(tmp_path / name))


def test_formats():
    assert resolve_formats("srt") == ["srt"]
    assert resolve_formats(["json", "txt"]) == ["txt", "json"]
    assert resolve_formats("json, txt") == ["txt", "json"]
    assert resolve_formats("all") == ["txt", "srt", "vtt", "tsv", "json"]
    for wrong in ("doc", ["txt", "doc"], [], ""):
        with pytest.raises(OutputError, match=r"output\.format"):
            resolve_formats(wrong)


def test_transcripts_lie_beside_the_recording(talks):
    (job,) = plan([talks / "b.mp3"])
    assert job.path("srt") == talks / "b.srt"
    assert job.partial_path("jsonl") == talks / "b.partial.jsonl"


def test_names_with_dots(talks):
    (job,) = plan([talks / "1.5 hours.v2.mp3"])
    assert job.path("txt") == talks / "1.5 hours.v2.txt"


def test_recordings_of_one_stem_keep_their_suffix(talks):
    (talks / "b.wav").touch()
    assert [job.base.name for job in plan([talks / "b.mp3", talks / "b.wav"])] == ["b.mp3", "b.wav"]
    assert [job.base.name for job in plan([talks / "b.mp3"])] == ["b.mp3"]  # the same name if asked for alone


def test_recordings_of_one_name_from_two_folders(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp3").touch()
    recordings = [tmp_path / "x" / "a.mp3", tmp_path / "y" / "a.mp3"]
    assert len(plan(recordings)) == 2
    with pytest.raises(OutputError, match=r"output\.dir"):
        plan(recordings, tmp_path / "out")


def test_a_file_in_the_place_of_the_folder(talks):
    with pytest.raises(OutputError, match="not a folder"):
        plan([talks / "b.mp3"], talks / "notes.txt")


def test_a_folder_that_cannot_be_made(talks):
    job = Job(talks / "b.mp3", talks / "notes.txt" / "out" / "b")
    with pytest.raises(OutputError, match="cannot be made"):
        job.check_writable()


def test_what_a_transcript_was_made_from(talks):
    job = Job(talks / "b.mp3", talks / "b")
    settings = {"model": "default", "budget": 512}
    assert job.find_difference(10.0, settings) is None  # there is none
    info = TranscriptionInfo(str(talks / "b.mp3"), 10.0, attention={"budget": 512, "page_size": 8})
    job.write(Transcript([], info), ["json"])
    assert job.find_difference(10.2, settings) is None
    assert job.find_difference(None, settings) is None
    assert job.find_difference(10.0, {**settings, "budget": None}) == "budget=512"
    assert job.find_difference(10.0, {**settings, "model": "/other"}) == "model=default"
    assert "another recording" in job.find_difference(20.0, settings)
    assert "another recording" in Job(Path("c.mp3"), job.base).find_difference(10.0, settings)
    job.path("json").write_text("{}")
    assert "other than a transcript" in job.find_difference(10.0, settings)
