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
from unique_asr.remote import expand_home
from unique_asr.transcript import Segment, Transcript
from unique_asr.writers import WRITERS, SegmentLog, read_transcript

NAME_BYTES = 150  # with their extensions, names are shorter than the 255 bytes that file systems take
ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"


@dataclass
class Record:
    """One job, as job.json holds it."""

    id: str
    title: str  # the recording's own name, for people
    audio: str  # the file that is read
    settings: dict[str, Any] = field(default_factory=dict)
    state: str = WAITING
    message: str = ""  # one line: why it stopped or failed, or the summary of what was done
    created: float = 0.0  # s since 1970
    name: str = ""  # of its files, without extension; "": transcript, as older versions called all
    browser: str = ""  # whose job it is; "": nobody's in particular


def name_files(title: str) -> str:
    """Return what the transcripts of a recording are called: its name without extension, safe on every file system."""
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", title)
    name = "".join("_" if not each.isprintable() or each in '/\\:*?"<>|' else each for each in stem)
    name = name.encode(errors="replace")[:NAME_BYTES].decode(errors="ignore").strip(". ")
    return name or "recording"


class Store:
    """The folder of all jobs, made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = expand_home(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def create(self, recording: Path, title: str, settings: dict[str, Any], copy: bool, browser: str = "") -> Record:
        """Make a new job.

        Args:
            title: what the recording is called, for people; its files are named after it.
            copy: keep a copy of the recording in the job's folder, under a name of our own.
            browser: whose job it is.

        Raises:
            OSError: if it cannot be kept there.
        """
        id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = self.folder / id
        try:
            folder.mkdir()
            if copy:
                suffix = recording.suffix.lower()
                kept = folder / f"recording{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"
                shutil.copyfile(recording, kept)
                recording = kept
            name = name_files(title)
            record = Record(id, title, str(recording), settings, created=time.time(), name=name, browser=browser)
            self.save(record)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return record

    def discard(self, record: Record) -> None:
        """Remove a job that was not begun, with its copy of the recording."""
        shutil.rmtree(self.folder / record.id, ignore_errors=True)

    def save(self, record: Record) -> None:
        """Write job.json; the old one stays whole until the new one is."""
        path = self.folder / record.id / "job.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(record), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def load(self, id: str | None) -> Record | None:
        """Return the job of an id, None if there is none.

        An id comes from the browser, and never reaches a path unchecked.
        """
        if not isinstance(id, str) or not ID.fullmatch(id):
            return None
        try:
            return Record(**json.loads((self.folder / id / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def list(self) -> list[Record]:
        """Return all jobs, the newest first."""
        names = sorted((path.name for path in self.folder.iterdir() if ID.fullmatch(path.name)), reverse=True)
        return [record for record in map(self.load, names) if record is not None]

    def locate(self, record: Record, kind: str = "transcript") -> Job:
        """Return where the transcripts go; the dense one of a comparison is of the kind "dense"."""
        folder = self.folder / record.id
        if not record.name:
            return Job(Path(record.audio), folder / kind, record.title)
        # A folder of their own: whatever the recording is called, they replace neither it nor job.json.
        name = record.name if kind == "transcript" else f"{record.name}.{kind}"
        return Job(Path(record.audio), folder / "files" / name, record.title)

    def read_transcript(self, record: Record, kind: str = "transcript") -> Transcript | None:
        """Return the whole transcript, or the part that there is of it; None if there is nothing."""
        job = self.locate(record, kind)
        for path in (job.path("json"), job.partial_path("json")):
            if path.exists():
                return read_transcript(path)
        return None

    def read_segments(self, record: Record) -> list[Segment]:
        """Return the segments of the transcript, or those of the log that a crash left."""
        if (transcript := self.read_transcript(record)) is not None:
            return transcript.segments
        log = self.locate(record).partial_path("jsonl")
        return SegmentLog.read(log) if log.exists() else []

    def find_files(self, record: Record) -> list[Path]:
        """Return the files to download: whole transcripts, else those that were broken off, and the plot."""
        found = []
        for kind in ("transcript", "dense"):
            job = self.locate(record, kind)
            whole = [job.path(extension) for extension in WRITERS if job.path(extension).exists()]
            partial = [job.partial_path(extension) for extension in WRITERS if job.partial_path(extension).exists()]
            found += whole or partial
        return found + [plot for plot in (self.plot_path(record),) if plot.exists()]

    def heard_path(self, record: Record) -> Path:
        """Return where the sound is that the model heard, if it is not what the recording would play."""
        return self.locate(record).path("heard.flac")

    def find_audio(self, record: Record) -> Path | None:
        """Return what the player plays, in step with the transcript; None if the recording is gone."""
        found = [path for path in (self.heard_path(record), Path(record.audio)) if path.is_file()]
        return found[0] if found else None

    def plot_path(self, record: Record) -> Path:
        """Return where the plot of the pages that were read is, if it was asked for."""
        return self.locate(record).path("reads.svg")

    def recover(self) -> None:
        """Mark jobs that ran when the server ended as stopped, so that they can be continued."""
        for record in self.list():
            if record.state in (WAITING, RUNNING):
                record.state, record.message = STOPPED, "the server was restarted; Continue goes on from there"
                self.save(record)
