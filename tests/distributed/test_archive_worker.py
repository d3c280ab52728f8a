"""A worker in this process: its files are those of the command line, and what a dead one left is done once."""

import pickle
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from command_line import DATA, FakeTranscriber, names

from unique_asr.application.display import Display
from unique_asr.application.jobs import find_recordings, plan
from unique_asr.application.session import Output, TranscriptionSettings
from unique_asr.decoding.engine import PENDING
from unique_asr.distributed.ledger import Ledger
from unique_asr.distributed.ray_runner import resolve_job
from unique_asr.distributed.worker import ATTEMPTS, ArchiveWorker
from unique_asr.remote import FetchLimits
from unique_asr.writers import read_transcript


class Killed(BaseException):
    """The process is gone."""


class Mortal(FakeTranscriber):
    """Dies at some recordings, after two segments."""

    deadly: ClassVar[set[str]] = set()
    heard: ClassVar[list[str]] = []

    def transcribe(self, audio, **options):
        segments, info = super().transcribe(audio, **options)
        name = Path(audio.name).name
        self.heard.append(name)

        def live():
            for segment in segments:
                if segment.id == 2 and name in self.deadly:
                    raise Killed
                yield segment

        return live(), info


class Beside(Mortal):
    """Decodes several recordings side by side."""

    def make_engine(self):
        return Engine()

    def transcribe(self, audio, *, sequence=None, **options):
        segments, info = super().transcribe(audio, **options)

        def pending():
            for segment in segments:
                if sequence is not None:
                    yield PENDING
                yield segment

        return pending(), info


class Engine:
    notice, device = "", "cpu"

    def new_sequence(self):
        return object()

    def remove(self, sequence):
        pass

    def step(self):
        pass


@pytest.fixture
def talks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        shutil.copy(DATA / "nomads.opus", f"{name}.opus")
    monkeypatch.setattr(Mortal, "deadly", set())
    monkeypatch.setattr(Mortal, "heard", [])
    return tmp_path


def rows_of(audio="."):
    jobs = [resolve_job(job) for job in plan(find_recordings(audio))]
    return {"number": list(range(len(jobs))), "job": [pickle.dumps(job) for job in jobs]}


def make_worker(ledger=None, load=Mortal, batch=1, **options):
    settings, output = TranscriptionSettings(options={"max_pass_seconds": None}), Output(["txt", "json"])
    return ArchiveWorker(ledger or Ledger(), settings, output, load, batch, FetchLimits(), Path.cwd(), **options)


class Told(Display):
    def __init__(self):
        self.told = []

    def summary(self, info, seconds, files):
        self.told.append(("summary", info.audio, [str(file) for file in files]))

    def kept(self, recording, files):
        self.told.append(("kept", recording, [str(file) for file in files]))

    def error(self, message, recording=None):
        self.told.append(("error", message))


def told_of(results):
    display = Told()
    for log in results["log"]:
        pickle.loads(log).replay(display, Path("shown"))
    return display.told


@pytest.mark.parametrize(("load", "batch"), [(Mortal, 1), (Beside, 2), (Beside, 8)])
def test_files_and_what_is_told(talks, load, batch):
    (talks / "bad.mp3").touch()
    results = make_worker(load=load, batch=batch)(rows_of())
    assert results["number"] == [0, 1, 2, 3]
    assert results["fatal"] == [""] * 4
    told = told_of(results)
    assert told[0] == ("summary", "a.opus", ["shown/a.txt", "shown/a.json"])
    assert ("error", "bad.mp3: the file is empty") in told
    assert [kind for kind, *_ in told].count("summary") == 3
    assert read_transcript("b.json").info.audio == "b.opus"  # the name that was given, not where the worker found it
    logs = [pickle.loads(log) for log in results["log"]]
    assert [log.seconds is not None for log in logs] == [True, True, False, True]
    assert [log.failed for log in logs] == [False, False, True, False]
    assert {kind for kind, *_ in told_of(make_worker()(rows_of("[abc].opus")))} == {"kept"}
    assert sorted(Mortal.heard) == ["a.opus", "b.opus", "c.opus"]


@pytest.mark.parametrize(("load", "batch"), [(Mortal, 1), (Beside, 2), (Beside, 3)])
def test_jobs_of_a_dead_worker_are_done_once(talks, monkeypatch, load, batch):
    """Those that it had finished keep their logs, so that they count as transcribed."""
    ledger, rows = Ledger(), rows_of()
    monkeypatch.setattr(Mortal, "deadly", {"c.opus"})
    with pytest.raises(Killed):
        make_worker(ledger, load, batch)(rows)
    finished = [name for name in names() if name.endswith(".json") and "partial" not in name]
    monkeypatch.setattr(Mortal, "deadly", set())
    monkeypatch.setattr(Mortal, "heard", [])
    told = told_of(make_worker(ledger, load, batch)(rows))
    assert [line[:2] for line in told] == [("summary", f"{name}.opus") for name in "abc"]
    assert len(Mortal.heard) == 3 - len(finished)
    assert all(len(read_transcript(f"{name}.json").segments) == 4 for name in "abc")
    assert not [name for name in names() if "partial" in name]


def test_a_recording_that_kills_its_workers_is_given_up(talks, monkeypatch):
    ledger, rows = Ledger(), rows_of()
    monkeypatch.setattr(Mortal, "deadly", {"b.opus"})
    for _ in range(ATTEMPTS):
        with pytest.raises(Killed):
            make_worker(ledger, Beside, 3)(rows)
    told = told_of(make_worker(ledger, Beside, 3)(rows))
    assert [line[0] for line in told] == ["summary", "error", "summary"]
    assert told[1][1].startswith("b.opus: its worker died 3 times")
    assert {"a.txt", "c.txt"} <= set(names())
    assert Mortal.heard.count("b.opus") == ATTEMPTS


def test_a_model_that_does_not_load_ends_it_all(talks):
    attempts = []

    def load(**arguments):
        attempts.append(arguments)
        raise ValueError("model=none: no such\nfolder")

    worker = make_worker(load=load)
    assert worker(rows_of())["fatal"] == ["model=none: no such folder"] * 3
    assert worker(rows_of())["fatal"] == ["model=none: no such folder"] * 3
    assert len(attempts) == 1


def test_a_folder_that_is_not_shared(talks, monkeypatch):
    monkeypatch.setattr("unique_asr.distributed.worker.MARKER_SECONDS", 0.0)
    marker = talks / "out" / ".marker"
    (message, *_) = make_worker(marker=marker)(rows_of())["fatal"]
    assert message.startswith(f"output.dir={talks}/out: is another folder on the machine ")
    assert Mortal.heard == []
    marker.parent.mkdir()
    marker.touch()
    assert make_worker(marker=marker).fatal == ""
