"""The jobs of the page: what a record on disk asks for, and how far it is. They outlive a page that is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unique_asr.app.player import write_heard
from unique_asr.app.store import DONE, FAILED, RUNNING, STOPPED, WAITING, Record, Store

from unique_asr.application.display import STAGES, summarize
from unique_asr.application.limits import RecordingLimits, Refusal
from unique_asr.application.queue import JobQueue, QueuedJob, Stopped
from unique_asr.application.session import Output, Session, TranscriptionSettings
from unique_asr.attention import SparseAttentionConfig
from unique_asr.transcript import Segment, TranscriptionInfo


class Live(QueuedJob):
    """A job that waits or runs: what the page shows of it. It is finished when its state on disk is final.

    Attributes:
        segments: of the transcript, as they come.
        status: one line.
    """

    def __init__(self, record: Record, worker: Worker) -> None:
        super().__init__()
        self.record, self.worker, self.limits = record, worker, worker.limits
        self.segments: list[Segment] = []
        self.kind = "transcript"
        self.status = "Waiting for the job before it"
        self._begins: dict[str, tuple[float, float]] = {}  # of each stage: the clock, and the share that was done

    def run(self, session: Session) -> None:
        self.worker.run(self, session)

    def settle(self, error: BaseException | None) -> None:
        self.worker.settle(self, error)

    def begin(self, kind: str) -> None:
        """Go on to another transcript of the same recording: "dense", to compare with."""
        self.kind, self._begins = kind, {}

    def loading(self, model: str) -> None:
        self.progress("load", 0, 1)

    def progress(self, stage: str, done: float, total: float) -> None:
        self.check_stop()
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
        self.check_stop()
        if self.kind == "transcript":
            self.segments.append(segment)

    def summary(self, info: TranscriptionInfo, seconds: float, files: Sequence[Path]) -> None:
        if self.kind == "transcript":
            self.record.message = " · ".join([summarize(info, seconds), *info.warnings])


class Worker:
    """Makes jobs of records, and keeps their state on disk.

    Args:
        queue: runs the jobs.
        options: `attention`, the settings that the page's choices replace, and `transcriber`, further arguments of
            `unique_asr.transcribers.make_transcriber`.
    """

    def __init__(self, store: Store, queue: JobQueue, limits: RecordingLimits, options: dict[str, Any]) -> None:
        self.store, self.queue, self.limits, self.options = store, queue, limits, options
        self._lives: dict[str, Live] = {}
        self._submitting = threading.Lock()
        store.recover()

    def submit(self, record: Record) -> Live:
        """Put a job at the end of the queue; one that is in it already stays where it is.

        Raises:
            Refusal: if the queue is full.
        """
        with self._submitting:
            if record.id in self._lives:
                return self._lives[record.id]
            self.queue.check_room()
            live = Live(record, self)
            record.state, record.message = WAITING, ""
            self.store.save(record)
            self._lives[record.id] = live
        try:
            self.queue.submit(live)
        except Refusal as error:  # of two at once, the other one has the last place
            self.settle(live, error)
            raise
        return live

    def check_room(self, jobs: int = 1) -> None:
        """Raise Refusal if there is no place for so many more jobs."""
        self.queue.check_room(jobs)

    def live(self, id: str) -> Live | None:
        """Return the job of this id if it waits or runs."""
        return self._lives.get(id)

    def stop(self, id: str) -> bool:
        """Stop this job, waiting or running, and no other; False if it does neither."""
        live = self._lives.get(id)
        if live is None:
            return False
        self.queue.stop(live)
        return True

    def settle(self, live: Live, error: BaseException | None) -> None:
        """Write how a job ended."""
        record = live.record
        if error is None:
            record.state = DONE
        elif isinstance(error, Stopped):
            begun = record.state != WAITING
            record.message = "Continue goes on from there" if begun else "it had not begun; Continue starts it"
            record.state = STOPPED
        else:
            text = " ".join(str(error).split()) or "failed"
            record.state = FAILED
            record.message = text if isinstance(error, ValueError) else f"{text} ({type(error).__name__})"
        try:
            self.store.save(record)
        except OSError as failure:
            record.message = f"{self.store.folder}: {failure.strerror}"
        del self._lives[record.id]

    def run(self, live: Live, session: Session) -> None:
        """Transcribe, twice if dense and sparse attention are compared."""
        live.record.state = RUNNING
        self.store.save(live.record)
        settings = live.record.settings
        self._transcribe(live, session, "transcript", make_attention_config(settings, self.options))
        if transcript := self.store.read_transcript(live.record):
            write_heard(Path(live.record.audio), transcript.info.padded, self.store.heard_path(live.record))
        if settings["compare"]:
            live.begin("dense")
            dense = make_attention_config({**settings, "attention": "dense"}, self.options)
            self._transcribe(live, session, "dense", dense)

    def _transcribe(self, live: Live, session: Session, kind: str, attention: SparseAttentionConfig) -> None:
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
        session.transcribe(job, settings, Output(overwrite=True, resume=True, page_reads=reads), live)


def make_attention_config(settings: dict[str, Any], options: dict[str, Any]) -> SparseAttentionConfig:
    """Return the page's choices over those of the configuration; raise ValueError if they do not fit together."""
    chosen = {"page_size": settings["page_size"]}
    chosen["budget"] = settings["budget"] if settings["attention"] == "unique" else None
    return SparseAttentionConfig(**{**options["attention"], **chosen})
