"""The page's handlers, driven as a browser does, through gradio's client; a stand-in takes the model's place."""

import json
import shutil
import signal
import socket
import subprocess
import sys
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
from unique_asr.app.store import name_files
from unique_asr.app.visitors import COOKIE, find_browser

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


def browse(page, browser="a"):
    """A browser that opens a page, or another one's page, and has been there before."""
    url = page.src if isinstance(page, Client) else page.local_url
    cookies = {"cookie": f"{COOKIE}={32 * browser}"} if browser else {}
    return Client(url, headers=cookies, verbose=False)


@pytest.fixture
def page(serve):
    return browse(serve())


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
    result = transcribe(page, upload=talk, prompt="lower case")
    assert result[TEXT].splitlines()[3] == "[00:03.0] Segment 3 is sparse."
    assert result[SEGMENTS]["data"][3] == ["00:03.0", "00:03.9", "Segment 3 is sparse.", "0.50"]
    assert "done. 00:09.1 of audio" in result[STATUS]
    assert [Path(name).suffix for name in result[FILES]] == [".txt", ".srt", ".vtt", ".tsv", ".json"]
    assert Path(result[FILES][0]).read_text().startswith("Segment 0")
    folder = folder_of(tmp_path, result)
    assert (folder / "recording.opus").read_bytes() == talk.read_bytes()  # under a name of our own
    (transcript,) = folder.glob("files/été (1)*.json")  # without what gradio takes for dangerous
    assert read_transcript(transcript).info.settings["prompt"] == "lower case"
    assert not list(tmp_path.rglob("x"))
    assert not list(folder.rglob("*.partial.*"))
    assert {Path(name).stem for name in result[FILES]} == {transcript.stem}


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
    other = browse(page)
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
    assert {Path(name).name for name in result[FILES]} >= {"nomads.partial.txt", "nomads.partial.json"}
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
    reloaded = browse(page)
    page.close()
    again = reloaded.submit(api_name="/latest")
    wait_for(lambda: any(output[TEXT] for output in again.outputs()))  # it is still at work
    script.gate.set()
    assert len(again.result(timeout=30)[TEXT].splitlines()) == 9

    restarted = browse(serve())
    result = restarted.predict(api_name="/latest")
    assert len(result[TEXT].splitlines()) == 9
    assert "nomads.opus (done)" in result[JOBS]["choices"][0][0]
    assert restarted.predict(job_id(result), api_name="/show")[TEXT] == result[TEXT]


def test_a_job_that_the_server_left_behind_can_be_continued(serve, script, tmp_path):
    page = browse(serve())
    script.fail_at = 4
    result = transcribe(page, upload=DATA / "nomads.opus")
    assert "failed. the model failed (RuntimeError)" in result[STATUS]
    assert len(result[TEXT].splitlines()) == 4
    record = folder_of(tmp_path, result) / "job.json"
    record.write_text(record.read_text().replace('"failed"', '"running"'))  # as a crash leaves it
    script.fail_at = None
    page = browse(serve())
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
    plot = folder_of(tmp_path, result) / "files" / "nomads.reads.svg"
    assert result[PLOT]["visible"]
    assert result[PLOT]["value"] == plot.read_text()
    assert ">0:08</text>" in plot.read_text()
    assert len(result[FILES]) == 11
    assert not list(plot.parent.glob("*dense.reads.svg"))
    assert page.predict(job_id(result), api_name="/show")[PLOT]["visible"]


def test_voice_activity_detection_reaches_the_recording(page, tmp_path, monkeypatch):
    monkeypatch.setattr("unique_asr.vad.is_installed", lambda: True)
    result = transcribe(page, upload=DATA / "nomads.opus", vad=True)
    assert read_transcript(folder_of(tmp_path, result) / "files" / "nomads.json").info.settings["vad"] is True
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
    assert len(list((tmp_path / "jobs").glob("*/files/*.json"))) == 2


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
    assert read_transcript(folder_of(tmp_path, result) / "files" / "nomads.json").info.settings["language"] == "en"


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
    yield browse(blocks), folder
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
    page = browse(serve(max_minutes=0.1))
    with pytest.raises(AppError, match=r"longer than 0\.1 minutes"):
        transcribe(page, upload=DATA / "nomads.opus")


