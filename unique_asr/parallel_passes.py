"""The passes of one recording side by side: several decoders write at once, and the text comes in its order.

Each planned pass is a section of the recording. Where a pass begins does not depend on what the one before it wrote, so
that they need not wait for each other; what a pass leaves out, further passes over its own section make up for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .alignment import SpeechFrames
from .longform import Decoder, LongformReport, LongformTranscriber, Place, Progress, State
from .tracking import TextTracker
from .transcript import Word


class Section:
    """A part of the recording that one pass was planned for: the passes over it, and what they wrote so far."""

    def __init__(self, place: Place, decoder: Decoder, tracker: TextTracker) -> None:
        self.place, self.tracker = place, tracker
        self.decoder: Decoder | None = decoder  # None: it is not needed any more
        self.start = self.reached = tracker.frames.seconds(place.start)
        self.report = LongformReport()
        self.passes: Iterator[list[Word]] = iter(())
        self.groups: deque[list[Word]] = deque()  # that nobody took yet
        self.announced = False  # whether `on_pass` knows that its text is next

    def advance(self) -> bool:
        """Take what the passes write, until a token is pending. Whether they are done."""
        for words in self.passes:
            if not words:
                return False
            self.groups.append(words)
        return True


class ParallelTranscriber(LongformTranscriber):
    """A `LongformTranscriber` whose `transcribe` takes several decoders, one for each pass that is to run at a time.

    It can be gone on with from the beginning of the first section whose text is not complete.
    """

    def _passes(  # type: ignore[override]
        self,
        encoded: Any,
        decoder: Sequence[Decoder],
        tracker: TextTracker,
        report: LongformReport,
        progress: Progress | None,
        state: State | None,
        on_pass: Callable[[State], None] | None,
    ) -> Iterator[list[Word]]:
        frames = tracker.frames
        planned = self._planned(frames, self._restored(state, tracker, report))
        free, running = list(decoder), deque[Section]()

        def begin(place: Place, stop: int) -> Section:
            section = Section(place, free.pop(), tracker.beginning(place.start))

            def heard(stage: str, done: float, total: float) -> None:
                if stage == "decode":
                    section.reached = done
                    done = running[0].start + sum(each.reached - each.start for each in running)
                progress(stage, done, total)

            made = section.decoder, section.tracker, section.report, heard if progress else None
            section.passes = self._passes_over(encoded, *made, place, stop)
            return section

        while True:
            while free and (span := next(planned, None)):
                running.append(begin(*span))
            if not running:
                return
            ended = False
            for section in running:
                if section.decoder is not None and section.advance():
                    section.decoder.reset()  # a batch would go on with a pass that was broken off
                    free.append(section.decoder)
                    section.decoder, ended = None, True
            while running:
                first = running[0]
                if on_pass and not first.announced:
                    on_pass(self._state(first.place, tracker, report))
                    first.announced = True
                while first.groups:
                    yield first.groups.popleft()
                if first.decoder is not None:
                    break
                running.popleft()
                report.add(first.report)
                tracker.follow(first.tracker)
            if running and not ended:
                yield []

    def _planned(self, frames: SpeechFrames, place: Place) -> Iterator[tuple[Place, int]]:
        """Where each pass from a place on begins and ends."""
        while place.start < len(frames):
            stop = self._pass_end(frames, place.start, len(frames), place.limit)
            yield place, stop
            place = Place(stop, self.max_pass_seconds)
