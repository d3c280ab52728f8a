"""The command line without a model: a stand-in for the transcriber, and a process that takes its time."""

import sys
from pathlib import Path
from typing import ClassVar

from unique_asr.transcript import Segment, TranscriptionInfo, text_settings

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


class FakeTranscriber:
    """Two seconds a segment, two segments a pass; breaks off before segment `stop` with `error`."""

    loaded, name, records_reads = 0, "default", True
    decoded: ClassVar[list[int]] = []

    def __init__(self, stop=None, error=None, warnings=(), **settings):
        type(self).loaded += 1
        self.stop, self.error, self.warnings, self.settings = stop, error, list(warnings), settings
        settings["progress"]("load", 1, 1)

    def make_engine(self):
        return None

    def transcribe(self, audio, *, progress, unfinished, on_pass, reads=None, sequence=None, **told):
        if reads is not None:
            reads.duration = audio.duration
        info = TranscriptionInfo(
            audio.name,
            duration=audio.duration,
            model=self.settings["model"],
            attention=self.settings["attention"].to_dict(),
            settings=text_settings(
                max_pass_seconds=self.settings["max_pass_seconds"],
                start=audio.start,
                end=audio.end,
                channel=audio.channel,
                vad=audio.vad,
                **told,
            ),
            sparsity={"steps": 40, "sparse_steps": 30, "share_of_pages_read": 0.25},
        )
        first = unfinished.state["segment"] if unfinished else 0
        assert [segment.id for segment in unfinished.segments] == list(range(first)) if unfinished else True
        return self.segments(info, progress, first, on_pass), info

    def segments(self, info, progress, first, on_pass):
        for index in range(first, 4):
            if index == self.stop:
                raise self.error
            if index % 2 == 0:
                on_pass({"segment": index})
            self.decoded.append(index)
            progress("decode", 2.0 * index, 9.06)
            yield Segment(index, 2.0 * index, 2.0 * index + 1.9, f" Segment {index}: [red]é[/red].")
        info.stop_reason, info.coverage, info.passes, info.warnings = "end", 0.98, 1, self.warnings


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


SLOW = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from command_line import FakeTranscriber
from unique_asr.application import cli

class Slow(FakeTranscriber):
    def segments(self, *arguments):
        for segment in super().segments(*arguments):
            yield segment
            time.sleep(0.2 if segment.id < 2 else 60)

cli.main(sys.argv[1:], lambda **settings: Slow(**settings))
"""


def slow_command(*arguments):
    script = SLOW.format(root=str(ROOT), tests=str(Path(__file__).parent))
    return [sys.executable, "-c", script, *arguments]
