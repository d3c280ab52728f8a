"""A session: recordings to files with one transcriber, whoever asks for them."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
from command_line import FakeTranscriber, names

from unique_asr.application.display import Display
from unique_asr.application.jobs import Job, OutputError, find_recordings, plan
from unique_asr.application.session import Output, Session, TranscriptionSettings, describe_error, find_missing_formats
from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioError
from unique_asr.transcript import Segment
from unique_asr.writers import SegmentLog, read_transcript

OPTIONS = {"max_pass_seconds": None}


class Adaptable(FakeTranscriber):
    """Takes another attention over its model, as real transcribers do."""

    def with_attention(self, attention):
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "settings": {**self.settings, "attention": attention}}
        return other


class Recorder(Display):
    """Keeps what it is told."""

    def __init__(self):
        self.told, self.open = [], 0

    def __enter__(self):
        self.open += 1
        return self

    def __exit__(self, *_):
        self.open -= 1

    def loading(self, model):
        assert self.open
        self.told.append(("loading", model))

    def segment(self, segment, recording):
        self.told.append(("segment", segment.id))

    def summary(self, info, seconds, files):
        self.told.append(("summary", [path.name for path in files]))

    def kept(self, recording, files):
        self.told.append(("kept", [path.name for path in files]))

    def error(self, message, recording=None):
        self.told.append(("error", message))


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(Adaptable, "loaded", 0)
    with Session(lambda **settings: Adaptable(**settings)) as session:
        yield session


def settings(**changes):
    return TranscriptionSettings(options=OPTIONS, **changes)


def test_a_recording_becomes_files(talk, session):
    display = Recorder()
    (job,) = plan([talk])
    info = session.transcribe(job, settings(), Output(["txt", "json"]), display)
    assert info.stop_reason == "end"
    assert names() == ["talk.json", "talk.opus", "talk.txt"]
    segments = [("segment", number) for number in range(4)]
    assert display.told == [("loading", "default"), *segments, ("summary", ["talk.txt", "talk.json"])]
    assert display.open == 0


def test_what_is_there_needs_no_transcriber(talk, session):
    (job,) = plan([talk])
    session.transcribe(job, settings(), Output(["json"]), Display())
    display = Recorder()
    assert session.transcribe(job, settings(), Output(["json", "srt"]), display) is None
    assert display.told == [("kept", ["talk.json"])]
    assert "talk.srt" in names()  # from talk.json
    with pytest.raises(OutputError, match=r"was made from budget=512"):
        session.transcribe(job, settings(attention=SparseAttentionConfig(budget=None)), Output(["json"]), display)


def test_the_transcriber_is_kept(talk, session):
    """Another attention takes its model over; another model, or other options of it, are loaded."""
    (job,) = plan([talk])

    def transcribe(**changes):
        session.transcribe(job, settings(**changes), Output(["json"], overwrite=True), Display())
        return Adaptable.loaded, read_transcript("talk.json").info.attention["budget"]

    assert transcribe() == (1, 512)
    assert transcribe(language="en") == (1, 512)
    assert transcribe(attention=SparseAttentionConfig(budget=None)) == (1, None)
    assert transcribe(attention=SparseAttentionConfig(budget=64)) == (1, 64)
    assert transcribe(model="other") == (2, 512)
    assert transcribe() == (3, 512)


def test_a_model_is_given_up_before_another_is_loaded(talk):
    """Both would not fit into the memory of a GPU."""
    loaded = []

    def load(**arguments):
        gc.collect()
        assert [reference() for reference in loaded] == [None] * len(loaded)
        transcriber = Adaptable(**arguments)
        loaded.append(weakref.ref(transcriber))
        return transcriber

    session = Session(load)
    (job,) = plan([talk])
    for model in ("a", "b"):
        session.transcribe(job, settings(model=model), Output(["txt"], overwrite=True), Display())
    assert len(loaded) == 2


def test_what_stops_it_leaves_what_was_decoded(talk, monkeypatch):
    behaviour = {"stop": 3, "error": KeyboardInterrupt()}
    session = Session(lambda **arguments: Adaptable(**behaviour, **arguments))
    (job,) = plan([talk])
    with pytest.raises(KeyboardInterrupt):
        session.transcribe(job, settings(), Output(["txt"]), Display())
    assert names() == ["talk.opus", "talk.partial.jsonl", "talk.partial.txt"]
    assert len(SegmentLog.read(job.partial_path("jsonl"))) == 3

    behaviour.clear()
    monkeypatch.setattr(Adaptable, "decoded", [])
    resumed = Session(lambda **arguments: Adaptable(**arguments))
    display = Recorder()
    resumed.transcribe(job, settings(), Output(["txt"], resume=True), display)
    assert Adaptable.decoded == [2, 3]
    assert [value for kind, value in display.told if kind == "segment"] == [0, 1, 2, 3]
    assert names() == ["talk.opus", "talk.txt"]


def test_of_several_one_may_fail(talk, session):
    shutil.copy(talk, "b.opus")
    Path("a.opus").touch()
    display = Recorder()
    outcome = session.transcribe_all(plan(find_recordings(".")), settings(), Output(["txt"]), display)
    assert (outcome.failed, len(outcome.durations)) == (1, 2)
    assert ("error", "a.opus: the file is empty") in display.told
    assert {"b.txt", "talk.txt"} <= set(names())
    with pytest.raises(AudioError, match="empty"):
        session.transcribe_all(plan([Path("a.opus")]), settings(), Output(["txt"]), display, debug=True)


def test_a_model_that_does_not_load_is_tried_once_each_time(talk):
    shutil.copy(talk, "b.opus")
    attempts = []

    def load(**arguments):
        attempts.append(arguments["model"])
        raise ValueError("model=none: no such folder")

    session, jobs = Session(load), plan(find_recordings("."))
    for number in (1, 2):
        outcome = session.transcribe_all(jobs, settings(model="none"), Output(["txt"]), Display())
        assert (outcome.failed, len(attempts)) == (1, number)


def test_pages_that_were_read_are_drawn_if_the_model_records_them(talk, session, monkeypatch):
    (job,) = plan([talk])
    session.transcribe(job, settings(), Output(["txt"], page_reads=True), Display())
    assert job.path("reads.svg").read_text().startswith("<svg")
    monkeypatch.setattr(FakeTranscriber, "records_reads", False)
    with pytest.raises(ValueError, match="does not record"):
        session.transcribe(job, settings(), Output(["txt"], overwrite=True, page_reads=True), Display())


def test_missing_formats_are_found_before_the_model_is_loaded(tmp_path):
    job = Job(Path("talk.opus"), tmp_path / "talk")
    output = Output(["txt", "srt"])
    assert find_missing_formats(job, output, {}, Display()) == ["txt", "srt"]
    job.path("txt").write_text("corrected by hand\n")
    assert find_missing_formats(job, output, {}, Display()) == ["srt"]
    assert find_missing_formats(job, Output(["txt", "srt"], overwrite=True), {}, Display()) == ["txt", "srt"]


def test_provenance_is_what_the_info_keeps(talk, session):
    chosen = settings(prompt="Names: Ada.", language="en", start=1.0, end=5.0)
    (job,) = plan([talk])
    session.transcribe(job, chosen, Output(["json"]), Display())
    info = json.loads(job.path("json").read_text())["info"]
    kept = {"model": info["model"], **info["attention"], **info["settings"]}
    assert chosen.provenance.items() <= kept.items()
    assert job.find_difference(chosen.provenance) is None


def test_errors_are_one_line():
    job = Job(Path("a.opus"), Path("out/a"))
    assert describe_error(ValueError("two\nlines"), job) == "two lines"
    assert describe_error(RuntimeError("no"), job) == "a.opus: no (RuntimeError; debug=true shows where)"
    assert "the disk of out is full" in describe_error(OSError(28, "No space left"), job)


def test_a_display_may_leave_out_what_it_does_not_show(talk):
    display = Display()
    with display:
        display.progress("load", 0, 1)
        display.segment(Segment(0, 0.0, 1.0, "a"), "talk")
    assert display.for_recording("talk") is display
