"""Jobs on disk: one folder each, with the recording, the transcripts and job.json. They outlive page and server."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unique_asr.application.jobs import Job
from unique_asr.transcript import Segment, Transcript
from unique_asr.writers import WRITERS, SegmentLog, read_transcript

ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"


@dataclass
class Record:
    """What job.json holds."""

    id: str
    title: str  # the recording's own name, for people only
    audio: str  # the file that is read
    settings: dict[str, Any] = field(default_factory=dict)
    state: str = WAITING
    message: str = ""  # one line: why it stopped or failed, or the summary of what was done
    created: float = 0.0  # s since 1970


class Store:
    """The folder of all jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def create(self, recording: Path, title: str, settings: dict[str, Any], copy: bool) -> Record:
        """A new job; `copy` keeps a copy of the recording, under a name of our own."""
        id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = self.folder / id
        folder.mkdir()
        if copy:
            suffix = recording.suffix.lower()
            kept = folder / f"recording{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"
            shutil.copyfile(recording, kept)
            recording = kept
        record = Record(id, title, str(recording), settings, created=time.time())
        self.save(record)
        return record

    def save(self, record: Record) -> None:
        path = self.folder / record.id / "job.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(record), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def load(self, id: str | None) -> Record | None:
        """None for what is not the id of a job: an id comes from the browser and never reaches a path unchecked."""
        if not isinstance(id, str) or not ID.fullmatch(id):
            return None
        try:
            return Record(**json.loads((self.folder / id / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def list(self) -> list[Record]:
        """The newest first."""
        names = sorted((path.name for path in self.folder.iterdir() if ID.fullmatch(path.name)), reverse=True)
        return [record for record in map(self.load, names) if record is not None]

    def job(self, record: Record, kind: str = "transcript") -> Job:
        """Where the transcripts go; the dense one of a comparison is of the kind "dense"."""
        return Job(Path(record.audio), self.folder / record.id / kind, record.title)

    def transcript(self, record: Record, kind: str = "transcript") -> Transcript | None:
        """The whole transcript, or the part that there is of it."""
        job = self.job(record, kind)
        for path in (job.path("json"), job.partial_path("json")):
            if path.exists():
                return read_transcript(path)
        return None

    def segments(self, record: Record) -> list[Segment]:
        """As `transcript`, or from the log that a crash left."""
        if (transcript := self.transcript(record)) is not None:
            return transcript.segments
        log = self.job(record).partial_path("jsonl")
        return SegmentLog.read(log) if log.exists() else []

    def files(self, record: Record) -> list[Path]:
        """Transcripts to download: whole ones, else those that were broken off."""
        found = []
        for kind in ("transcript", "dense"):
            job = self.job(record, kind)
            whole = [job.path(extension) for extension in WRITERS if job.path(extension).exists()]
            partial = [job.partial_path(extension) for extension in WRITERS if job.partial_path(extension).exists()]
            found += whole or partial
        return found + [plot for plot in (self.plot(record),) if plot.exists()]

    def plot(self, record: Record) -> Path:
        """Where the picture of what was read is, if it was asked for."""
        return self.job(record).path("reads.svg")

    def recover(self) -> None:
        """After a restart nothing is running: what was can be continued."""
        for record in self.list():
            if record.state in (WAITING, RUNNING):
                record.state, record.message = STOPPED, "the server was restarted; Continue goes on from there"
                self.save(record)
