"""The passes of one recording side by side: several decoders write at once, and the text comes in its order.

Each planned pass is a section of the recording. Where a pass begins does not depend on what the one before it wrote, so
that they need not wait for each other; what a pass leaves out, further passes over its own section make up for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from unique_asr.decoding.engine import PENDING, Sequence
from unique_asr.longform.alignment import SpeechFrames
from unique_asr.longform.passes import Group, LongformReport, LongformTranscriber, Place, State, Work
from unique_asr.transcript import Word


class Section:
    """A part of the recording that one pass was planned for: the passes over it, and what they wrote so far."""

    def __init__(self, place: Place, work: Work) -> None:
        self.place, self.work = place, work
        self.sequence: Sequence | None = work.sequence  # None: it is not needed any more
        self.start = self.reached = work.tracker.frames.seconds(place.start)
        self.passes: Iterator[Group] = iter(())
        self.groups: deque[list[Word]] = deque()  # that nobody took yet
        self.announced = False  # whether `on_pass` knows that its text is next

    def advance(self) -> bool:
        """Take what the passes write, until a token is pending. Whether they are done."""
        for words in self.passes:
            if words is PENDING:
                return False
            self.groups.append(words)
        return True


class ParallelTranscriber(LongformTranscriber):
    """A `LongformTranscriber` whose `transcribe` takes several decoders, one for each pass that is to run at a time.

    It can be gone on with from the beginning of the first section whose text is not complete.
    """

    def _passes(self, work: Work, state: State | None, on_pass: Callable[[State], None] | None) -> Iterator[Group]:
        tracker = work.tracker
        planned = self._planned(tracker.frames, self._restored(state, work))
        free, running = list(work.sequence), deque[Section]()

        def begin(place: Place, stop: int) -> Section:
            def heard(stage: str, done: float, total: float) -> None:
                if stage == "decode":
                    section.reached = done
                    done = running[0].start + sum(each.reached - each.start for each in running)
                work.progress(stage, done, total)

            own = replace(
                work,
                sequence=free.pop(),
                tracker=tracker.beginning(place.start),
                report=LongformReport(),
                progress=heard if work.progress else None,
            )
            section = Section(place, own)
            section.passes = self._passes_over(own, place, stop)
            return section

        while True:
            while free and (span := next(planned, None)):
                running.append(begin(*span))
            if not running:
                return
            ended = False
            for section in running:
                if section.sequence is not None and section.advance():
                    section.sequence.reset()  # a batch would go on with a pass that was broken off
                    free.append(section.sequence)
                    section.sequence, ended = None, True
            while running:
                first = running[0]
                if on_pass and not first.announced:
                    on_pass(self._state(first.place, work))
                    first.announced = True
                while first.groups:
                    yield first.groups.popleft()
                if first.sequence is not None:
                    break
                running.popleft()
                work.report.add(first.work.report)
                tracker.follow(first.work.tracker)
            if running and not ended:
                yield PENDING

    def _planned(self, frames: SpeechFrames, place: Place) -> Iterator[tuple[Place, int]]:
        """Where each pass from a place on begins and ends."""
        while place.start < len(frames):
            stop = self._pass_end(frames, place.start, len(frames), place.limit)
            yield place, stop
            place = Place(stop, self.max_pass_seconds)
