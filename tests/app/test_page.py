"""The page's handlers, driven as a browser does, through gradio's client; a stand-in takes the model's place."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs gradio")

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from unique_asr.app.cli import launch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.transcript import Segment, TranscriptionInfo, text_settings
from unique_asr.writers import read_transcript

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
STATUS, TEXT, SEGMENTS, PLAYER, FILES, DIFFERENCES, MEASURES, PLOT, JOBS = range(9)  # as the client counts: no layout


class Script:
    """What the stand-in does: a segment a second of audio, `gate` open or one `allow` at a time."""

    def __init__(self):
        self.gate, self.fail_at, self.loaded = threading.Event(), None, 0
        self.gate.set()

    def load(self, **settings):
        self.loaded += 1
        return FakeTranscriber(self, settings)


class FakeTranscriber:
    records_reads = True

    def __init__(self, script, settings):
        self.script, self.settings = script, settings

    def with_attention(self, attention):
        return FakeTranscriber(self.script, {**self.settings, "attention": attention})

    def transcribe(self, audio, *, progress, unfinished, on_pass, reads=None, sequence=None, **told):
        if reads is not None:
            reads.duration = audio.duration
        attention = self.settings["attention"].to_dict()
        part = {"start": audio.start, "end": audio.end, "channel": audio.channel, "vad": audio.vad}
        text = text_settings(max_pass_seconds=None, **part, **told)
        info = TranscriptionInfo(audio.name, duration=audio.duration, attention=attention, settings=text)
        info.sparsity = {"steps": 9, "sparse_steps": 5, "share_of_pages_read": 0.5}
        return self.segments(info, progress, unfinished.state["segment"] if unfinished else 0, on_pass), info

    def segments(self, info, progress, first, on_pass):
        word = "dense" if self.settings["attention"].budget is None else "sparse"
        for index in range(first, 9):
            on_pass({"segment": index})
            progress("decode", index, 9)
            if index == self.script.fail_at:
                raise RuntimeError("the model failed")
            yield Segment(index, float(index), index + 0.9, f"Segment {index} is {word}.", [], 0.5)
            while not self.script.gate.wait(0.02):
                progress("decode", index, 9)
        info.stop_reason, info.coverage = "end", 1.0


def configuration(folder, **changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("app")
    return OmegaConf.merge(
        config,
        {"jobs": str(folder / "jobs"), "port": None, "examples": [], "folders": [str(folder / "talks")], **changes},
    )


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def serve(tmp_path, script):
    """Launches the page, again after a restart too; gives its blocks."""
    (tmp_path / "talks").mkdir()
    running = []

    def start(**changes):
        while running:
            running.pop().close()
        running.append(launch(configuration(tmp_path, **changes), script.load, block=False))
        return running[-1]

    yield start
    script.gate.set()
    while running:
        running.pop().close()


@pytest.fixture
def page(serve):
    return Client(serve().local_url, verbose=False)


def settings(upload=None, recorded=None, path="", compare=False, **changes):
    values = {"model": "default", "attention": "unique", "budget": 64, "page_size": 8, "prompt": "", "hotwords": ""}
    values |= {"language": "", "vad": False, "reads": False, **changes}
    uploads = upload if isinstance(upload, list) else [upload] if upload else None
    files = [handle_file(str(each)) for each in uploads] if uploads else None
    return [files, recorded, path, *values.values(), compare]


def transcribe(page, **options):
    return page.predict(*settings(**options), api_name="/transcribe")


def job_id(result):
    return result[JOBS]["value"]


def folder_of(tmp_path, result):
    return tmp_path / "jobs" / job_id(result)


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_upload_becomes_a_job_with_every_format(page, tmp_path):
    talk = tmp_path / "été (1), 'a' $(touch x) & b.opus"
    shutil.copy(DATA / "nomads.opus", talk)
    result = transcribe(page, upload=talk, prompt="Names: Ada.")
    assert result[TEXT].splitlines()[3] == "[00:03.0] Segment 3 is sparse."
    assert result[SEGMENTS]["data"][3] == ["00:03.0", "00:03.9", "Segment 3 is sparse.", "0.50"]
    assert "done. 00:09.1 of audio" in result[STATUS]
    assert [Path(name).suffix for name in result[FILES]] == [".txt", ".srt", ".vtt", ".tsv", ".json"]
    assert Path(result[FILES][0]).read_text().startswith("Segment 0")
    folder = folder_of(tmp_path, result)
    assert (folder / "recording.opus").read_bytes() == talk.read_bytes()  # under a name of our own
    assert read_transcript(folder / "transcript.json").info.settings["prompt"] == "Names: Ada."
    assert not list(tmp_path.rglob("x"))
    assert not list(folder.glob("*.partial.*"))


def test_text_comes_while_it_is_decoded(page, script, tmp_path):
    script.gate.clear()
    job = page.submit(*settings(upload=DATA / "nomads.opus"), api_name="/transcribe")
    wait_for(lambda: any(output[TEXT] for output in job.outputs()))
    assert not job.done()
    wait_for(lambda: any("Transcribing, 0 %" in output[STATUS] for output in job.outputs()))
    wait_for(lambda: any("nomads.opus (running)" in str(output[JOBS]) for output in job.outputs()))
    script.gate.set()
    assert len(job.result(timeout=30)[TEXT].splitlines()) == 9


def test_stop_ends_this_job_only_and_continue_completes_it(page, serve, script, tmp_path):
    script.gate.clear()
    other = Client(page.src, verbose=False)
    first = page.submit(*settings(upload=DATA / "nomads.opus"), api_name="/transcribe")
    wait_for(lambda: any(output[TEXT] for output in first.outputs()))
    second = other.submit(*settings(upload=DATA / "repose.opus"), api_name="/transcribe")
    wait_for(lambda: second.outputs())
    assert "Waiting" in second.outputs()[0][STATUS]  # one job at a time
    stopped = job_id(first.outputs()[0])
    page.predict(stopped, api_name="/stop")
    result = first.result(timeout=30)
    assert "stopped" in result[STATUS]
    assert len(result[TEXT].splitlines()) == 1
    assert {Path(name).name for name in result[FILES]} >= {"transcript.partial.txt", "transcript.partial.json"}
    script.gate.set()
    assert len(second.result(timeout=30)[TEXT].splitlines()) == 9

    result = page.predict(stopped, api_name="/continue")
    assert len(result[TEXT].splitlines()) == 9
    assert "done" in result[STATUS]
    with pytest.raises(AppError, match="stopped or failed"):
        page.predict(stopped, api_name="/continue")


def test_jobs_survive_a_reload_and_a_restart(page, serve, script):
    script.gate.clear()
    job = page.submit(*settings(upload=DATA / "nomads.opus"), api_name="/transcribe")
    wait_for(lambda: any(output[TEXT] for output in job.outputs()))
    reloaded = Client(page.src, verbose=False)
    page.close()
    again = reloaded.submit(api_name="/latest")
    wait_for(lambda: any(output[TEXT] for output in again.outputs()))  # it is still at work
    script.gate.set()
    assert len(again.result(timeout=30)[TEXT].splitlines()) == 9

    restarted = Client(serve().local_url, verbose=False)
    result = restarted.predict(api_name="/latest")
    assert len(result[TEXT].splitlines()) == 9
    assert "nomads.opus (done)" in result[JOBS]["choices"][0][0]
    assert restarted.predict(job_id(result), api_name="/show")[TEXT] == result[TEXT]


def test_a_job_that_the_server_left_behind_can_be_continued(serve, script, tmp_path):
    page = Client(serve().local_url, verbose=False)
    script.fail_at = 4
    result = transcribe(page, upload=DATA / "nomads.opus")
    assert "failed. the model failed (RuntimeError)" in result[STATUS]
    assert len(result[TEXT].splitlines()) == 4
    record = folder_of(tmp_path, result) / "job.json"
    record.write_text(record.read_text().replace('"failed"', '"running"'))  # as a crash leaves it
    script.fail_at = None
    page = Client(serve().local_url, verbose=False)
    assert "restarted" in page.predict(api_name="/latest")[STATUS]
    result = page.predict(job_id(result), api_name="/continue")
    assert len(result[TEXT].splitlines()) == 9


def test_dense_and_sparse_are_compared(page):
    result = transcribe(page, upload=DATA / "nomads.opus", compare=True)
    assert [row[0] for row in result[MEASURES]["data"]] == ["dense", "sparse"]
    assert {piece["class_or_confidence"] for piece in result[DIFFERENCES]} == {None, "only dense", "only sparse"}
    assert len(result[FILES]) == 10
    assert len(result[TEXT].splitlines()) == 9


def test_what_was_read_is_plotted_if_asked_for(page, tmp_path):
    result = transcribe(page, upload=DATA / "nomads.opus")
    assert not result[PLOT]["visible"]
    result = transcribe(page, upload=DATA / "nomads.opus", reads=True, compare=True)
    plot = folder_of(tmp_path, result) / "transcript.reads.svg"
    assert result[PLOT]["visible"]
    assert result[PLOT]["value"] == plot.read_text()
    assert ">0:08</text>" in plot.read_text()
    assert len(result[FILES]) == 11
    assert not list(plot.parent.glob("dense.reads.svg"))
    assert page.predict(job_id(result), api_name="/show")[PLOT]["visible"]


def test_voice_activity_detection_reaches_the_recording(page, tmp_path, monkeypatch):
    monkeypatch.setattr("unique_asr.vad.is_installed", lambda: True)
    result = transcribe(page, upload=DATA / "nomads.opus", vad=True)
    assert read_transcript(folder_of(tmp_path, result) / "transcript.json").info.settings["vad"] is True
    monkeypatch.setattr("unique_asr.vad.is_installed", lambda: False)
    with pytest.raises(AppError, match="needs the package silero-vad"):
        transcribe(page, upload=DATA / "nomads.opus", vad=True)


def test_several_files_are_a_job_each_one_after_the_other(page, script, tmp_path):
    script.gate.clear()
    shown = page.submit(*settings(upload=[DATA / "nomads.opus", DATA / "repose.opus"]), api_name="/transcribe")
    wait_for(lambda: any(output[TEXT] for output in shown.outputs()))
    states = [json.loads(path.read_text()) for path in (tmp_path / "jobs").glob("*/job.json")]
    assert sorted((each["title"], each["state"]) for each in states) == [
        ("nomads.opus", "running"),
        ("repose.opus", "waiting"),
    ]
    script.gate.set()
    assert "repose.opus: done" in shown.result(timeout=30)[STATUS]
    assert any("nomads.opus: done" in output[STATUS] for output in shown.outputs())
    assert len(list((tmp_path / "jobs").glob("*/transcript.json"))) == 2


def test_another_job_that_is_chosen_is_not_taken_away_by_the_next_file(page, script):
    script.gate.clear()
    shown = page.submit(*settings(upload=[DATA / "nomads.opus", DATA / "repose.opus"]), api_name="/transcribe")
    wait_for(lambda: any(output[TEXT] for output in shown.outputs()))
    chosen = page.submit(job_id(shown.outputs()[0]), api_name="/show")
    wait_for(lambda: shown.done())
    script.gate.set()
    assert "nomads.opus: done" in chosen.result(timeout=30)[STATUS]
    assert not any("repose.opus" in output[STATUS] for output in shown.outputs())


def test_the_language_reaches_the_model(page, tmp_path):
    result = transcribe(page, upload=DATA / "nomads.opus", language="English")
    assert read_transcript(folder_of(tmp_path, result) / "transcript.json").info.settings["language"] == "en"


def test_a_file_of_an_allowed_folder(page, tmp_path):
    shutil.copy(DATA / "nomads.opus", tmp_path / "talks" / "a b.opus")
    result = transcribe(page, path="a b.opus")
    assert "a b.opus: done" in result[STATUS]
    assert json.loads((folder_of(tmp_path, result) / "job.json").read_text())["audio"].endswith("talks/a b.opus")
    assert "done" in transcribe(page, path=str(tmp_path / "talks" / "a b.opus"))[STATUS]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A page for requests that make no job, with a secret beside its allowed folder; the page's client, the folder."""
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "talks").mkdir()
    shutil.copy(DATA / "nomads.opus", folder / "secret.opus")
    (folder / "talks" / "link.opus").symlink_to(folder / "secret.opus")
    script = Script()
    blocks = launch(configuration(folder), script.load, block=False)
    yield Client(blocks.local_url, verbose=False), folder
    blocks.close()
    assert script.loaded == 0
    assert list((folder / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../secret.opus", "link.opus", "~/.profile", "none.opus", "", "../talks", "a\0b"]
)
def test_no_other_file_can_be_named(refusing, path):
    with pytest.raises(AppError, match=r"no such file in the folders|nothing was given"):
        transcribe(refusing[0], path=path)


def test_no_other_file_can_be_passed_off_as_an_upload(refusing):
    page, folder = refusing
    forged = {"path": str(folder / "secret.opus"), "meta": {"_type": "gradio.FileData"}}
    call = f"{page.src}gradio_api/call/transcribe"
    started = httpx.post(call, json={"data": [[forged], *settings()[1:]]})
    with httpx.stream("GET", f"{call}/{started.json()['event_id']}", timeout=20) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("event:")]
    assert lines[-1] == "event: error"


