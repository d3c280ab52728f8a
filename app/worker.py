"""One job at a time, in a thread of its own: a page that is closed or reloaded does not end the work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unique_asr.app.limits import Limits, Refusal
from unique_asr.app.store import DONE, FAILED, RUNNING, STOPPED, WAITING, Record, Store

from unique_asr.application.display import STAGES, Display, summarize
from unique_asr.application.session import Output, Session, TranscriptionSettings
from unique_asr.attention import SparseAttentionConfig
from unique_asr.transcript import Segment, TranscriptionInfo

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber


class Stopped(KeyboardInterrupt):
    """The user's Stop, raised where the work is; what was decoded is kept as after an interrupt."""


class Live(Display):
    """A job that waits or runs: what the page shows of it.

    Attributes:
        segments: of the transcript, as they come.
        status: one line.
        stop: is set to end the job where it is.
        finished: is set when its state on disk is final.
    """

    def __init__(self, record: Record, limits: Limits) -> None:
        self.record, self.limits = record, limits
        self.segments: list[Segment] = []
        self.kind = "transcript"
        self.status = "Waiting for the job before it"
        self.stop = threading.Event()
        self.finished = threading.Event()
        self._begins: dict[str, tuple[float, float]] = {}  # of each stage: the clock, and the share that was done

    def begin(self, kind: str) -> None:
        """Go on to another transcript of the same recording: "dense", to compare with."""
        self.kind, self._begins = kind, {}

    def loading(self, model: str) -> None:
        self.progress("load", 0, 1)

    def progress(self, stage: str, done: float, total: float) -> None:
        self._check()
        if stage == "encode":
            self.limits.check_duration(done)  # containers do not always tell how long they are
        parts = [STAGES.get(stage, stage) + (" densely, to compare" if self.kind == "dense" else "")]
        if total:
            now, share = time.monotonic(), min(done / total, 1.0)
            begin, before = self._begins.setdefault(stage, (now, share))
            parts.append(f"{100 * share:.0f} %")
            if share - before > 0.02:
                left = round((now - begin) * (1 - share) / (share - before))
                parts.append(f"{left // 60}:{left % 60:02d} left")
        self.status = ", ".join(parts)

    def segment(self, segment: Segment, recording: str) -> None:
        self._check()
        if self.kind == "transcript":
            self.segments.append(segment)

    def summary(self, info: TranscriptionInfo, seconds: float, files: Sequence[Path]) -> None:
        if self.kind == "transcript":
            self.record.message = " · ".join([summarize(info, seconds), *info.warnings])

    def _check(self) -> None:
        if self.stop.is_set():
            raise Stopped


class Worker:
    """Transcribes jobs in the order in which they come.

    Args:
        load: makes a transcriber, as `unique_asr.transcribers.make_transcriber` does.
        options: `attention`, the settings that the page's choices replace, and `transcriber`, further arguments of
            `load`.
        max_waiting: jobs that may wait.
    """

    def __init__(
        self,
        store: Store,
        load: Callable[..., Transcriber],
        limits: Limits,
        options: dict[str, Any],
        max_waiting: int = 8,
    ) -> None:
        self.store, self.limits, self.options, self.max_waiting = store, limits, options, max_waiting
        self._session = Session(load)
        self._queue: deque[Live] = deque()
        self._lives: dict[str, Live] = {}
        self._change = threading.Condition()
        store.recover()
        threading.Thread(target=self._work, name="transcription", daemon=True).start()

    def submit(self, record: Record) -> Live:
        """Put a job at the end of the queue; one that is in it already stays where it is."""
        with self._change:
            if record.id in self._lives:
                return self._lives[record.id]
            live = Live(record, self.limits)
            record.state, record.message = WAITING, ""
            self.store.save(record)
            self._lives[record.id] = live
            self._queue.append(live)
            self._change.notify()
        return live

    def check_room(self, jobs: int = 1) -> None:
        """Raise Refusal if so many more jobs may not wait."""
        if len(self._queue) + jobs > self.max_waiting:
            raise Refusal(f"At most {self.max_waiting} jobs may wait, and {len(self._queue)} do; try again later.")

    def live(self, id: str) -> Live | None:
        """Return the job of this id if it waits or runs."""
        return self._lives.get(id)

    def stop(self, id: str) -> bool:
        """Stop this job, waiting or running, and no other; False if it does neither."""
        live = self._lives.get(id)
        if live is None:
            return False
        live.stop.set()
        return True

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._queue:
                    self._change.wait()
                live = self._queue.popleft()
            record = live.record
            try:
                record.state = RUNNING
                self.store.save(record)
                self._run(live)
                record.state = DONE
            except Stopped:
                record.state, record.message = STOPPED, "Continue goes on from there"
            except Exception as error:
                known = isinstance(error, ValueError)
                text = " ".join(str(error).split()) or "failed"
                record.state = FAILED
                record.message = text if known else f"{text} ({type(error).__name__})"
            try:
                self.store.save(record)
            except OSError as error:
                record.message = f"{self.store.folder}: {error.strerror}"
            with self._change:
                del self._lives[record.id]
            live.finished.set()

    def _run(self, live: Live) -> None:
        settings = live.record.settings
        self._transcribe(live, "transcript", make_attention_config(settings, self.options))
        if settings["compare"]:
            live.begin("dense")
            dense = make_attention_config({**settings, "attention": "dense"}, self.options)
            self._transcribe(live, "dense", dense)

    def _transcribe(self, live: Live, kind: str, attention: SparseAttentionConfig) -> None:
        job = self.store.locate(live.record, kind)
        if job.path("json").exists():  # of an earlier attempt, which was stopped later
            return
        live.loading(live.record.settings["model"])
        chosen = live.record.settings
        settings = TranscriptionSettings(
            model=chosen["model"],
            attention=attention,
            options=self.options["transcriber"],
            prompt=chosen["prompt"] or None,
            language=chosen.get("language"),
            hotwords=chosen.get("hotwords"),
            vad=chosen.get("vad", False),
        )
        reads = bool(chosen.get("reads")) and kind == "transcript"
        self._session.transcribe(job, settings, Output(overwrite=True, resume=True, page_reads=reads), live)


def make_attention_config(settings: dict[str, Any], options: dict[str, Any]) -> SparseAttentionConfig:
    """Return the page's choices over those of the configuration; raise ValueError if they do not fit together."""
    chosen = {"page_size": settings["page_size"]}
    chosen["budget"] = settings["budget"] if settings["attention"] == "unique" else None
    return SparseAttentionConfig(**{**options["attention"], **chosen})
