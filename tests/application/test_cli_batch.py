"""The command line with several recordings side by side: each keeps its files, whatever becomes of the others."""

import io
import json
import shutil
import signal
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import DATA, ROOT, FakeTranscriber, names
from rich.console import Console
from simulated_speech import noise

from unique_asr.application import cli
from unique_asr.application.display import Bars
from unique_asr.decoding.engine import PENDING
from unique_asr.longform.configuration import LongformConfig
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.writers import SegmentLog, read_transcript


class FakeEngine:
    """Stands in for a BatchEngine; raises `error` at a step, if `fails_at` is its number."""

    def __init__(self, fails_at=None, error=None, notice=""):
        self.fails_at, self.error, self.notice, self.device = fails_at, error, notice, "cpu"
        self.sequences, self.most, self.steps = [], 0, 0

    def new_sequence(self):
        self.sequences.append(object())
        self.most = max(self.most, len(self.sequences))
        return self.sequences[-1]

    def remove(self, sequence):
        self.sequences.remove(sequence)

    def step(self):
        self.steps += 1
        if self.steps == self.fails_at:
            raise self.error


class BesideTranscriber(FakeTranscriber):
    """Waits for a step before each segment; `breaks` has the segments before which recordings break off, and how."""

    def __init__(self, engine, breaks=None, **settings):
        super().__init__(**settings)
        self.engine, self.breaks = engine, breaks or {}

    def make_engine(self):
        return self.engine

    def transcribe(self, audio, *, sequence=None, **options):
        iterator, info = super().transcribe(audio, **options)
        stop, error = self.breaks.get(audio.name, (None, None))

        def segments():
            for segment in iterator:
                if sequence is not None:
                    assert sequence in self.engine.sequences
                    yield PENDING
                if segment.id == stop:
                    raise error
                yield segment

        return segments(), info


@pytest.fixture
def talks(tmp_path, monkeypatch):
    """Three recordings in an otherwise empty current folder."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        shutil.copy(DATA / "nomads.opus", tmp_path / f"{name}.opus")
    return tmp_path


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command; gives its exit code, standard output and standard error, and the engine that decoded."""
    monkeypatch.setattr(BesideTranscriber, "loaded", 0)
    monkeypatch.setattr(FakeTranscriber, "decoded", [])

    def run(*arguments, engine=None, **behaviour):
        engine = engine or FakeEngine()
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments, lambda **settings: BesideTranscriber(engine, **behaviour, **settings))
        assert engine.sequences == []  # none is left behind
        return exit_.value.code, *capsys.readouterr(), engine

    return run


def texts(folder="."):
    return {path.name: path.read_text() for path in Path(folder).glob("*.txt")}


def test_the_files_are_those_of_one_by_one(talks, command):
    assert command("audio=.", "output.dir=alone", "output.format=all")[3].most == 0
    code, out, err, engine = command("audio=.", "batch=2", "output.dir=beside", "output.format=all")
    assert code == 0
    assert (engine.most, BesideTranscriber.loaded) == (2, 2)
    assert names("beside") == names("alone")
    assert texts("beside") == texts("alone")
    lines = out.splitlines()
    assert lines[:2] == [
        "a.opus: [00:00.0 -> 00:01.9] Segment 0: [red]é[/red].",
        "b.opus: [00:00.0 -> 00:01.9] Segment 0: [red]é[/red].",
    ]
    assert sum("RTFx" in line and line.startswith(("a.opus: ", "b.opus: ", "c.opus: ")) for line in lines) == 3
    assert "c.opus (3 of 3)" in err
    assert "3 recordings: 00:27.2 of audio in " in err


def test_one_recording_looks_as_without_a_batch(talks, command):
    _, _, err, engine = command("audio=a.opus", "batch=8")
    assert engine.most == 1
    assert err == ""