def begin(page, script, **options):
    """A job that is at work; what it gives so far."""
    script.gate.clear()
    job = page.submit(*settings(**options), api_name="/transcribe")
    wait_for(lambda: any(output[TEXT] for output in job.outputs()))
    return job


def test_a_queue_that_is_full_takes_nothing(serve, script, tmp_path):
    page = browse(serve(max_waiting=0))
    job = begin(page, script, upload=DATA / "nomads.opus")
    with pytest.raises(AppError, match="At most 0 jobs may wait, and 0 do"):
        transcribe(browse(page), upload=DATA / "repose.opus")
    assert len(list((tmp_path / "jobs").iterdir())) == 1
    script.gate.set()
    assert "done" in job.result(timeout=30)[STATUS]


def test_a_batch_is_taken_up_to_the_limit_and_the_rest_is_named(serve, script, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("gradio.Warning", lambda message, **_: warnings.append(message))
    batch = [tmp_path / f"{name}.opus" for name in ("one", "two", "three", "four")]
    for copy in batch:
        shutil.copy(DATA / "nomads.opus", copy)
    page = browse(serve(max_waiting=1))
    job = begin(page, script, upload=batch)
    missing = "At most 1 jobs may wait, and 1 do; try again later. Not taken: three.opus, four.opus"
    assert warnings == [missing]
    assert all(missing in output[STATUS] for output in job.outputs())
    script.gate.set()
    result = job.result(timeout=30)
    assert "two.opus: done" in result[STATUS]
    assert missing in result[STATUS]
    assert len(list((tmp_path / "jobs").iterdir())) == 2


def test_a_disk_that_is_full_names_the_rest_too(page, tmp_path, monkeypatch):
    real = shutil.copyfile

    def copy(source, target, **options):
        real(source, target, **options)
        if "jobs" in Path(target).parts and "repose" in str(source):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("unique_asr.app.store.shutil.copyfile", copy)
    result = transcribe(page, upload=[DATA / "nomads.opus", DATA / "repose.opus"])
    assert "nomads.opus: done" in result[STATUS]
    assert "(No space left on device) Not taken: repose.opus" in result[STATUS]
    assert len(list((tmp_path / "jobs").iterdir())) == 1  # what was half copied is gone
    with pytest.raises(AppError, match="cannot be kept there"):
        transcribe(page, upload=DATA / "repose.opus")


def test_stop_takes_a_waiting_job_out_of_the_queue_at_once(serve, script):
    page = browse(serve(max_waiting=1))
    first = begin(page, script, upload=DATA / "nomads.opus")
    second = browse(page).submit(*settings(upload=DATA / "repose.opus"), api_name="/transcribe")
    wait_for(lambda: second.outputs())
    page.predict(job_id(second.outputs()[0]), api_name="/stop")
    result = second.result(timeout=5)  # the first one is still at work
    assert "repose.opus: stopped. it had not begun" in result[STATUS]
    assert not first.done()
    third = browse(page).submit(*settings(upload=DATA / "repose.opus"), api_name="/transcribe")  # its place is free
    wait_for(lambda: third.outputs())
    assert "Waiting" in third.outputs()[0][STATUS]
    script.gate.set()
    assert "done" in first.result(timeout=30)[STATUS]
    assert "done" in third.result(timeout=30)[STATUS]
    result = page.predict(job_id(result), api_name="/continue")
    assert len(result[TEXT].splitlines()) == 9


def test_a_view_that_was_left_does_not_come_back(page, script):
    """What a handler showed last is sent again when it ends: then Stop would be about the job of the older view."""
    older = begin(page, script, upload=DATA / "nomads.opus")
    newer = page.submit(*settings(upload=DATA / "repose.opus"), api_name="/transcribe")  # of the same tab
    wait_for(lambda: newer.outputs())
    left = older.result(timeout=10)
    assert all(value.get("props", value) == {"__type__": "update"} for value in left)  # nothing is shown
    script.gate.set()
    assert "repose.opus: done" in newer.result(timeout=30)[STATUS]


def test_a_browser_sees_its_own_jobs_only(serve):
    page = browse(serve())
    result = transcribe(page, upload=DATA / "nomads.opus")
    for other in (browse(page, "b"), browse(page, "")):
        assert other.predict(api_name="/latest")[STATUS] == "No job yet."
        assert other.predict(api_name="/latest")[JOBS]["choices"] == []
        assert "done" in other.predict(job_id(result), api_name="/show")[STATUS]  # who knows the id may see it
    theirs = transcribe(browse(page, "b"), upload=DATA / "repose.opus")
    assert [choice[1] for choice in page.predict(api_name="/latest")[JOBS]["choices"]] == [job_id(result)]
    shared = browse(serve(shared=True), "c").predict(api_name="/latest")
    assert {choice[1] for choice in shared[JOBS]["choices"]} == {job_id(result), job_id(theirs)}


def test_a_browser_gets_a_cookie_once(page):
    url = page.src
    answer = httpx.get(url)
    cookie = answer.headers["set-cookie"]
    assert find_browser(cookie.partition(";")[0])
    assert "HttpOnly" in cookie
    assert "set-cookie" not in httpx.get(url, headers={"cookie": cookie.partition(";")[0]}).headers
    assert "set-cookie" in httpx.get(url, headers={"cookie": f"{COOKIE}=forged"}).headers
    assert "set-cookie" not in httpx.get(f"{url}config").headers


@pytest.mark.parametrize(
    "title", ["job.mp3", "recording.json", "..opus", "a/../b", "\0", "x" * 300 + ".wav", 99 * "会议"]
)
def test_no_name_of_a_recording_does_harm(title, tmp_path):
    from unique_asr.app.store import Store

    store = Store(tmp_path / "jobs")
    record = store.create(DATA / "nomads.opus", title, {}, copy=True)
    job = store.locate(record, "dense")
    assert job.base.parent == tmp_path / "jobs" / record.id / "files"
    assert len(job.partial_path("jsonl").name.encode()) <= 200
    assert store.load(record.id) == record


def test_files_are_named_after_the_recording():
    assert name_files("Été, 2026.05.01 (b).m4a") == "Été, 2026.05.01 (b)"
    assert name_files("a:b?.mp3") == "a_b_"
    assert name_files(".opus") == "recording"
    assert name_files("\udce9t\udce9.wav") == "_t_"


def test_jobs_of_earlier_versions_are_found(serve, tmp_path):
    result = transcribe(browse(serve()), upload=DATA / "nomads.opus")
    folder = folder_of(tmp_path, result)
    for file in (folder / "files").iterdir():
        file.rename(folder / file.name.replace("nomads", "transcript"))
    record = json.loads((folder / "job.json").read_text())
    del record["name"], record["browser"]
    (folder / "job.json").write_text(json.dumps(record))
    result = browse(serve(shared=True)).predict(api_name="/latest")
    assert len(result[TEXT].splitlines()) == 9
    assert len(result[FILES]) == 5


def test_the_command_says_where_the_page_is_and_nothing_else(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "unique_asr.app", f"port={port}", f"jobs={tmp_path}/jobs", "examples=[]"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            assert lines == ["Starting the page ...\n", f"The page is on http://127.0.0.1:{port} (Ctrl-C ends it)\n"]
            page = Client(f"http://127.0.0.1:{port}/", verbose=False)
            assert page.predict(api_name="/latest")[STATUS] == "No job yet."
            with pytest.raises(AppError, match="not audio or video"):
                transcribe(page, upload=DATA / "manifest.jsonl")
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert rest == "The page has ended; jobs that were not done can be continued\n"
    assert process.returncode == 0


def test_attention_settings_are_those_of_the_page():
    from unique_asr.app.worker import make_attention_config

    options = {"attention": SparseAttentionConfig(score="mean").to_dict()}
    chosen = make_attention_config({"attention": "unique", "budget": 64, "page_size": 16}, options)
    assert (chosen.budget, chosen.page_size, chosen.score) == (64, 16, "mean")
    assert make_attention_config({"attention": "dense", "budget": 64, "page_size": 16}, options).budget is None