def test_no_other_file_is_served(refusing):
    page, folder = refusing
    for place in (folder / "secret.opus", folder / "talks" / ".." / "secret.opus", ROOT / "pyproject.toml"):
        assert httpx.get(f"{page.src}gradio_api/file={place}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upload": DATA / "nomads.opus", "path": "a.opus"}, "more than one was given"),
        ({"upload": DATA / "manifest.jsonl"}, "not audio or video"),
        ({"upload": [DATA / "nomads.opus", DATA / "manifest.jsonl"]}, "manifest.jsonl: not audio or video"),
        ({"upload": DATA / "nomads.opus", "language": "French"}, "language=French: model=default takes en; leave"),
        ({"upload": DATA / "nomads.opus", "hotwords": "Ada"}, "hotwords=Ada: model=default cannot be told words"),
        ({"upload": DATA / "nomads.opus", "budget": 63}, "multiple"),
        ({"upload": DATA / "nomads.opus", "page_size": 7}, "page_size"),
    ],
)
def test_refusals_are_one_line(refusing, options, message):
    with pytest.raises(AppError, match=message) as error:
        transcribe(refusing[0], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("id", ["", "none", "../..", "20260101-000000-00000000", None])
def test_only_ids_of_jobs_reach_the_disk(refusing, id):
    assert refusing[0].predict(id, api_name="/show")[STATUS] == "No job yet."
    refusing[0].predict(id, api_name="/stop")


def test_limits(serve, script):
    page = Client(serve(max_minutes=0.1).local_url, verbose=False)
    with pytest.raises(AppError, match=r"longer than 0\.1 minutes"):
        transcribe(page, upload=DATA / "nomads.opus")


def test_attention_settings_are_those_of_the_page():
    from unique_asr.app.worker import make_attention_config

    options = {"attention": SparseAttentionConfig(score="mean").to_dict()}
    chosen = make_attention_config({"attention": "unique", "budget": 64, "page_size": 16}, options)
    assert (chosen.budget, chosen.page_size, chosen.score) == (64, 16, "mean")
    assert make_attention_config({"attention": "dense", "budget": 64, "page_size": 16}, options).budget is None
