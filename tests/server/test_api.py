"""The server as OpenAI's own client and plain HTTP see it; a stand-in takes the model's place."""

import json
import math
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import soundfile
from serving import TALK, TEXT, Running, Script, wait_for

from unique_asr.application.limits import TooLarge


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server for requests that leave nothing behind, two models, and its script."""
    script = Script()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("UNIQUE_ASR_API_KEY", raising=False)
        server = Running(tmp_path_factory.mktemp("uploads"), script, models=["default", "Qwen/none"], max_minutes=0.2)
    yield server, script
    server.stop()
    assert list(server.folder.iterdir()) == []


@pytest.fixture
def api(shared):
    return shared[0].client().audio.transcriptions


def transcribe(api, file=TALK, **options):
    return api.create(**{"model": "default", "file": file, **options})


def post(server, content=None, name="talk.opus", headers=None, **fields):
    """The answer of plain HTTP; a field that is None is left out."""
    fields = {"model": "default", **fields}
    data = {name: value for name, value in fields.items() if value is not None}
    content = TALK.read_bytes() if content is None else content
    files = {"file": (name, content)} if content else {"unused": (None, "a")}
    return httpx.post(f"{server.url}/v1/audio/transcriptions", data=data, files=files, headers=headers, timeout=30)


def test_json(api, shared):
    answer = transcribe(api, prompt="lower case", language="English")
    assert answer.text == TEXT
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(9.06, abs=0.1)
    assert shared[1].told[-1] == {"prompt": "lower case", "language": "en", "hotwords": None}


def test_text(api):
    assert transcribe(api, response_format="text") == f"{TEXT}\n"


@pytest.mark.parametrize(
    ("name", "start", "media_type"),
    [("srt", "1\n00:00:00,000 --> 00:00:01,9", "text/plain"), ("vtt", "WEBVTT\n\n00:00:00.000", "text/vtt")],
)
def test_subtitles(api, shared, name, start, media_type):
    answer = transcribe(api, response_format=name)
    assert answer.startswith(start)
    assert answer.count("-->") == 4
    assert post(shared[0], response_format=name).headers["content-type"] == f"{media_type}; charset=utf-8"


def test_verbose_json_has_all_fields(api):
    answer = transcribe(api, response_format="verbose_json")
    assert (answer.text, answer.language, answer.words) == (TEXT, "english", None)
    assert answer.duration == pytest.approx(9.06, abs=0.1)
    assert [segment.start for segment in answer.segments] == [0.0, 2.0, 4.0, 6.0]
    assert answer.segments[1].avg_logprob == pytest.approx(math.log(0.5))
    type(answer).model_validate(answer.model_dump(), strict=True)


def test_verbose_json_has_the_granularities_that_are_asked_for(api):
    answer = transcribe(api, response_format="verbose_json", timestamp_granularities=["word"])
    assert answer.segments is None
    assert (answer.words[2].word, answer.words[2].start, answer.words[2].end) == ("word2", 4.0, 5.9)
    answer = transcribe(api, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert len(answer.segments) == len(answer.words) == 4


def test_a_prompt_that_the_model_does_not_know_is_refused(api):
    with pytest.raises(
        openai.BadRequestError, match="prompt=sing a song: model=default knows 'lower case' alone"
    ) as error:
        transcribe(api, prompt="sing a song")
    assert error.value.param == "prompt"


def test_the_log_does_not_say_what_was_said(serve, script, caplog):
    script.warnings = ["0:04: dropped text that was not said: 'our masters'"]
    with caplog.at_level("INFO"):
        post(serve())
    assert "1 warnings about the transcript" in caplog.text
    assert "our masters" not in caplog.text


def test_warnings_reach_the_client(serve, script):
    script.warnings = ["talk.opus: coverage 20 %"]
    server = serve()
    assert post(server).json()["warnings"] == script.warnings
    assert json.loads(post(server, stream="true").text.split("data: ")[-1])["warnings"] == script.warnings


def test_events_come_while_the_recording_is_transcribed(serve, script):
    script.wait_at = 2
    stream = transcribe(serve().client().audio.transcriptions, stream=True)
    first = [next(stream), next(stream)]
    assert [event.type for event in first] == ["transcript.text.delta"] * 2
    assert not script.gate.is_set()
    script.gate.set()
    *rest, done = stream
    assert "".join(event.delta for event in first + rest) == TEXT
    assert (done.type, done.text) == ("transcript.text.done", TEXT)


def test_events_are_those_of_server_sent_events(shared):
    answer = post(shared[0], stream="true")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert len(events) == 5
    assert all(json.loads(event.removeprefix("data: "))["type"].startswith("transcript.text.") for event in events)


def test_signs_of_life_while_a_request_waits(serve, script, monkeypatch):
    monkeypatch.setattr("unique_asr.server.api.KEEP_ALIVE_SECONDS", 0.0)
    script.wait_at = 0
    server = serve()
    form = {"data": {"model": "default", "stream": "true"}, "files": {"file": TALK.read_bytes()}}
    with httpx.stream("POST", f"{server.url}/v1/audio/transcriptions", **form, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": still at work"
        script.gate.set()
        assert TEXT in "\n".join(lines)


def test_hotwords_of_a_model_that_cannot_be_told_any_are_refused(api):
    with pytest.raises(openai.BadRequestError, match="hotwords=Ada, Byron: model=default cannot be told words"):
        transcribe(api, extra_body={"keywords": ["Ada", "Byron"]})


# Refusals


@pytest.mark.parametrize(
    ("options", "status", "param", "message"),
    [
        ({"model": "whisper-1"}, 404, "model", "model=whisper-1: this server offers default, Qwen/none"),
        ({"model": None}, 400, "model", "model: name one; this server offers default, Qwen/none"),
        ({"content": b""}, 400, "unused", "unused: is not known here"),
        ({"content": b"no audio"}, 400, "file", "talk.opus: not audio or video that FFmpeg can read"),
        ({"name": "../../a/b\n.opus", "content": b"no audio"}, 400, "file", "b%0A.opus: not audio"),
        ({"response_format": "xml"}, 400, "response_format", "response_format=xml: choose from json, text, srt"),
        ({"response_format": "srt", "stream": "true"}, 400, "stream", "stream=true: is possible with"),
        ({"stream": "maybe"}, 400, "stream", "stream=maybe: choose from true, false"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities", "needs response_format=verbose_json"),
        ({"timestamp_granularities[]": "letter"}, 400, "timestamp_granularities", "choose from segment, word"),
        ({"temperature": "0.8"}, 400, "temperature", "temperature: only 0 is possible"),
        ({"temperature": "hot"}, 400, "temperature", "temperature: only 0 is possible"),
        ({"language": "fr"}, 400, "language", "language=fr: model=default takes en"),
        ({"include[]": "logprobs"}, 400, "include", "include: is not known here; leave it out"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "prompt: is given 2 times"),
        ({"file": "talk.opus", "content": b""}, 400, "file", "file: is no file; give one"),
    ],
)
def test_refusals_are_one_line_in_the_form_of_openai(shared, options, status, param, message):
    answer = post(shared[0], **options)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert error["param"] == param
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_is_no_form_is_refused(shared):
    url = f"{shared[0].url}/v1/audio/transcriptions"
    for form in ({}, {"data": {"model": "default"}}, {"json": {"model": "default"}}):
        answer = httpx.post(url, **form)
        assert answer.status_code == 400
        assert "file: give one recording, as multipart/form-data" in answer.json()["error"]["message"]
    two = httpx.post(url, files=[("file", b"a"), ("file", b"b")])
    assert (two.status_code, two.json()["error"]["type"]) == (400, "invalid_request_error")
    broken = httpx.post(url, content=b"nonsense", headers={"Content-Type": "multipart/form-data; boundary=a"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_errors_of_the_client_are_those_of_openai(api):
    with pytest.raises(openai.NotFoundError) as error:
        transcribe(api, model="whisper-1")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="no audio stream"):
        transcribe(api, file=("picture.png", picture()))


def picture():
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()


def test_unknown_paths_and_methods(shared):
    for method, path, status in (("GET", "/v1/none", 404), ("GET", "/v1/audio/transcriptions", 405)):
        answer = httpx.request(method, f"{shared[0].url}{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(f"{method} {path}: ")


def test_a_long_recording_is_refused(api, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(13 * 8000, dtype=np.float32), 8000)
    with pytest.raises(openai.APIStatusError, match=r"longer than 0\.2 minutes, which is the limit") as error:
        transcribe(api, file=tmp_path / "long.wav")
    assert error.value.status_code == 413


@pytest.mark.parametrize("megabytes", [1.2, 3, 40])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_upload_is_refused(serve, megabytes, chunked):
    """Just above the limit it has been read; far above, the client still gets the answer."""
    server = serve(max_megabytes=1)
    upload = httpx.Request("POST", "http://-", data={"model": "default"}, files={"file": b"a" * int(megabytes * 1e6)})
    body, kind = upload.read(), upload.headers["content-type"]
    content = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    url = f"{server.url}/v1/audio/transcriptions"
    answer = httpx.post(url, content=content, headers={"Content-Type": kind}, timeout=30)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "file_too_large"
    assert "1 MB" in answer.json()["error"]["message"]


def test_who_waits_to_be_asked_need_not_send_a_large_upload(serve):
    """curl does so: Expect: 100-continue."""
    server = serve(max_megabytes=1)
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        lines = ["POST /v1/audio/transcriptions HTTP/1.1", "Host: a", "Content-Length: 9000000", "Expect: 100-continue"]
        lines.append("Content-Type: multipart/form-data; boundary=a")
        begin = time.monotonic()
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - begin < 2


def test_failures_of_the_model(serve, script, caplog):
    server, script.fail_at = serve(), 1
    with pytest.raises(openai.InternalServerError, match=r"the model failed \(RuntimeError\)"):
        transcribe(server.client().audio.transcriptions)
    stream = transcribe(server.client().audio.transcriptions, stream=True)
    assert next(stream).delta.startswith("Segment 0")
    with pytest.raises(openai.APIError, match=r"the model failed \(RuntimeError\)"):
        next(stream)
    assert "Traceback" in caplog.text
    script.error = ValueError("talk.opus: out of memory on cpu")
    answer = post(server)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    assert answer.json()["error"]["message"] == "talk.opus: out of memory on cpu"
    script.fail_at = None
    assert transcribe(server.client().audio.transcriptions).text == TEXT  # the next one is not touched


def test_a_length_that_shows_only_while_the_recording_is_read(serve, script):
    """As transcribers pass such an error on."""
    script.fail_at, script.error = 0, ValueError("talk.opus: longer")
    script.error.__cause__ = TooLarge("The recording is longer than 1 minutes, which is the limit.")
    answer = post(serve())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert answer.json()["error"]["message"] == str(script.error.__cause__)


def test_a_full_disk(serve, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    server = serve()
    monkeypatch.setattr("unique_asr.server.api.shutil.copyfileobj", fail)
    answer = post(server)
    assert answer.status_code == 507
    assert answer.json()["error"]["message"] == "the recording cannot be kept here (No space left on device)"


# Keys


def test_keys(serve, monkeypatch):
    monkeypatch.setenv("UNIQUE_ASR_API_KEY", "first, sécond")
    with pytest.raises(ValueError, match="UNIQUE_ASR_API_KEY: use letters"):
        serve()
    monkeypatch.setenv("UNIQUE_ASR_API_KEY", "first, second")
    server = serve()
    assert len(server.client("second").models.list().data) == 1
    for key, message in (("third", "the key is wrong"), ("firs", "the key is wrong")):
        with pytest.raises(openai.AuthenticationError, match=message):
            transcribe(server.client(key).audio.transcriptions)
    answer = post(server)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "a key is needed" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert post(server, headers={"Authorization": "Basic first"}).status_code == 401
    assert post(server, headers={"Authorization": "Bearer first"}).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200  # for probes, which have no key


# Models, health, metrics


def test_models(shared):
    models = shared[0].client().models
    assert [model.id for model in models.list().data] == ["default", "Qwen/none"]
    assert models.retrieve("Qwen/none").owned_by == "unique_asr"
    with pytest.raises(openai.NotFoundError, match="model=none: this server offers"):
        models.retrieve("none")


def test_the_first_model_is_loaded_at_the_start_and_another_when_it_is_asked_for(serve, script):
    server = serve(models=["default", "Qwen/none"])
    assert script.made == ["default"]
    transcribe(server.client().audio.transcriptions, model="Qwen/none")
    assert script.made == ["default", "Qwen/none"]


def test_health_and_metrics(serve, script):
    script.wait_at = 1
    server = serve()
    waiting = threading.Thread(target=post, args=(server,))
    waiting.start()
    assert script.reached.wait(20)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 1, "waiting": 0}
    assert "unique_asr_jobs_running 1.0" in httpx.get(f"{server.url}/metrics").text
    script.gate.set()
    waiting.join()
    post(server, model="none")
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert lines['unique_asr_requests_total{status="200"}'] == "1.0"
    assert lines['unique_asr_requests_total{status="404"}'] == "1.0"
    assert float(lines["unique_asr_audio_seconds_total"]) == pytest.approx(9.06, abs=0.1)
    assert lines["unique_asr_transcription_seconds_count"] == "1.0"
    assert lines["unique_asr_jobs_running"] == "0.0"


# The queue


def test_more_than_may_wait_is_refused_with_429(serve, script):
    script.wait_at = 0
    server = serve(max_waiting=1)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(server))) for _ in range(2)]
    threads[0].start()
    assert script.reached.wait(20)
    threads[1].start()
    wait_for(lambda: server.queue.waiting == 1)
    with pytest.raises(openai.RateLimitError, match="At most 1 jobs may wait, and 1 do; try again later") as error:
        transcribe(server.client().audio.transcriptions)
    assert error.value.response.headers["retry-after"] == "10"
    assert error.value.code == "rate_limit_exceeded"
    script.gate.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_goes_stops_its_job(serve, script, stream):
    script.wait_at = 1
    server = serve()
    gone = httpx.Client(timeout=1.0)
    form = {"data": {"model": "default", "stream": stream}, "files": {"file": TALK.read_bytes()}}
    with pytest.raises(httpx.ReadTimeout):
        gone.post(f"{server.url}/v1/audio/transcriptions", **form)
    gone.close()
    wait_for(lambda: server.queue.running is None)
    assert not script.gate.is_set()
    assert list(server.folder.iterdir()) == []
    wait_for(lambda: 'unique_asr_requests_total{status="499"} 1.0' in httpx.get(f"{server.url}/metrics").text)
    script.wait_at = None
    assert post(server).status_code == 200


def test_a_client_that_goes_while_it_waits_leaves_the_queue(serve, script):
    script.wait_at = 1
    server = serve()
    first = threading.Thread(target=post, args=(server,))
    first.start()
    assert script.reached.wait(20)
    gone = httpx.Client(timeout=1.0)
    with pytest.raises(httpx.ReadTimeout):
        gone.post(f"{server.url}/v1/audio/transcriptions", data={"model": "default"}, files={"file": TALK.read_bytes()})
    gone.close()
    wait_for(lambda: server.queue.waiting == 0)
    assert server.queue.running is not None  # of the other client
    script.gate.set()
    first.join()


@pytest.mark.parametrize("finishes", [True, False])
def test_a_server_that_stops_finishes_what_runs_or_says_that_it_stops(serve, script, finishes):
    script.wait_at = 1
    server, answers = serve(stop_seconds=20 if finishes else 0), []
    threads = [threading.Thread(target=lambda: answers.append(post(server))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert script.reached.wait(20)
    wait_for(lambda: server.queue.waiting == 1)
    server.stop(wait=False)
    wait_for(lambda: answers)  # who waits is told at once
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"] == "the server is stopping; try again later"
    if finishes:
        script.gate.set()
    for thread in threads:
        thread.join(20)
    assert answers[1].status_code == (200 if finishes else 503)
    server.stop()
