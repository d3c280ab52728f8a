"""Which recordings are meant, where their transcripts go, and that no transcript replaces another's."""

import os
from pathlib import Path

import pytest

from unique_asr.application import jobs as jobs_module
from unique_asr.application.file_identity import identify_file
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
    assert job.find_difference(settings) is None  # there is none
    info = TranscriptionInfo(str(job.audio), duration=10.0, attention={"budget": 512, "page_size": 8})
    job.write(Transcript([], info), ["json"])
    assert job.find_difference(settings) is None  # of an older version, which did not look at the file
    assert job.find_difference({**settings, "budget": None}) == "budget=512"
    assert job.find_difference({**settings, "model": "/other"}) == "model=default"
    assert "another recording" in Job(Path("c.mp3"), job.base).find_difference(settings)
    job.path("json").write_text("{}")
    assert "other than a transcript" in job.find_difference(settings)


def test_a_recording_is_known_by_its_file(talks):
    """Its size and time if it is called the same, else its content; how long it is announced to be is not asked."""
    job = Job(talks / "b.mp3", talks / "b")
    job.audio.write_bytes(b"speech")
    info = TranscriptionInfo(str(job.audio), file=identify_file(job.audio), duration=10.0)
    job.write(Transcript([], info), ["json"])
    settings = {"model": "default"}
    assert job.find_difference(settings) is None
    os.utime(job.audio, (0, 0))  # copied, and as it was
    assert job.find_difference(settings) is None
    renamed = Job(job.audio.rename(talks / "c.mp3"), job.base)
    assert renamed.find_difference(settings) is None
    renamed.audio.write_bytes(b"speeth")  # of the same size
    assert "another recording" in renamed.find_difference(settings)
    renamed.audio.write_bytes(b"speech, longer")
    assert "another recording" in renamed.find_difference(settings)


@pytest.mark.parametrize("name", ["talk.txt", "talk.JSON", "talk.jsonl", "talk.svg", "talk.partial.mp3"])
def test_a_recording_that_is_called_like_a_transcript_keeps_its_suffix(tmp_path, name):
    (tmp_path / name).touch()
    (job,) = plan([tmp_path / name])
    assert job.path("txt") == tmp_path / f"{name}.txt"
    job.check_outputs()


def test_no_transcript_is_written_over_a_recording_of_the_same_run(tmp_path):
    names = ["talk.mp3", "talk.partial.txt"]
    for name in names:
        (tmp_path / name).touch()
    jobs = plan([tmp_path / name for name in names])
    assert [job.base.name for job in jobs] == names
    (tmp_path / "talk.mp3.srt").touch()
    with pytest.raises(OutputError, match=r"would be written over the recording .*talk.mp3.srt"):
        plan([tmp_path / name for name in [*names, "talk.mp3.srt"]])


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("name", ["talk.txt", "talk.partial.jsonl", "talk.reads.svg"])
def test_the_recording_by_another_name_is_no_place_for_a_transcript(tmp_path, link, name):
    (tmp_path / "talk.mp3").write_bytes(b"speech")
    link(tmp_path / "talk.mp3", tmp_path / name)
    (job,) = plan([tmp_path / "talk.mp3"])
    with pytest.raises(OutputError, match="is the recording itself"):
        job.check_outputs()


def test_a_folder_in_the_place_of_a_transcript(tmp_path):
    (tmp_path / "talk.mp3").touch()
    (tmp_path / "talk.srt").mkdir()
    (job,) = plan([tmp_path / "talk.mp3"])
    with pytest.raises(OutputError, match=r"talk.srt: cannot be written \(Is a directory\)"):
        job.check_outputs()


def test_names_that_differ_in_case_alone(tmp_path, monkeypatch):
    """Their transcripts would be one file on some file systems; accents are written in two ways."""
    for name in ("Talk.mp3", "talk.wav", "caf\u00e9.mp3", "cafe\u0301.wav"):
        (tmp_path / name).touch()
    assert [job.base.name for job in plan(sorted(tmp_path.iterdir()))] == sorted(
        path.name for path in tmp_path.iterdir()
    )
    (job,) = plan([tmp_path / "talk.wav"])
    assert job.base.name == "talk.wav"
    for folder, name in (("x", "A.mp3"), ("y", "a.mp3")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    recordings = [tmp_path / "x" / "A.mp3", tmp_path / "y" / "a.mp3"]
    monkeypatch.setattr(jobs_module, "_ignores_case", lambda folder: False)
    assert len(plan(recordings, tmp_path / "out")) == 2
    monkeypatch.setattr(jobs_module, "_ignores_case", lambda folder: True)
    with pytest.raises(OutputError, match="would both be written"):
        plan(recordings, tmp_path / "out")


def test_this_file_system(tmp_path):
    (tmp_path / "case").touch()
    assert jobs_module._ignores_case(tmp_path / "none") == (tmp_path / "CASE").exists()


@pytest.mark.parametrize("stem", ["a" * 251, "\u00e9" * 125 + "a"])
def test_long_names(tmp_path, stem):
    """What has no room for an ending is cut, always in the same way, and told from others."""
    recording = tmp_path / f"{stem}.wav"
    recording.touch()
    (job,) = plan([recording])
    for path in job.list_outputs():
        assert len(os.fsencode(path.name)) <= 255
        path.touch()
    assert job.path("txt").name == f"{stem}.txt"
    assert job.path("partial.jsonl").name.startswith(stem[:100])
    assert job.list_outputs() == plan([recording])[0].list_outputs()
    assert job.path("partial.txt") != Job(recording, tmp_path / f"{stem[:-1]}b").path("partial.txt")
