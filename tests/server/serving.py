"""A running server with a stand-in in the model's place, and how to talk to it."""

import threading
import time
from pathlib import Path

from command_line import DATA, FakeTranscriber
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from openai import OpenAI

from unique_asr.server.cli import make_server
from unique_asr.transcript import Word

ROOT = Path(__file__).parents[2]
TALK = DATA / "nomads.opus"
TEXT = "Segment 0: [red]é[/red]. Segment 1: [red]é[/red]. Segment 2: [red]é[/red]. Segment 3: [red]é[/red]."


class Script:
    """What the stand-in does: it waits before segment `wait_at` until `gate` opens, and fails at `fail_at`."""

    def __init__(self):
        self.gate, self.reached, self.made = threading.Event(), threading.Event(), []
        self.wait_at, self.fail_at, self.error = None, None, RuntimeError("the model failed")
        self.told, self.warnings = [], []

    def load(self, **settings):
        self.made.append(settings["model"])
        return Scripted(self, settings)


class Scripted(FakeTranscriber):
    def __init__(self, script, settings):
        super().__init__(**settings)
        self.script = script

    def transcribe(self, audio, **arguments):
        self.script.told.append({name: arguments[name] for name in ("prompt", "language", "hotwords")})
        for _ in audio.blocks():
            arguments["progress"]("encode", audio.duration or 9.0, 9.0)
        self.warnings = self.script.warnings
        return super().transcribe(audio, **arguments)

    def segments(self, info, progress, first, on_pass):
        for segment in super().segments(info, progress, first, on_pass):
            if segment.id == self.script.wait_at:
                self.script.reached.set()
                while not self.script.gate.wait(0.01):
                    progress("decode", 1, 2)
            if segment.id == self.script.fail_at:
                raise self.script.error
            segment.words = [Word(f" word{segment.id}", segment.start, segment.end, 0.5)]
            segment.confidence = 0.5
            yield segment


def configuration(**changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("server")
    return OmegaConf.merge(config, {"port": 0, **changes})


class Running:
    """A server in a thread; `folder` is where its uploads are."""

    def __init__(self, folder, script, **changes):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.server = make_server(configuration(**changes), folder, script.load)
        self.url, self.queue = self.server.url, self.server.queue
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self.server.started)

    def client(self, key="any"):
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def stop(self, wait=True):
        self.server.should_exit = True
        if wait:
            self._thread.join(20)
            assert not self._thread.is_alive()


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
