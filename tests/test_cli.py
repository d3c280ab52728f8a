"""The command line around a stand-in for the model: files, messages and exit codes."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unique_asr import cli
from unique_asr.transcript import Segment, TranscriptionInfo
from unique_asr.writers import SegmentLog, read_transcript

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


class FakeTranscriber:
    """Two seconds a segment; breaks off before segment `stop` with `error`."""

    loaded = 0

    def __init__(self, stop=None, error=None, warnings=(), **settings):
        type(self).loaded += 1
        self.stop, self.error, self.warnings, self.settings = stop, error, list(warnings), settings
        settings["progress"]("load", 1, 1)

    def transcribe(self, audio, *, prompt, progress):
        info = TranscriptionInfo(
            str(audio),
            duration=9.06,
            model=self.settings["model"],
            attention=self.settings["attention"].to_dict(),
            sparsity={"steps": 40, "sparse_steps": 30, "share_of_pages_read": 0.25},
        )
        return self.segments(info, progress), info

    def segments(self, info, progress):
        for index in range(4):
            if index == self.stop:
                raise self.error
            progress("decode", 2.0 * index, 9.06)
            yield Segment(index, 2.0 * index, 2.0 * index + 1.9, f" Segment {index}: [red]é[/red].")
        info.stop_reason, info.coverage, info.passes, info.warnings = "end", 0.98, 1, self.warnings


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """A recording in an otherwise empty current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "nomads.opus", tmp_path / "talk.opus")
    return tmp_path / "talk.opus"


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command with a FakeTranscriber; gives its exit code, standard output and standard error."""
    monkeypatch.setattr(FakeTranscriber, "loaded", 0)

    def run(*arguments, **behaviour):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments, lambda **settings: FakeTranscriber(**behaviour, **settings))
        return exit_.value.code, *capsys.readouterr()

    return run


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def test_segments_files_and_summary(talk, command):
    code, out, err = command("audio=talk.opus")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "[00:00.0 -> 00:01.9] Segment 0: [red]é[/red]."
    assert len(lines) == 5
    assert lines[4].startswith("00:09.1 of audio in ")
    for part in (
        "RTFx",
        "coverage 98 %",
        "30 of 40 steps sparse",
        "25 % of pages read",
        "talk.txt, talk.srt, talk.json",
    ):
        assert part in lines[4]
    assert err == ""
    assert names() == ["talk.json", "talk.opus", "talk.srt", "talk.txt"]
    transcript = read_transcript("talk.json")
    assert transcript.info.stop_reason == "end"
    assert len(transcript.segments) == 4


def test_quiet(talk, command):
    assert command("audio=talk.opus", "quiet=true") == (0, "", "")
    assert "talk.txt" in names()


def test_warnings_are_never_silent(talk, command):
    _, _, err = command("audio=talk.opus", "quiet=true", warnings=["talk.opus: the text ends at 00:05.0"])
    assert err == "warning: talk.opus: the text ends at 00:05.0\n"


def test_formats_and_folder(talk, command):
    code, _, _ = command("audio=talk.opus", "output.format=all", "output.dir=out (1), b")
    assert code == 0
    assert names("out (1), b") == ["talk.json", "talk.srt", "talk.tsv", "talk.txt", "talk.vtt"]
    assert command("audio=talk.opus", "output.format=[srt,vtt]")[0] == 0
    assert command("audio=talk.opus", "output.format=tsv,srt", "output.overwrite=true")[0] == 0
    assert names() == ["out (1), b", "talk.opus", "talk.srt", "talk.tsv", "talk.vtt"]


def test_settings_reach_the_transcriber(talk, command):
    command("audio=talk.opus", "attention=dense", "attention.page_size=16", "model=./my model")
    info = read_transcript("talk.json").info
    assert info.attention["budget"] is None
    assert info.attention["page_size"] == 16
    assert info.model == "./my model"


def test_several_recordings_load_the_model_once(talk, command):
    shutil.copy(talk, "a b.opus")
    code, _, err = command("audio=*.opus", "output.format=txt")
    assert code == 0
    assert "a b.opus (1 of 2)" in err
    assert {"a b.txt", "talk.txt"} <= set(names())
    assert FakeTranscriber.loaded == 1


def test_a_bad_recording_does_not_stop_the_others(talk, command):
    Path("bad.mp3").touch()
    code, _, err = command("audio=[bad.mp3,talk.opus]")
    assert code == 1
    assert "error: bad.mp3: the file is empty" in err
    assert "talk.txt" in names()


def test_what_is_there_is_not_done_again(talk, command):
    command("audio=talk.opus")
    Path("talk.txt").write_text("corrected by hand\n")
    code, out, err = command("audio=talk.opus")
    assert (code, out) == (0, "")
    assert "keeping talk.txt, talk.srt, talk.json" in err
    assert FakeTranscriber.loaded == 1
    assert command("audio=talk.opus", "output.format=all")[0] == 0  # what is missing is added
    assert "talk.vtt" in names()
    assert Path("talk.txt").read_text() == "corrected by hand\n"
    assert command("audio=talk.opus", "output.overwrite=true")[0] == 0
    assert Path("talk.txt").read_text() != "corrected by hand\n"


def test_a_transcript_with_other_settings_is_not_taken_for_this_one(talk, command):
    command("audio=talk.opus")
    code, _, err = command("audio=talk.opus", "attention=dense")
    assert code == 1
    assert err.count("\n") == 1
    assert "talk.json: was made from budget=512; output.overwrite=true" in err
    assert FakeTranscriber.loaded == 1


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


def test_the_log_can_be_kept(talk, command):
    command("audio=talk.opus", "output.keep_log=true")
    assert len(SegmentLog.read(Path("talk.partial.jsonl"))) == 4


def test_nothing_decoded_leaves_nothing(talk, command):
    assert command("audio=talk.opus", stop=0, error=RuntimeError("no"))[0] == 1
    assert names() == ["talk.opus"]


def test_a_model_that_does_not_load_is_tried_once(talk, capsys):
    shutil.copy(talk, "b.opus")

    def load(**settings):
        raise ValueError("model=none: no such folder")

    with pytest.raises(SystemExit) as exit_:
        cli.main(["audio=.", "model=none"], load)
    assert exit_.value.code == 1
    assert capsys.readouterr().err.count("error: model=none: no such folder") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: python scripts/transcribe.py audio=FILE"),
        (["audio="], 2, "usage: "),
        (["audio=none.mp3"], 1, "error: none.mp3: no such file"),
        (["audio=none/*.mp3"], 1, "error: none/*.mp3: no file matches"),
        (["talk.opus"], 2, "did you mean audio=talk.opus?"),
        (["audio=talk.opus", "output.format=doc"], 2, "error: output.format: unknown doc"),
        (["audio=talk.opus", "output.dir=talk.opus"], 2, "error: output.dir=talk.opus: is not a folder"),
        (["audio=talk.opus", "attention.page_size=7"], 2, "error: attention.page_size is 7"),
        (["audio=talk.opus", "attention.size=7"], 2, "error: Could not override 'attention.size'"),
    ],
)
def test_errors_are_one_line(talk, command, arguments, code, message):
    result, out, err = command(*arguments)
    assert result == code
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert names() == ["talk.opus"]
    assert FakeTranscriber.loaded == 0


SLOW = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_cli import FakeTranscriber
from unique_asr import cli

class Slow(FakeTranscriber):
    def segments(self, info, progress):
        for segment in super().segments(info, progress):
            yield segment
            time.sleep(0.2 if segment.id < 2 else 60)

cli.main(sys.argv[1:], lambda **settings: Slow(**settings))
"""


