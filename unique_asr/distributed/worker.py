"""A worker: one transcriber in a process of its own, which writes the files of its recordings itself."""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unique_asr.application.display import Display
from unique_asr.application.jobs import Job
from unique_asr.application.session import Output, Session, TranscriptionSettings
from unique_asr.distributed.ledger import Ledger, RecordingDisplay, RecordingLog
from unique_asr.remote import FetchLimits

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber

ATTEMPTS = 3  # at a recording whose worker dies
MARKER_SECONDS = 10.0  # until a file that one machine made is seen by another one


class ArchiveWorker:
    """Transcribes jobs with one session; called with rows, as Ray Data calls the class given to `map_batches`.

    Jobs of a worker that died come again. They then go one by one, so that the one that kills its worker is found; it
    is given up after ATTEMPTS.

    Args:
        ledger: that all workers share.
        settings, output, load, batch, limits: of the session.
        folder: the current one of whoever started the work: models may be named relative to it.
        marker: a file that is there while the work goes on, in the folder that all machines are to share.
        debug: raise what goes wrong with a recording.

    Attributes:
        fatal: why no recording can be transcribed, or an empty string.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: TranscriptionSettings,
        output: Output,
        load: Callable[..., Transcriber],
        batch: int,
        limits: FetchLimits,
        folder: Path,
        marker: Path | None = None,
        debug: bool = False,
    ) -> None:
        self.ledger, self.settings, self.output, self.debug = ledger, settings, output, debug
        self.fatal = ""
        self._load = load
        self._session = Session(self._load_once, batch, limits)
        if folder.is_dir():
            os.chdir(folder)
        if marker is not None and not wait_for(marker):
            self.fatal = (
                f"output.dir={marker.parent}: is another folder on the machine {platform.node()}; "
                "give one that all machines share"
            )

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Transcribe jobs, as many side by side as the session's batch.

        Args:
            rows: `number` of each job, and `job`, pickled.

        Returns:
            `number`; `log`, a pickled RecordingLog; and `fatal`, why no job at all can be done, or an empty string.
        """
        jobs = {int(number): pickle.loads(job) for number, job in zip(rows["number"], rows["job"], strict=True)}
        logs: dict[int, RecordingLog] = {}
        begun = {}
        for number, (count, log) in zip(jobs, self.ledger.look_up(list(jobs)), strict=True):
            if log is not None:
                logs[number] = log
            elif count >= ATTEMPTS:
                logs[number] = give_up(jobs[number])
            else:
                begun[number] = count
        size = 1 if any(begun.values()) else self._session.batch
        waiting = list(begun)
        for first in range(0, len(waiting), size):
            if not self.fatal:
                logs |= self._transcribe({number: jobs[number] for number in waiting[first : first + size]})
        return {
            "number": list(jobs),
            "log": [pickle.dumps(logs.get(number)) for number in jobs],
            "fatal": [self.fatal] * len(jobs),
        }

    def _transcribe(self, jobs: Mapping[int, Job]) -> dict[int, RecordingLog]:
        """Transcribe jobs side by side."""
        numbers = {job.name: number for number, job in jobs.items()}
        displays = {name: RecordingDisplay(partial(self.ledger.end, number)) for name, number in numbers.items()}
        self.ledger.begin(list(jobs))
        display = (
            DisplayChooser(displays) if len(jobs) > 1 or self._session.batch > 1 else next(iter(displays.values()))
        )
        self._session.transcribe_all(list(jobs.values()), self.settings, self.output, display, self.debug)
        return {number: displays[name].log for name, number in numbers.items()}

    def _load_once(self, **arguments: Any) -> Transcriber:
        try:
            return self._load(**arguments)
        except Exception as error:  # it would fail for the next recording too
            self.fatal = " ".join(str(error).split()) or type(error).__name__
            raise


class DisplayChooser(Display):
    """Has a display for each of several recordings; what is about all of them is not shown."""

    def __init__(self, displays: Mapping[str, Display]) -> None:
        self._displays = displays

    def for_recording(self, name: str) -> Display:
        return self._displays[name]


def give_up(job: Job) -> RecordingLog:
    """Return the log of a job whose workers died."""
    log = RecordingLog(failed=True)
    message = f"{job.name}: its worker died {ATTEMPTS} times, for lack of memory perhaps; fewer ray.workers need less"
    log.told.append(("error", (message, job.name)))
    return log


def wait_for(path: Path) -> bool:
    """Return whether a file is there; a network share may take a while to show it."""
    end = time.monotonic() + MARKER_SECONDS
    while True:
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
