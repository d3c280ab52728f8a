"""One job at a time, in a thread of its own: a page that is closed or reloaded does not end the work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unique_asr.app.limits import Limits, Refusal
from unique_asr.app.store import DONE, FAILED, RUNNING, STOPPED, WAITING, Record, Store

from unique_asr.application.cli import Transcriber, made_with, transcribe_one
from unique_asr.application.display import STAGES, summarize
from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioFile
from unique_asr.longform.page_reads import PageReads
from unique_asr.transcript import Segment, TranscriptionInfo, text_settings
from unique_asr.writers import WRITERS, SegmentLog


class Stopped(KeyboardInterrupt):
    """The user's Stop, raised where the work is."""


class Live:
    """A job that waits or runs: what the page shows of it. To the transcription it is the display."""

    def __init__(self, record: Record, limits: Limits) -> None:
        self.record, self.limits = record, limits
        self.segments: list[Segment] = []
        self.kind = "transcript"
        self.status = "Waiting for the job before it"
        self.stop = threading.Event()
        self.finished = threading.Event()
        self._begins: dict[str, tuple[float, float]] = {}  # of each stage: the clock, and the share that was done

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, kind: str) -> None:
        self.kind, self._begins = kind, {}

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

    def warning(self, message: str) -> None:
        pass  # all of them are in the info

    def note(self, message: str) -> None:
        pass

    def _check(self) -> None:
        if self.stop.is_set():
            raise Stopped


class Worker:
    """Takes jobs in order. `load` makes a transcriber from settings, as for the command line."""

    def __init__(
        self,
        store: Store,
        load: Callable[..., Transcriber],
        limits: Limits,
        options: dict[str, Any],
        max_waiting: int = 8,
    ) -> None:
        self.store, self.load, self.limits, self.options, self.max_waiting = store, load, limits, options, max_waiting
        self._queue: deque[Live] = deque()
        self._lives: dict[str, Live] = {}
        self._change = threading.Condition()
        self._loaded: tuple[dict[str, Any], Transcriber] | None = None
        store.recover()
        threading.Thread(target=self._work, name="transcription", daemon=True).start()

    def submit(self, record: Record) -> Live:
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
        if len(self._queue) + jobs > self.max_waiting:
            raise Refusal(f"At most {self.max_waiting} jobs may wait, and {len(self._queue)} do; try again later.")

    def live(self, id: str) -> Live | None:
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
        self._transcribe(live, "transcript", attention_settings(settings, self.options))
        if settings["compare"]:
            live.begin("dense")
            dense = attention_settings({**settings, "attention": "dense"}, self.options)
            self._transcribe(live, "dense", dense)

    def _transcribe(self, live: Live, kind: str, attention: SparseAttentionConfig) -> None:
        record, begin = live.record, time.perf_counter()
        job = self.store.job(record, kind)
        if job.path("json").exists():  # of an earlier attempt, which was stopped later
            return
        live.progress("load", 0, 1)
        source = AudioFile(job.audio, name=record.title, vad=record.settings.get("vad", False))
        told = {"prompt": record.settings["prompt"] or None}
        told |= {name: record.settings.get(name) for name in ("language", "hotwords")}
        settings = {"model": record.settings["model"], "attention": attention, **self.options["transcriber"]}
        part = {"start": 0.0, "end": None, "channel": None, "vad": source.vad}
        text = text_settings(max_pass_seconds=settings.get("max_pass_seconds"), **part, **told)
        unfinished, keep = job.unfinished(source.duration, made_with(settings, text))
        log = SegmentLog(job.partial_path("jsonl"), keep)
        transcriber = self._transcriber(settings, live)
        reads = PageReads() if record.settings.get("reads") and kind == "transcript" else None
        recording = job, source, list(WRITERS), log, False
        transcribe_one(*recording, transcriber, told, unfinished, live, begin, reads)

    def _transcriber(self, settings: dict[str, Any], live: Live) -> Transcriber:
        """One is kept: with other settings of the attention, its model is taken over."""
        if self._loaded is not None:
            made_from, transcriber = self._loaded
            if made_from == settings:
                return transcriber
            if made_from["model"] == settings["model"] and hasattr(transcriber, "with_attention"):
                transcriber = transcriber.with_attention(settings["attention"])
                self._loaded = settings, transcriber
                return transcriber
            self._loaded = None  # its memory is free before another model is loaded
            del transcriber
        self._loaded = settings, self.load(**settings, progress=live.progress)
        return self._loaded[1]


def attention_settings(settings: dict[str, Any], options: dict[str, Any]) -> SparseAttentionConfig:
    """The page's choices over those of the configuration; ValueError, in one line, if they do not fit together."""
    chosen = {"page_size": settings["page_size"]}
    chosen["budget"] = settings["budget"] if settings["attention"] == "unique" else None
    return SparseAttentionConfig(**{**options["attention"], **chosen})
