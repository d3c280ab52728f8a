"""The queue that the page and the server share: one job at a time, in order; Stop acts at once."""

import threading

import pytest

from unique_asr.application.limits import Refusal
from unique_asr.application.queue import JobQueue, QueuedJob, QueueFull, Stopped
from unique_asr.application.session import Session

SECONDS = 20.0


class Recorded(QueuedJob):
    """Runs until its gate opens; notes what happens in a list that it shares with others."""

    def __init__(self, name, events, error=None, is_open=True):
        super().__init__()
        self.name, self.events, self.error = name, events, error
        self.begun, self.gate = threading.Event(), threading.Event()
        if is_open:
            self.gate.set()

    def run(self, session):
        self.events.append(f"{self.name} runs")
        self.begun.set()
        while not self.gate.wait(0.01):
            self.check_stop()
        if self.error is not None:
            raise self.error

    def settle(self, error):
        self.events.append((self.name, type(error)))


@pytest.fixture
def queue():
    queue = JobQueue(Session(), max_waiting=2)
    yield queue
    queue.close()


def test_jobs_run_one_after_the_other_whatever_becomes_of_them(queue):
    events = []
    first = Recorded("a", events, is_open=False)
    others = [Recorded("b", events, SystemExit(3)), Recorded("c", events)]
    queue.submit(first)
    assert first.begun.wait(SECONDS)
    for job in others:
        queue.submit(job)
    assert (queue.running, queue.waiting) == (first, 2)
    first.gate.set()
    assert others[1].finished.wait(SECONDS)
    kinds = [("a", type(None)), ("b", SystemExit), ("c", type(None))]
    assert events == [event for kind in kinds for event in (f"{kind[0]} runs", kind)]


def test_stop_acts_at_once_on_a_job_that_waits_and_on_no_other(queue):
    events = []
    first, second = Recorded("a", events, is_open=False), Recorded("b", events)
    queue.submit(first)
    assert first.begun.wait(SECONDS)
    queue.submit(second)
    queue.stop(second)
    assert second.finished.is_set()
    assert events == ["a runs", ("b", Stopped)]
    assert not first.finished.is_set()
    queue.stop(first)
    assert first.finished.wait(SECONDS)
    queue.stop(first)  # has ended: nothing happens
    assert events[-1] == ("a", Stopped)
    assert queue.waiting == 0


def test_no_more_than_may_wait(queue):
    queue.check_room(3)  # one is worked on at once
    with pytest.raises(QueueFull, match="At most 2 jobs may wait, and 0 do") as error:
        queue.check_room(4)
    assert isinstance(error.value, Refusal)
    jobs = [Recorded("a", [], is_open=False) for _ in range(4)]
    for job in jobs[:3]:
        queue.submit(job)
    with pytest.raises(QueueFull, match="At most 2 jobs may wait, and 2 do"):
        queue.submit(jobs[3])
    assert queue.waiting == 2
    queue.stop(jobs[2])
    queue.submit(jobs[3])


@pytest.mark.parametrize("seconds", [0.0, SECONDS])
def test_close_finishes_or_stops_what_runs(seconds):
    queue, events = JobQueue(Session()), []
    first, second = Recorded("a", events, is_open=False), Recorded("b", events)
    queue.submit(first)
    assert first.begun.wait(SECONDS)
    queue.submit(second)
    closing = threading.Thread(target=queue.close, args=(seconds,))
    closing.start()
    assert second.finished.wait(SECONDS)
    if seconds:
        first.gate.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert events == ["a runs", ("b", Stopped), ("a", type(None) if seconds else Stopped)]
    late = Recorded("c", events)
    queue.submit(late)
    assert late.finished.is_set()
    assert events[-1] == ("c", Stopped)


def test_a_job_that_cannot_be_settled_does_not_end_the_queue(queue, caplog):
    class Broken(Recorded):
        def settle(self, error):
            raise OSError("disk full")

    broken, second = Broken("a", []), Recorded("b", [])
    queue.submit(broken)
    queue.submit(second)
    assert second.finished.wait(SECONDS)
    assert broken.finished.is_set()
    assert "disk full" in caplog.text