def slow_command(*arguments):
    script = SLOW.format(root=str(ROOT), tests=str(Path(__file__).parent))
    return [sys.executable, "-c", script, *arguments]


def test_control_c(talk):
    """With a real signal, while the model works."""
    process = subprocess.Popen(
        slow_command("audio=talk.opus"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(3):  # segments are printed as they come, also into a pipe
        assert process.stdout.readline().startswith("[00:0")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at 00:05.9" in err
    assert "Traceback" not in err
    assert len(SegmentLog.read(Path("talk.partial.jsonl"))) == 3


def test_kill_loses_nothing(talk):
    process = subprocess.Popen(slow_command("audio=talk.opus"), stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.communicate()
    assert [json.loads(line)["id"] for line in Path("talk.partial.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_terminal_shows_progress_with_time_left_and_whole_segments(talk):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        slow_command("audio=talk.opus"),
        stdout=terminal,
        stderr=terminal,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + 60
    while b"Segment 2" not in shown and time.monotonic() < deadline:
        if select.select([main], [], [], 1.0)[0]:
            shown += os.read(main, 4096)
    process.kill()
    process.wait()
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    assert "[00:02.0 -> 00:03.9] Segment 1: [red]é[/red]." in text
    assert "Transcribing" in text
    assert "left" in text