def test_one_that_fails_does_not_stop_the_others(talks, command):
    Path("bad.mp3").touch()
    error = RuntimeError("CUDA\nerror")
    code, _, err, _ = command("audio=.", "batch=3", breaks={"b.opus": (3, error)})
    assert code == 1
    assert "error: bad.mp3: the file is empty" in err
    assert "error: b.opus: CUDA error (RuntimeError; debug=true shows where)" in err
    assert set(texts()) == {"a.txt", "b.partial.txt", "c.txt"}
    assert read_transcript("b.partial.json").info.stop_reason == "error"
    assert len(SegmentLog.read(Path("b.partial.jsonl"))) == 3

    code, _, err, _ = command("audio=[a.opus,b.opus,c.opus]", "batch=3", "resume=true")
    assert code == 0
    assert "b.opus: going on from 00:03.9" in err
    assert "keeping a.txt" in err
    assert set(texts()) == {"a.txt", "b.txt", "c.txt"}
    assert len(set(texts().values())) == 1


def test_an_interrupt_keeps_what_there_is_of_each(talks, command):
    code, _, err, _ = command("audio=.", "batch=2", breaks={"b.opus": (2, KeyboardInterrupt())})
    assert code == 130
    assert "a.opus: stopped at 00:05.9" in err
    assert "b.opus: stopped at 00:03.9" in err
    assert "Traceback" not in err
    for name, count in (("a", 3), ("b", 2)):
        assert len(SegmentLog.read(Path(f"{name}.partial.jsonl"))) == count
        partial = read_transcript(f"{name}.partial.json")
        assert (partial.info.stop_reason, len(partial.segments)) == ("interrupted", count)
    assert not [name for name in names() if name.startswith("c.") and name != "c.opus"]
    assert command("audio=.", "batch=2", "resume=true")[0] == 0
    assert len(set(texts().values())) == 1
    assert len(texts()) == 3
    assert not [name for name in names() if "partial" in name]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA"), "out of memory on cpu; lower batch or max_pass_seconds"),
        (RuntimeError("no"), "no (RuntimeError; debug=true shows where)"),
    ],
)
def test_a_step_that_fails_is_that_of_the_recordings_in_it(talks, command, error, message):
    code, _, err, _ = command("audio=.", "batch=2", engine=FakeEngine(3, error))
    assert code == 1
    for name in "ab":
        assert f"error: {name}.opus: {message}" in err
        assert len(SegmentLog.read(Path(f"{name}.partial.jsonl"))) == 2
    assert set(texts()) == {"a.partial.txt", "b.partial.txt", "c.txt"}


def test_a_model_that_does_not_load_is_tried_once(talks, capsys):
    def load(**settings):
        raise ValueError("model=none: no such folder")

    with pytest.raises(SystemExit) as exit_:
        cli.main(["audio=.", "batch=3"], load)
    assert exit_.value.code == 1
    assert capsys.readouterr().err.count("model=none: no such folder") == 1


def test_json_lines(talks, command):
    code, out, err, _ = command("audio=.", "batch=3", "jsonl=true", "quiet=true")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    for name in ("a.opus", "b.opus", "c.opus"):
        mine = [event for event in events if event["audio"] == name]
        assert [event["event"] for event in mine] == ["segment"] * 4 + ["done"]
        assert [event["id"] for event in mine[:4]] == [0, 1, 2, 3]
    assert {event["audio"] for event in events[:3]} == {"a.opus", "b.opus", "c.opus"}


def test_warnings_name_their_recording(talks, command):
    _, _, err, _ = command("audio=.", "batch=2", "quiet=true", warnings=["0:05: the text began to repeat itself"])
    assert sorted(err.splitlines())[0] == "warning: a.opus: 0:05: the text began to repeat itself"


def test_a_smaller_batch_is_said_once(talks, command):
    _, _, err, _ = command("audio=.", "batch=3", engine=FakeEngine(notice="3 recordings need 9 GB: 2 at a time"))
    assert err.count("3 recordings need 9 GB: 2 at a time") == 1


def test_a_model_that_takes_them_one_by_one_says_so(talks, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["audio=.", "batch=2"], lambda **settings: FakeTranscriber(**settings))
    assert exit_.value.code == 0
    assert "batch=2: default takes recordings one by one" in capsys.readouterr().err
    assert len(texts()) == 3


