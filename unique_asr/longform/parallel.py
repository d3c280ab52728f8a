"""The passes of one recording side by side: several sequences are written at once, and the text comes in its order.

Each planned pass is a section of the recording. Where a pass begins does not depend on what the one before it wrote, so
that they need not wait for each other; what a pass leaves out, further passes over its own section make up for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from unique_asr.decoding.engine import PENDING, Sequence
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.passes import Group, PassContext, PassRunner, State
from unique_asr.longform.planner import PassPlanner
from unique_asr.transcript import Word


class Section:
    """A part of the recording that one pass was planned for: the passes over it, and what they wrote so far."""

    def __init__(self, context: PassContext, start: int, limit: float) -> None:
        self.context, self.first_frame, self.limit = context, start, limit
        self.sequence: Sequence | None = context.sequence  # None: it is not needed any more
        self.start = self.reached = context.tracker.frames.seconds(start)
        self.passes: Iterator[Group] = iter(())
        self.groups: deque[list[Word]] = deque()  # that nobody took yet
        self.announced = False  # whether `on_pass` knows that its text is next

    def advance(self) -> bool:
        """Take what the passes write, until a token is pending; return whether they are done."""
        for words in self.passes:
            if words is PENDING:
                return False
            self.groups.append(words)
        return True


class ParallelPassRunner(PassRunner):
    """A `PassRunner` whose `run` takes several sequences of an engine, one for each pass that is to run at a time.

    It can be gone on with from the beginning of the first section whose text is not complete.
    """

    def _run_passes(
        self, context: PassContext, state: State | None, on_pass: Callable[[State], None] | None
    ) -> Iterator[Group]:
        tracker = context.tracker
        planned = self._restore(state, context).split()
        free, running = list(context.sequence), deque[Section]()

        def begin(planner: PassPlanner) -> Section:
            start = tracker.frames.frame_at(planner.start)

            def report_progress(stage: str, done: float, total: float) -> None:
                if stage == "decode":
                    section.reached = done
                    done = running[0].start + sum(each.reached - each.start for each in running)
                context.progress(stage, done, total)

            own = replace(
                context,
                sequence=free.pop(),
                tracker=tracker.branch(start),
                report=LongformReport(),
                progress=report_progress if context.progress else None,
            )
            section = Section(own, start, planner.limit)
            section.passes = self._run_section(own, planner)
            return section

        while True:
            while free and (planner := next(planned, None)):
                running.append(begin(planner))
            if not running:
                return
            ended = False
            for section in running:
                if section.sequence is not None and section.advance():
                    section.sequence.reset()  # an engine would go on with a pass that was broken off
                    free.append(section.sequence)
                    section.sequence, ended = None, True
            while running:
                first = running[0]
                if on_pass and not first.announced:
                    on_pass(self._make_state(context, first.first_frame, first.limit))
                    first.announced = True
                while first.groups:
                    yield first.groups.popleft()
                if first.sequence is not None:
                    break
                running.popleft()
                context.report.merge(first.context.report)
                tracker.continue_from(first.context.tracker)
            if running and not ended:
                yield PENDING
