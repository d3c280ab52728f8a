"""A request's place in the queue: its recording in a folder of its own, which is gone when the job has ended."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from unique_asr.application.jobs import Job
from unique_asr.application.limits import RecordingLimits
from unique_asr.application.queue import JobQueue, QueuedJob, Stopped
from unique_asr.application.session import Output, Session, TranscriptionSettings
from unique_asr.server.errors import describe_failure
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo

log = logging.getLogger("unique_asr.server")
LOOK_SECONDS = 0.5  # between two looks whether the client is still there


class RequestJob(QueuedJob):
    """The transcription of one upload; made in the event loop of the server, which follows it.

    Args:
        recording: the only file in its folder.
        name: what messages call it.

    Attributes:
        segments: as they come.
        info: how they were made, once it has ended well.
        error: why it has not.
    """

    def __init__(self, recording: Path, name: str, settings: TranscriptionSettings, limits: RecordingLimits) -> None:
        super().__init__()
        self.folder = recording.parent
        self.settings, self.limits = settings, limits
        self.segments: list[Segment] = []
        self.info: TranscriptionInfo | None = None
        self.error: BaseException | None = None
        self.created, self.begun, self.ended = time.monotonic(), None, None
        self._job = Job(recording, self.folder / "transcript", name)
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()

    @property
    def transcript(self) -> Transcript:
        """The transcript, once the job has ended well."""
        return Transcript(self.segments, self.info)

    # In the thread of the queue

    def run(self, session: Session) -> None:
        self.begun = time.monotonic()
        self.info = session.transcribe(self._job, self.settings, Output(["json"], overwrite=True), self)

    def settle(self, error: BaseException | None) -> None:
        self.error, self.ended = error, time.monotonic()
        if error is not None and not isinstance(error, (ValueError, Stopped)):
            log.error("a transcription failed", exc_info=error)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.finished.set()
        self._tell()

    def progress(self, stage: str, done: float, total: float) -> None:
        self.check_stop()
        if stage == "encode":
            self.limits.check_duration(done)  # containers do not always tell how long they are

    def segment(self, segment: Segment, recording: str) -> None:
        self.check_stop()
        self.segments.append(segment)
        self._tell()

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._news.set)

    # In the event loop

    async def follow(self, queue: JobQueue, request: Request) -> AsyncIterator[Segment | None]:
        """Yield segments as they come, None now and then, until the job has ended; stop it if this is left before.

        Raises:
            ClientDisconnect: if the client has gone.
            RequestError: if the job did not end well.
        """
        sent = 0
        try:
            while True:
                finished = self.finished.is_set()  # first: then no segment comes after the last look
                while sent < len(self.segments):
                    sent += 1
                    yield self.segments[sent - 1]
                if finished:
                    break
                if await request.is_disconnected():
                    raise ClientDisconnect
                try:
                    await asyncio.wait_for(self._news.wait(), LOOK_SECONDS)
                except TimeoutError:
                    yield None
                self._news.clear()
        finally:
            queue.stop(self)
        if self.error is not None:
            raise describe_failure(self.error) from self.error
