"""One job at a time, in a thread of its own: what the page and the server share, with one model in memory.

queue = JobQueue(Session(), max_waiting=8)
queue.submit(job)       # a QueuedJob: what is done, and what becomes of it
queue.stop(job)         # waiting or running, and no other
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from unique_asr.application.display import Display
from unique_asr.application.limits import Refusal
from unique_asr.application.session import Session

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """Somebody's Stop, raised where the work is; what was decoded is kept as after an interrupt."""


class QueueFull(Refusal):
    """More jobs than may wait."""


class QueuedJob(Display):
    """A job that waits or runs; a subclass says what is done, and shows how far it is.

    Attributes:
        stop: is set to end the job where it is: `check_stop` then raises.
        finished: is set when nothing more happens to it.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.finished = threading.Event()

    def run(self, session: Session) -> None:
        """Do the work, in the thread of the queue."""
        raise NotImplementedError

    def settle(self, error: BaseException | None) -> None:
        """Note how the job ended: None for well, `Stopped`, or what went wrong. A job may end without having run."""

    def check_stop(self) -> None:
        """Raise Stopped if the job is to end."""
        if self.stop.is_set():
            raise Stopped


class JobQueue:
    """Runs jobs in the order in which they come.

    Args:
        session: transcribes; from now on only in the thread of this queue.
        max_waiting: jobs that may wait, beside the one that is worked on.
    """

    def __init__(self, session: Session, max_waiting: int = 8) -> None:
        self.session, self.max_waiting = session, max_waiting
        self.running: QueuedJob | None = None
        self.closed = False
        self._waiting: deque[QueuedJob] = deque()
        self._change = threading.Condition()  # its lock may be taken twice
        self._thread = threading.Thread(target=self._work, name="transcription", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait for another one: the first of an idle queue does not."""
        return max(len(self._waiting) - (self.running is None), 0)

    def check_room(self, jobs: int = 1) -> None:
        """Raise QueueFull if there is no place for so many more jobs."""
        with self._change:
            if len(self._waiting) + (self.running is not None) + jobs > self.max_waiting + 1:
                raise QueueFull(f"At most {self.max_waiting} jobs may wait, and {self.waiting} do; try again later.")

    def submit(self, job: QueuedJob) -> None:
        """Put a job at the end; after `close` it ends at once, as if stopped. Raises QueueFull if it has no place."""
        with self._change:
            if not self.closed:
                self.check_room()
                self._waiting.append(job)
                self._change.notify_all()
                return
        self._end(job, Stopped())

    def stop(self, job: QueuedJob) -> None:
        """Stop a job: at once if it waits, else where it is. One that has ended stays as it is."""
        job.stop.set()
        with self._change:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            self._end(job, Stopped())

    def close(self, seconds: float = 0.0) -> None:
        """Take no more jobs, stop those that wait, and the running one if it does not end within so many seconds.

        Returns at once if nothing runs, else when the running job has ended.
        """
        with self._change:
            self.closed = True
            waiting, running = list(self._waiting), self.running
            self._change.notify_all()
        for job in waiting:
            self.stop(job)
        if running is not None and not running.finished.wait(seconds):
            self.stop(running)
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self.closed:
                    self._change.wait()
                if self.closed:  # close stops those that wait
                    return
                self.running = job = self._waiting.popleft()
            error = None
            try:
                job.check_stop()
                job.run(self.session)
            except BaseException as raised:  # whatever a model does, the next job is for this thread
                error = raised
            self._end(job, error)
            with self._change:
                self.running = None

    def _end(self, job: QueuedJob, error: BaseException | None) -> None:
        try:
            job.settle(error)
        except Exception:
            log.exception("a job could not be settled")
        job.finished.set()
