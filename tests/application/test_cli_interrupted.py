"""The command line when a run ends early: what was decoded stays, and a later run goes on from it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import FakeTranscriber, names, slow_command

from unique_asr.writers import SegmentLog, read_transcript


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("CUDA\nerror"), 1)])
def test_what_stops_a_run_leaves_what_was_decoded(talk, command, error, code):
    Path("talk.srt").write_text("an older transcript\n")
    result, _, err = command("audio=talk.opus", "output.overwrite=true", stop=2, error=error)
    assert result == code
    assert "stopped at 00:03.9" in err
    assert "Traceback" not in err
    if code == 1:
        assert "error: talk.opus: CUDA error (RuntimeError; debug=true shows where)" in err
    assert names() == [
        "talk.opus",
        "talk.partial.json",
        "talk.partial.jsonl",
        "talk.partial.srt",
        "talk.partial.txt",
        "talk.srt",
    ]
    assert Path("talk.srt").read_text() == "an older transcript\n"
    assert len(SegmentLog.read(Path("talk.partial.jsonl"))) == 2
    assert len(read_transcript("talk.partial.json").segments) == 2
    assert read_transcript("talk.partial.json").info.stop_reason == ("interrupted" if code == 130 else "error")

    assert command("audio=talk.opus", "output.overwrite=true")[0] == 0
    assert not [name for name in names() if "partial" in name]


def test_control_c(talk):
    """With a real signal, while the model works."""
    process = subprocess.Popen(
        slow_command("audio=talk.opus"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(3):  # segments are printed as they come, also into a pipe
        assert process.stdout.readline().startswith("[00:0")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "stopped at 00:05.9" in err
    assert "Traceback" not in err
    assert len(SegmentLog.read(Path("talk.partial.jsonl"))) == 3


def test_a_container_that_is_stopped(talk, command, monkeypatch):
    append = SegmentLog.append

    def terminated(log, segment):
        append(log, segment)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SegmentLog, "append", terminated)
    code, _, err = command("audio=talk.opus")
    assert code == 130
    assert "stopped at 00:01.9" in err
    assert "resume=true goes on from there" in err


def test_killed_and_resumed(talk, command):
    assert command("audio=talk.opus", "output.dir=whole")[0] == 0
    process = subprocess.Popen(slow_command("audio=talk.opus"), stdout=subprocess.PIPE, text=True)
    for _ in range(3):  # of four segments, two a pass
        process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    assert [segment.id for segment in SegmentLog.read(Path("talk.partial.jsonl"))] == [0, 1, 2]
    assert "talk.txt" not in names()

    code, out, err = command("audio=talk.opus", "resume=true")
    assert code == 0
    assert "going on from 00:03.9" in err
    assert len(out.splitlines()) == 5  # the transcript is shown from its beginning
    for extension in ("txt", "srt"):
        assert Path(f"talk.{extension}").read_text() == Path(f"whole/talk.{extension}").read_text()
    assert not [name for name in names() if "partial" in name]


def test_only_what_is_missing_is_decoded_again(talk, command):
    command("audio=talk.opus", stop=3, error=RuntimeError("no"))
    code, _, err = command("audio=talk.opus", "resume=true", stop=3, error=RuntimeError("no again"))
    assert code == 1
    assert "no again" in err
    assert len(SegmentLog.read(Path("talk.partial.jsonl"))) == 3
    assert command("audio=talk.opus", "resume=true")[0] == 0
    assert [segment.id for segment in read_transcript("talk.json").segments] == [0, 1, 2, 3]
    assert FakeTranscriber.decoded == [0, 1, 2, 2, 2, 3]


def test_resume_without_anything_to_resume_is_a_transcription(talk, command):
    assert command("audio=talk.opus", "resume=true")[0] == 0
    assert len(read_transcript("talk.json").segments) == 4


@pytest.mark.parametrize(
    "option", ["attention=dense", "model=./other", "end=5", "decoding.prompt=lower case", "language=en"]
)
def test_other_settings_do_not_go_on_with_it(talk, command, option):
    command("audio=talk.opus", stop=3, error=RuntimeError("no"))
    before = Path("talk.partial.jsonl").read_bytes()
    code, _, err = command("audio=talk.opus", "resume=true", option)
    assert code == 1
    assert err.startswith("error: talk.partial.jsonl: was made from ")
    assert err.count("\n") == 1
    assert Path("talk.partial.jsonl").read_bytes() == before


def test_a_full_disk(talk, command, mount):
    disk = mount("disk", "size=16k")
    filler = disk / "filler"
    filler.write_bytes(bytes(12 * 1024))
    code, _, err = command("audio=talk.opus", f"output.dir={disk}", "output.format=all")
    assert code == 1
    assert "is full; free some space, then resume=true goes on" in err
    assert "Traceback" not in err
    assert not [name for name in names(disk) if name.endswith(".tmp") or name == "talk.json"]
    filler.unlink()
    code, _, _ = command("audio=talk.opus", f"output.dir={disk}", "resume=true", "output.format=[txt]")
    assert code == 0
    assert (disk / "talk.txt").read_text().count("\n") == 4


def test_a_read_only_folder(talk, command, mount):
    folder = mount("locked", "size=16k,ro")
    code, _, err = command("audio=talk.opus", f"output.dir={folder}")
    assert code == 1
    assert err == f"error: {folder}: is not writable; output.dir=FOLDER writes elsewhere\n"