SLOW = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}, {tests!r} + "/application"]
from test_cli_batch import BesideTranscriber, FakeEngine
from unique_asr.application import cli

class Slow(FakeEngine):
    def step(self):
        super().step()
        time.sleep(0.1 if self.steps < 4 else 60)

cli.main(sys.argv[1:], lambda **settings: BesideTranscriber(Slow(), **settings))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_their_turns(talks, number):
    script = SLOW.format(root=str(ROOT), tests=str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", script, "audio=.", "batch=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(6):
        process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "a.opus: stopped at 00:05.9" in err
    assert "b.opus: stopped at 00:05.9" in err
    assert len(read_transcript("b.partial.json").segments) == 3


def test_progress_shows_every_recording_at_work():
    shown = io.StringIO()
    bars = Bars(Console(file=shown, force_terminal=True, width=100))
    bars.open()
    bars.open()
    bars.update("a.opus", "encode", 5, 10)
    bars.update("a.opus", "decode", 5, 10)
    bars.update("b.opus", "encode", 2.5, 10)
    bars._progress.refresh()
    last = shown.getvalue().rpartition("a.opus: ")[2]
    assert last.startswith("Transcribing")
    assert "b.opus: Listening" in last
    assert "50%" in last
    assert "25%" in last
    bars.close("a.opus")
    before = len(shown.getvalue())
    bars._progress.refresh()
    assert "a.opus" not in shown.getvalue()[before:]
    assert "b.opus" in shown.getvalue()[before:]
    bars.close("b.opus")
    bars.update("b.opus", "decode", 1, 1)  # nobody is at work


def write_noise(path, seconds):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((noise(seconds) * 32767).astype(np.int16).tobytes())


@pytest.fixture
def transcribe(tiny, talks):
    """Runs the command with the real decoding of a tiny model, several passes a recording; gives the exit code.

    Dense, as padding changes what sparse steps read.
    """
    for path, seconds in zip("abc", (7, 5, 9), strict=True):
        Path(f"{path}.opus").unlink()
        write_noise(f"{path}.wav", seconds)
    longform = LongformConfig(retry_seconds=1.0, skip_seconds=1.0, min_progress_seconds=0.1)

    def load(model, **settings):
        transcriber = SpeechLLMTranscriber(tiny, longform=longform, **settings)
        transcriber.name = model
        return transcriber

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["audio=.", "attention=dense", "decoding.max_pass_seconds=3", *arguments], load)
        return exit_.value.code

    return run


def test_a_model_side_by_side_and_resumed_writes_what_it_writes_alone(transcribe, monkeypatch):
    assert transcribe("output.dir=alone", "parallel_passes=1") == 0
    assert transcribe("output.dir=beside", "batch=2") == 0
    assert texts("beside") == texts("alone")
    assert all(texts("alone").values())
    assert len(texts("alone")) == 3

    append, written = SegmentLog.append, []

    def interrupted(log, segment):
        append(log, segment)
        written.append(log.path.name)
        if len(set(written)) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentLog, "append", interrupted)
        assert transcribe("output.dir=resumed", "batch=2") == 130
    kept = [name for name in names("resumed") if name.endswith(".partial.jsonl")]
    assert sorted(set(written)) == kept
    assert transcribe("output.dir=resumed", "batch=2", "resume=true") == 0
    assert texts("resumed") == texts("alone")


def test_passes_side_by_side_are_resumed(transcribe, monkeypatch):
    assert transcribe("output.dir=whole", "parallel_passes=3") == 0
    append, written = SegmentLog.append, []

    def interrupted(log, segment):
        append(log, segment)
        written.append(segment)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentLog, "append", interrupted)
        assert transcribe("output.dir=resumed", "parallel_passes=3") == 130
    assert transcribe("output.dir=resumed", "parallel_passes=3", "resume=true") == 0
    assert texts("resumed") == texts("whole")
