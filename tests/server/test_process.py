"""The server as a process: what it prints, how it ends, and once with the default model."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from serving import ROOT, TALK, wait_for

TESTS = Path(__file__).parents[1]
STAND_IN = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}, {str(TESTS / "server")!r}]
from serving import Script
from unique_asr.server.cli import main
script = Script()
script.wait_at = 1
main(sys.argv[1:], script.load)
"""
DEFAULT_MODEL = ["-m", "unique_asr.server"]


class Process:
    """A server in a process of its own, whose temporary files are all in `folder`."""

    def __init__(self, folder, command, *options):
        self.folder = folder
        folder.mkdir()
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
        self.process = subprocess.Popen(
            [sys.executable, *command, "port=0", *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = [self.process.stdout.readline() for _ in range(2)]
        self.url = re.fullmatch(r"Serving on (http://\S+) \(Ctrl-C stops it\)\n", lines[1])[1]
        wait_for(self._answers)

    def _answers(self):
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.ConnectError:
            return False

    def transcribe(self, **options):
        client = OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)
        return client.audio.transcriptions.create(**{"model": "default", "file": TALK, **options})

    def end(self, number):
        """Send a signal; give exit code and standard error."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture
def start(tmp_path):
    started = []

    def start(command, *options):
        started.append(Process(tmp_path / "temporary", command, *options))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(start, number):
    server = start(["-c", STAND_IN], "stop_seconds=0")
    answers = []

    def ask():
        url = f"{server.url}/v1/audio/transcriptions"
        answers.append(httpx.post(url, data={"model": "default"}, files={"file": TALK.read_bytes()}, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: httpx.get(f"{server.url}/health").json()["running"] == 1)
    assert len(list(server.folder.rglob("recording"))) == 1
    code, err = server.end(number)
    asking.join()
    assert code == 0
    assert answers[0].status_code == 503
    assert "Traceback" not in err
    assert list(server.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("models=[]", 2, "error: models: name at least one, such as default"),
        ("max_waiting=0", 2, "error: max_waiting=0: give a whole number of requests, 1 or more"),
        ("stop_seconds=-1", 2, "error: stop_seconds=-1: give a number, 0 or more"),
        ("attention.page_size=7", 2, "error: attention.page_size is 7"),
        ("models=[none/none/none]", 1, "error: "),
        ("port=70000", 2, "error: port=70000: give a whole number from 0 to 65535"),
        ("host=no.such.host.invalid", 1, "error: port=8000: cannot be used on no.such.host.invalid; choose another"),
    ],
)
def test_options_that_cannot_be_are_one_line(option, code, message):
    command = [sys.executable, "-m", "unique_asr.server", option]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        option = f"port={taken.getsockname()[1]}"
        command = [sys.executable, "-m", "unique_asr.server", option]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
        )
    assert done.stderr == f"error: {option}: cannot be used on 127.0.0.1; choose another\n"


def test_an_open_server_without_a_key_is_warned_of(start):
    server = start(["-c", STAND_IN], "host=0.0.0.0")
    code, err = server.end(signal.SIGTERM)
    assert code == 0
    assert err.splitlines()[0] == "warning: whoever reaches 0.0.0.0 may use this server; UNIQUE_ASR_API_KEY sets a key"


@pytest.mark.slow
def test_the_default_model(start):
    server = start(DEFAULT_MODEL)
    answer = server.transcribe(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert len(answer.words) > 10
    assert answer.words[-1].end <= answer.duration
    assert " ".join(word.word for word in answer.words).split() == answer.text.split()
    assert server.transcribe(response_format="srt").startswith("1\n00:00:0")
    *deltas, done = server.transcribe(stream=True)
    assert "".join(event.delta for event in deltas) == done.text == answer.text
    code, err = server.end(signal.SIGTERM)
    assert code == 0
    assert err.count(" 200 00:09.") == 3
    assert not list(server.folder.glob("unique-asr*"))  # torch may have left a cache
