"""The command line around a stand-in for the model: files, messages and exit codes."""

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import FakeTranscriber, names, slow_command

from unique_asr.application import cli
from unique_asr.transcript import text_settings
from unique_asr.writers import SegmentLog, read_transcript


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
    assert err == "Loading default ...\n"
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


@pytest.mark.parametrize("value", ["no", "off", "False", "'NO'"])
def test_a_flag_that_is_off_overwrites_nothing(talk, command, value):
    Path("talk.txt").write_text("corrected by hand\n")
    assert command("audio=talk.opus", f"output.overwrite={value}")[0] == 0
    assert Path("talk.txt").read_text() == "corrected by hand\n"
    assert command("audio=talk.opus", "output.overwrite=on", "output.format=txt")[0] == 0
    assert Path("talk.txt").read_text() != "corrected by hand\n"


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


def test_a_model_is_read_with_the_attention_that_it_was_trained_for(talk, command, tmp_path):
    """Its folder names the settings; what the command line says comes before them."""
    saved = {"budget": 256, "sink_pages": 2, "super_page_size": None, "combine": "share"}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({"sparse_attention": saved}))

    def attention(*arguments):
        assert command(f"audio={talk}", "model=tuned", "output.overwrite=true", *arguments)[0] == 0
        return json.loads(talk.with_suffix(".json").read_text())["info"]["attention"]

    assert saved.items() <= attention().items()
    assert {**saved, "budget": 128}.items() <= attention("attention.budget=128").items()
    assert attention("attention=dense")["budget"] is None
    assert attention("attention=unique")["budget"] == 512
    (tmp_path / "tuned" / "config.json").write_text("{}")
    assert attention()["budget"] == 512


def test_a_transcript_with_other_settings_is_not_taken_for_this_one(talk, command):
    command("audio=talk.opus")
    code, _, err = command("audio=talk.opus", "attention=dense")
    assert code == 1
    assert err.count("\n") == 1
    assert "talk.json: was made from budget=512; output.overwrite=true" in err
    assert FakeTranscriber.loaded == 1


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
        (["audio=talk.opus", "start=soon"], 2, "error: start=soon end=None: soon is not a time: give seconds"),
        (["audio=talk.opus", "start=5", "end=3"], 2, "error: start=5 end=3: end has to lie after start"),
        (["audio=talk.opus", "start=1:00"], 1, "error: talk.opus: start=60, but it ends after 9.1 s"),
        (["audio=talk.opus", "channel=left"], 2, "error: channel=left: give mix, or a number"),
        (["audio=talk.opus", "track=first"], 2, "error: track=first: give null, or a number"),
        (["audio=talk.opus", "track=2"], 1, "talk.opus: has no track=2, only 1 (mono"),
        (["audio=talk.opus", "channel=2"], 1, "talk.opus: has no channel=2, only 1 to 1"),
        (
            ["audio=talk.opus", "language=French"],
            2,
            "error: language=French: model=default takes en; leave language out",
        ),
        (["audio=talk.opus", "language=no"], 2, "error: language=no: model=default takes en"),
        (
            ["audio=talk.opus", "hotwords=Ada, Byron"],
            2,
            "error: hotwords=Ada, Byron: model=default cannot be told words",
        ),
        (["audio=talk.opus", "batch=0"], 2, "error: batch=0: give a whole number of recordings, 1 or more"),
        (["audio=talk.opus", "batch=2.5"], 2, "error: batch=2.5: give a whole number"),
        (["audio=talk.opus", "batch=true"], 2, "error: batch=True: give a whole number"),
        (["audio=talk.opus", "parallel_passes=0"], 2, "error: parallel_passes=0: give a whole number of passes"),
        (["audio=talk.opus", "parallel_passes=a"], 2, "error: parallel_passes=a: give a whole number"),
        (["audio=talk.opus", "output.max_line_width=8"], 2, "error: output.max_line_width=8: give a whole number"),
        (["audio=talk.opus", "output.min_cue_seconds=9"], 2, "error: output.min_cue_seconds=9: is more than max_cue"),
        (["audio=talk.opus", "batch=2", "output.reads=true"], 2, "error: output.reads=true: draws what one recording"),
        (["audio=talk.opus", "output.format=null"], 2, "error: output.format=null: choose from txt"),
        (["audio=talk.opus", "output.dir=[a]"], 2, "error: output.dir=['a']: give one folder"),
        (["audio=talk.opus", "decoding.max_pass_seconds=x"], 2, "error: decoding.max_pass_seconds=x: give a positive"),
        (["audio=talk.opus", "decoding.prefill_chunk=x"], 2, "prefill_chunk=x: give a whole number of audio"),
        (["audio=talk.opus", "output.overwrite=x"], 2, "error: output.overwrite=x: give true or false"),
        (["audio=talk.opus", "jsonl=1"], 2, "error: jsonl=1: give true or false"),
        (["audio=talk.opus", "resume=null"], 2, "error: resume=null: give true or false"),
        (["audio=talk.opus", "fetch=null"], 2, "error: fetch=null: is a group of options; give fetch.OPTION=VALUE"),
        (["audio=talk.opus", "attention=null"], 2, "error: attention=null: choose from both, dense"),
        (["audio=talk.opus", "decoding=null"], 2, "error: decoding=null: choose from greedy"),
        (["audio=talk.opus", "model=null"], 2, "error: model=null: give a name, a folder or a hub id"),
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


