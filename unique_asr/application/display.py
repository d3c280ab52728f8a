"""What a person sees while recordings are transcribed: progress and time left, segments as they come, a summary."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from unique_asr.transcript import Segment, TranscriptionInfo

STAGES = {  # of the pipeline, in order
    "fetch": "Fetching",
    "load": "Loading the model",
    "encode": "Listening",
    "prefill": "Reading",
    "decode": "Transcribing",
}


SIGN_OF_LIFE = 10.0  # s between two lines where there is no terminal


@contextmanager
def show_waiting(what: str) -> Iterator[None]:
    """Show on standard error that something takes its time: a clock on a terminal, else a line now and then."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console, transient=True) as bar:
            bar.add_task(what, total=None)
            yield
        return
    console.print(f"{what} ...")
    begin, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(SIGN_OF_LIFE):
            console.print(f"{what} ... {time.monotonic() - begin:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def show_imports() -> AbstractContextManager[None]:
    """Show that PyTorch and transformers are imported, which takes seconds, where they are not there already."""
    return nullcontext() if "torch" in sys.modules else show_waiting("Loading PyTorch and transformers")


def format_time(seconds: float) -> str:
    """Return 00:12.3 for 12.3 s, and 1:02:03.4 for 3723.4 s."""
    tenths = max(0, round(10 * seconds))
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{minutes:02d}:{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{clock}" if hours else clock


class Bars:
    """Progress bars, one for each recording at work: how far it is, and how much time is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._open = 0  # recordings
        self._tasks: dict[tuple[str, str], TaskID] = {}  # of a recording and a stage
        self._done: dict[TaskID, float] = {}

    def open(self) -> None:
        self._open += 1
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                redirect_stdout=False,
            )
            self._progress.start()

    def close(self, recording: str) -> None:
        for key in [key for key in self._tasks if key[0] == recording]:
            self._progress.remove_task(self._tasks.pop(key))
        self._open -= 1
        if not self._open:
            self._progress.stop()
            self._progress = None

    def update(self, recording: str, stage: str, done: float, total: float) -> None:
        if self._progress is None:
            return
        key = recording, stage
        if key not in self._tasks:
            description = STAGES.get(stage, stage)
            description = f"{recording}: {description}" if recording else description
            self._tasks[key] = self._progress.add_task(description, total=total or None)
        elif self._done[self._tasks[key]] > done:
            self._progress.reset(self._tasks[key])  # another pass begins: its time left is its own
        self._done[self._tasks[key]] = done
        for other, task in self._tasks.items():
            if other[0] == recording:
                self._progress.update(task, visible=other == key)
        self._progress.update(self._tasks[key], completed=done, total=total or None)


class Display:
    """What a session tells of its work; this one shows nothing, and each method may be overridden.

    It is entered (`with display:`) while a recording is worked on.
    """

    def for_recording(self, name: str) -> Display:
        """Return the display of one recording among several at once."""
        return self

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def loading(self, model: str) -> None:
        """A model is about to be loaded, which takes seconds."""

    def progress(self, stage: str, done: float, total: float) -> None:
        """So much of a stage (see STAGES) is done; `total` is 0 where it is not known."""

    def segment(self, segment: Segment, recording: str) -> None:
        """A segment has been decoded, or read from what an earlier run left."""

    def summary(self, info: TranscriptionInfo, seconds: float, files: Sequence[Path]) -> None:
        """A recording is transcribed, in `seconds` of wall time, to `files`."""

    def kept(self, recording: str, files: Sequence[Path]) -> None:
        """Transcripts are there already and stay."""

    def note(self, message: str) -> None:
        """Something is worth knowing."""

    def warning(self, message: str) -> None:
        """A transcript may not be what was asked for."""

    def error(self, message: str, recording: str | None = None) -> None:
        """A recording, or all of them, cannot be transcribed."""


class ConsoleDisplay(Display):
    """Segments go to standard output, where they can be piped; progress and messages to standard error.

    Args:
        quiet: show warnings and errors alone.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.recording = ""  # that it is about, where there are others beside it
        self._messages = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        # One terminal cannot have two writers: with both on a terminal, everything goes through one console.
        both = sys.stdout.isatty() and self._messages.is_terminal
        self._out = self._messages if both else None
        self._bars = Bars(self._messages) if self._messages.is_terminal and not quiet else None

    def for_recording(self, name: str) -> ConsoleDisplay:
        """Return a display whose lines begin with the recording's name."""
        other = copy(self)
        other.recording = name
        return other

    def __enter__(self) -> ConsoleDisplay:
        if self._bars is not None:
            self._bars.open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.close(self.recording)

    def loading(self, model: str) -> None:
        if self._bars is None:
            self.note(f"Loading {model} ...")
        self.progress("load", 0, 1)

    def progress(self, stage: str, done: float, total: float) -> None:
        if self._bars is not None:
            self._bars.update(self.recording, stage, done, total)

    def segment(self, segment: Segment, recording: str) -> None:
        times = f"[{format_time(segment.start)} -> {format_time(segment.end)}]"
        self._print(self._named(f"{times} {segment.text.strip()}"))

    def summary(self, info: TranscriptionInfo, seconds: float, files: Sequence[Path]) -> None:
        self._print(self._named(f"{summarize(info, seconds)}; {', '.join(map(str, files))}"))

    def kept(self, recording: str, files: Sequence[Path]) -> None:
        listed = ", ".join(map(str, files))
        self.note(f"{recording}: keeping {listed}; output.overwrite=true replaces what is there")

    def note(self, message: str) -> None:
        if not self.quiet:
            self._messages.print(message)

    def usage(self, line: str) -> None:
        """Show how the program is called."""
        self._messages.print(f"usage: {line} (--help shows every option)")

    def warning(self, message: str) -> None:
        self._messages.print(f"warning: {self._named(message)}")

    def error(self, message: str, recording: str | None = None) -> None:
        self._messages.print(f"error: {self._named(message)}")

    def _named(self, message: str) -> str:
        """With the recording in front where several are at work, if it is not there already."""
        name = self.recording
        return f"{name}: {message}" if name and not message.startswith(name) else message

    def _print(self, line: str) -> None:
        if self.quiet:
            return
        if self._out is not None:
            self._out.print(line)
        else:
            print(line, flush=True)


class JSONLines(ConsoleDisplay):
    """For scripts: one JSON object a line on standard output, told apart by `event`; messages stay what they are.

    {"event": "segment", "audio": FILE, "id": 0, "start": 0.1, "end": 2.5, "text": ..., "words": [...], ...}
    {"event": "done", "audio": FILE, "files": [...], "seconds": 12.3, "info": {...}}
    {"event": "kept", "audio": FILE, "files": [...]}
    {"event": "error", "audio": FILE or null, "message": ...}
    """

    def segment(self, segment: Segment, recording: str) -> None:
        self._event("segment", recording, **segment.to_dict())

    def summary(self, info: TranscriptionInfo, seconds: float, files: Sequence[Path]) -> None:
        files = [str(path) for path in files]
        self._event("done", info.audio, files=files, seconds=round(seconds, 3), info=info.to_dict())

    def kept(self, recording: str, files: Sequence[Path]) -> None:
        self._event("kept", recording, files=[str(path) for path in files])

    def error(self, message: str, recording: str | None = None) -> None:
        self._event("error", recording, message=message)
        super().error(message)

    def _event(self, event: str, recording: str | None, **values: Any) -> None:
        print(json.dumps({"event": event, "audio": recording, **values}, ensure_ascii=False), flush=True)


def summarize(info: TranscriptionInfo, seconds: float) -> str:
    """Return one line: audio length, wall time and RTFx, coverage, and what sparse attention saved."""
    parts = [
        f"{format_speed(info.duration, seconds)} ({info.dtype} on {info.device})",
        f"coverage {100 * info.coverage:.0f} %",
    ]
    if info.passes > 1:
        parts.append(f"{info.passes} passes")
    if info.sparsity:
        steps, sparse_steps = info.sparsity["steps"], info.sparsity["sparse_steps"]
        share = info.sparsity["share_of_pages_read"]
        parts.append(f"{sparse_steps} of {steps} steps sparse, {100 * share:.0f} % of pages read")
    return ", ".join(parts)


def format_speed(audio: float, seconds: float) -> str:
    """Return audio length, wall time (both given in seconds) and RTFx, their ratio."""
    return f"{format_time(audio)} of audio in {format_time(seconds)}, RTFx {audio / max(seconds, 1e-9):.1f}"
