"""The command line and odd files: containers that lie about their length, names, and the recording's own safety."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from audio_files import CHANGING_LENGTHS, encode_wav, tone
from command_line import DATA, FakeTranscriber, names

from unique_asr.writers import read_transcript


class Longer(FakeTranscriber):
    """Decodes the recording, as transcribers do, and reports its real length."""

    def transcribe(self, audio, **options):
        segments, info = super().transcribe(audio, **options)
        info.duration = sum(map(len, audio.blocks())) / 16000
        return segments, info


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", CHANGING_LENGTHS, ids=lambda make: make.__name__)
def test_a_length_that_is_announced_wrong_is_no_other_recording(folder, command, make):
    """The same command again has nothing to do; other formats come from the .json file; an interrupted run goes on."""
    path = make(folder)
    audio = f"audio={path.relative_to(folder)}"
    code, out, err = command(audio, kind=Longer, stop=3, error=RuntimeError("no"))
    assert (code, FakeTranscriber.decoded) == (1, [0, 1, 2])
    assert command(audio, "resume=true", kind=Longer)[0] == 0
    assert FakeTranscriber.decoded == [0, 1, 2, 2, 3]
    code, out, err = command(audio, kind=Longer)
    assert (code, out) == (0, "")
    assert "keeping" in err
    assert command(audio, "output.format=all", kind=Longer)[0] == 0
    assert FakeTranscriber.decoded == [0, 1, 2, 2, 3]
    assert read_transcript(path.with_suffix(".json")).info.warnings == []
    assert command(audio, "start=9", "output.dir=part", kind=Longer)[0] == 0  # behind what some announce
    code, _, err = command(audio, "start=100", "output.dir=part")
    assert code == 1
    assert "start=100, but it ends after 1" in err


def test_a_recording_that_was_changed_is_another(talk, command):
    command("audio=talk.opus")
    os.utime("talk.opus", (0, 0))
    assert "keeping" in command("audio=talk.opus")[2]
    content = bytearray(Path("talk.opus").read_bytes())
    content[-100] ^= 1
    Path("talk.opus").write_bytes(content)
    code, _, err = command("audio=talk.opus")
    assert code == 1
    assert "talk.json: was made from another recording (talk.opus); output.overwrite=true" in err


def test_a_job_that_is_done_needs_no_writable_folder(talk, command, mount):
    command("audio=talk.opus", "output.dir=out")
    locked = mount("locked", "size=100k")
    for path in Path("out").iterdir():
        shutil.copy(path, locked)
    os.system(f"mount -o remount,ro {locked}")
    assert command("audio=talk.opus", f"output.dir={locked}")[0] == 0


@pytest.mark.parametrize("name", ["talk.txt", "talk.json", "talk.partial.txt"])
@pytest.mark.parametrize("option", ["output.overwrite=true", "output.format=all", "resume=true", "output.reads=true"])
def test_the_recording_is_never_written_over(folder, command, name, option):
    encode_wav(Path("a.wav"), tone(1.0, 16000), 16000).rename(name)
    content = Path(name).read_bytes()
    assert command(f"audio={name}", option)[0] == 0
    assert Path(name).read_bytes() == content
    assert f"{name}.srt" in names()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_nor_is_it_under_another_name(talk, command, link):
    link("talk.opus", "talk.txt")
    code, _, err = command("audio=talk.opus", "output.overwrite=true")
    assert (code, err) == (
        1,
        "error: talk.txt: is the recording itself and stays as it is; output.dir=FOLDER writes elsewhere\n",
    )
    assert names() == ["talk.opus", "talk.txt"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_a_name_that_is_not_utf8(talk, command):
    name = os.fsdecode(b"caf\xe9.opus")
    talk.rename(name)
    assert command(f"audio={name}", "quiet=true")[0] == 0
    assert read_transcript(os.fsdecode(b"caf\xe9.json")).info.audio == name
    assert command(f"audio={name}", "quiet=true")[0] == 0
    assert FakeTranscriber.loaded == 1


def test_a_name_without_room_for_an_ending(talk, command):
    stem = "a" * 250
    talk.rename(f"{stem}.opus")
    assert command(f"audio={stem}.opus", stop=3, error=RuntimeError("no"))[0] == 1
    assert all(len(name) <= 255 for name in names())
    assert command(f"audio={stem}.opus", "resume=true")[0] == 0
    assert names() == [f"{stem}.json", f"{stem}.opus", f"{stem}.srt", f"{stem}.txt"]
    long = "b" * 300
    for audio in (long, f"{long}.mp3", f"[{long},{stem}.opus]", f"{'c/' * 3000}d"):
        code, _, err = command(f"audio={audio}")
        assert code == 1
        assert err.splitlines()[0].endswith("File name too long") or "no such file" in err or " (1 of 2)" in err
        assert "Traceback" not in err


def test_a_prompt_longer_than_a_name(talk, command):
    assert command("audio=talk.opus", "model=./other", f"decoding.prompt={'Write. ' * 60}")[0] == 0


def test_a_prompt_that_the_model_does_not_know(talk, command):
    """It would write parts of it into the transcript."""
    code, _, err = command("audio=talk.opus", "decoding.prompt=sing a song")
    assert code == 2
    assert err == (
        "error: prompt=sing a song: model=default knows 'lower case' alone; leave it out, or choose another model\n"
    )


def test_a_full_disk_of_temporary_files_is_named(talk, command, mount, monkeypatch):
    disk = mount("small", "size=8k")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    monkeypatch.setattr(sys, "stdin", open(DATA / "sample.opus"))  # noqa: SIM115
    code, _, err = command("audio=-")
    assert code == 1
    assert err == (
        f"error: {disk}: temporary files cannot be written there (No space left on device); free some space, or set "
        "TMPDIR=FOLDER\n"
    )


def test_closed_standard_input(talk, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert command("audio=-")[::2] == (1, "error: audio=-: standard input is closed; pipe a recording into it\n")
    assert command("audio=talk.opus")[0] == 0