def test_subtitles_keep_to_their_limits_whether_transcribed_or_rewritten(talk, command):
    limits = ["output.max_line_width=16", "output.max_lines=1"]
    assert command("audio=talk.opus", "output.format=[srt,json]", *limits)[0] == 0
    narrow = Path("talk.srt").read_text()
    assert max(map(len, narrow.replace(" --> ", "\n").splitlines())) <= 16
    Path("talk.srt").unlink()
    assert command("audio=talk.opus", "output.format=srt")[0] == 0
    assert "Segment 0: [red]é[/red]." in Path("talk.srt").read_text()
    Path("talk.srt").unlink()
    assert command("audio=talk.opus", "output.format=srt", *limits)[0] == 0
    assert Path("talk.srt").read_text() == narrow
    assert FakeTranscriber.loaded == 1


def test_formats_that_a_transcript_has_already_need_no_model(talk, command):
    command("audio=talk.opus", "output.format=json")
    code, out, err = command("audio=talk.opus", "output.format=all")
    assert (code, out) == (0, "")
    assert "wrote talk.txt, talk.srt, talk.vtt, talk.tsv from talk.json" in err
    assert FakeTranscriber.loaded == 1
    assert Path("talk.txt").read_text().startswith("Segment 0: [red]é[/red].\n")


def test_part_of_a_recording(talk, command):
    assert command("audio=talk.opus", "start=0:02", "end=0:00:05.5", "channel=1")[0] == 0
    info = read_transcript("talk.json").info
    assert info.duration == 3.5
    assert info.settings == text_settings(None, None, 2.0, 5.5, 1)
    code, _, err = command("audio=talk.opus")
    assert code == 1
    assert "was made from start=2.0; output.overwrite=true" in err


def test_hotwords_are_recorded(talk, command):
    """For a model whose configuration says that it takes them; commas and brackets need no quotes but the shell's."""
    folder = talk.parent / "moss"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "moss_transcribe_diarize"}')
    assert command("audio=talk.opus", "model=moss/", "hotwords=Ada,  Byron's [engine] ,")[0] == 0
    assert read_transcript("talk.json").info.settings["hotwords"] == "Ada, Byron's [engine]"
    err = command("audio=talk.opus", "model=moss/", "hotwords=Ada")[2]
    assert "was made from hotwords=Ada, Byron's [engine]; output.overwrite=true" in err


@pytest.mark.parametrize("language", ["en", "English", "ENGLISH"])
def test_the_language_is_recorded(talk, command, language):
    assert command("audio=talk.opus", f"language={language}")[0] == 0
    assert read_transcript("talk.json").info.settings["language"] == "en"
    assert "keeping" in command("audio=talk.opus", "language=en")[2]
    code, _, err = command("audio=talk.opus")
    assert code == 1
    assert "was made from language=en; output.overwrite=true" in err
    assert command("audio=talk.opus", "language=null", "output.overwrite=true")[0] == 0
    assert read_transcript("talk.json").info.settings["language"] is None


def test_voice_activity_detection(talk, command, monkeypatch):
    monkeypatch.setattr("unique_asr.vad.is_installed", lambda: True)
    assert command("audio=talk.opus", "vad=true")[0] == 0
    assert read_transcript("talk.json").info.settings["vad"] is True
    code, _, err = command("audio=talk.opus")
    assert code == 1
    assert "was made from vad=True; output.overwrite=true" in err
    monkeypatch.setattr("unique_asr.vad.is_installed", lambda: False)
    code, _, err = command("audio=talk.opus", "vad=true")
    assert code == 1
    assert "needs the package silero-vad" in err


def test_what_was_read_is_drawn(talk, command, monkeypatch):
    code, out, _ = command("audio=talk.opus", "output.reads=true", "output.format=srt")
    assert code == 0
    assert "talk.srt, talk.reads.svg" in out
    assert Path("talk.reads.svg").read_text().startswith("<svg")
    monkeypatch.setattr(FakeTranscriber, "records_reads", False)
    code, _, err = command("audio=talk.opus", "output.reads=true", "output.overwrite=true")
    assert code == 1
    assert "reads=true: model=default does not record" in err


def test_json_lines(talk, command):
    Path("bad.mp3").touch()
    code, out, err = command("audio=[talk.opus,bad.mp3]", "jsonl=true", "quiet=true")
    assert code == 1
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["segment"] * 4 + ["done", "error"]
    assert {event["audio"] for event in events[:5]} == {"talk.opus"}
    assert events[0]["text"] == " Segment 0: [red]é[/red]."
    assert events[4]["info"]["stop_reason"] == "end"
    assert events[4]["files"] == ["talk.txt", "talk.srt", "talk.json"]
    assert events[5] == {"event": "error", "audio": "bad.mp3", "message": "bad.mp3: the file is empty"}
    assert err == "error: bad.mp3: the file is empty\n"
    _, out, _ = command("audio=talk.opus", "jsonl=true")
    assert json.loads(out)["event"] == "kept"


class StandardInput:
    def __init__(self, content, terminal=False):
        self.buffer = io.BytesIO(content)
        self.buffer.isatty = lambda: terminal


def test_standard_input(talk, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StandardInput(talk.read_bytes()))
    code, out, _ = command("audio=-", "output.format=[txt,json]")
    assert code == 0
    assert len(out.splitlines()) == 5
    assert names() == ["stdin.json", "stdin.txt", "talk.opus"]
    assert read_transcript("stdin.json").info.audio == "stdin"
    assert read_transcript("stdin.json").info.duration == pytest.approx(9.06, abs=0.1)


@pytest.mark.parametrize(
    ("content", "terminal", "message"),
    [(b"", False, "stdin: the file is empty"), (b"no audio", False, "stdin: not audio"), (b"", True, "is a terminal")],
)
def test_standard_input_without_audio(talk, command, monkeypatch, content, terminal, message):
    monkeypatch.setattr(sys, "stdin", StandardInput(content, terminal))
    code, _, err = command("audio=-")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


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
