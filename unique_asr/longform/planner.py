"""Where passes begin and end, once for all models.

A pass is at most as long as the model can hear and ends in a pause near an even share of what is left. After it, the
next one begins

- at its end, if the text came to the end of the speech;
- where the text ended, if it got at least `min_progress_seconds` far: at most four times as long as what it got over,
  so that not the whole rest is tried again and again;
- at the same place on `retry_seconds` of audio, if it got nowhere;
- after `skip_seconds`, if that got nowhere either.

Where speech is comes from `SpeechEvidence`: the spikes of a CTC head (`alignment.SpeechFrames`) or the loudness of the
samples (`speech_activity.SpeechActivity`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum, auto
from typing import Protocol

from unique_asr.longform.configuration import PlannerConfig

ROUNDING = 1e-9  # s, of sums of times that are whole frames


class SpeechEvidence(Protocol):
    """Where a recording has speech. Times are seconds from its beginning.

    Attributes:
        is_certain: whether what it takes for silence has no speech: no pass is made over it then, and a pass that goes
            on after a text begins in the pause after it.
    """

    is_certain: bool

    def next_speech(self, time: float) -> float:
        """Return when there is speech at or after a time; the recording's end if there is none."""

    def find_pause(self, start: float, end: float) -> float:
        """Return the middle of the longest or quietest pause between two times."""


class Continuation(Enum):
    """What comes after a pass that did not get to the end of its speech."""

    CONTINUED = auto()  # the next pass begins where the text ended
    RETRIED = auto()  # the next pass begins at the same place, on less audio
    SKIPPED = auto()  # the next pass begins after audio that is left out


class PassPlanner:
    """The passes over a recording, or over a section of it, one after the other.

        while span := planner.plan():
            ...                                          # a pass over the seconds span[0] .. span[1]
            planner.complete()                           # or leave_rest, continue_from, retry

    Args:
        speech: where speech is.
        max_pass_seconds: the longest pass.
        start, stop: the section, in seconds.
        limit: the longest first pass in seconds, where an earlier planner broke off; None: max_pass_seconds.
    """

    def __init__(
        self,
        speech: SpeechEvidence,
        config: PlannerConfig,
        max_pass_seconds: float,
        start: float,
        stop: float,
        limit: float | None = None,
    ) -> None:
        self.speech, self.config, self.max_pass_seconds = speech, config, max_pass_seconds
        self.start = self.end = start  # of the pass that is made, or of the next one
        self.stop = stop
        self.limit = max_pass_seconds if limit is None else limit

    @property
    def has_speech_left(self) -> bool:
        """Whether another pass is to be made."""
        return self.speech.next_speech(self.start) < self.stop

    def plan(self) -> tuple[float, float] | None:
        """Return where the next pass begins and ends, in seconds; None if no speech is left."""
        while (first := self.speech.next_speech(self.start)) < self.stop:
            self.end = self._find_end()
            if first < self.end or not self.speech.is_certain:
                return self.start, self.end
            self.start = self.end
        return None

    def split(self) -> Iterator[PassPlanner]:
        """Yield a planner for each section that one pass would get over if all went well; uses this planner up."""
        while self.start < self.stop:
            end = self._find_end()
            yield PassPlanner(self.speech, self.config, self.max_pass_seconds, self.start, end, self.limit)
            self.start, self.limit = end, self.max_pass_seconds

    def complete(self) -> None:
        """Go on after the pass: its text came to the end of its speech."""
        self.start, self.limit = self.end, self.max_pass_seconds

    def leave_rest(self) -> None:
        """Go on after the pass: its text did not end well, but there was no more speech."""
        self.start = self.end

    def continue_from(self, reached: float) -> Continuation:
        """Go on where a text ended too early, at the second `reached`; or retry or skip, if that was no progress."""
        done = reached - self.start
        if done < self.config.min_progress_seconds:
            return self.retry(self.config.retry_seconds, reached)
        self.limit = min(max(4 * done, self.config.retry_seconds), self.max_pass_seconds)
        self.start = reached
        if self.speech.is_certain:
            self.start = self.speech.find_pause(reached, self.speech.next_speech(reached))
        return Continuation.CONTINUED

    def retry(self, seconds: float, reached: float = 0.0) -> Continuation:
        """Begin at the same place with at most `seconds` of audio; or skip, if the pass was no longer than a retry."""
        if min(self.limit, self.end - self.start) > self.config.retry_seconds:
            self.limit = seconds
            return Continuation.RETRIED
        return self.skip(reached)

    def skip(self, reached: float = 0.0) -> Continuation:
        """Go on after `skip_seconds`, in a pause but not before the second `reached`; or after the pass."""
        if (seconds := self.config.skip_seconds) is None:
            self.start = self.end
        else:
            pause = self.speech.find_pause(self.start + seconds, self.start + 2 * seconds)
            self.start = min(max(pause, reached), self.stop)
        self.limit = min(self.config.retry_seconds, self.max_pass_seconds)
        return Continuation.SKIPPED

    def _find_end(self) -> float:
        """The end of a pass: in a pause near the end of an even share of what is left."""
        left = self.stop - self.start
        if left <= self.limit + ROUNDING:
            return self.stop
        share = min(1.05 * left / math.ceil(left / self.limit - ROUNDING), self.limit)
        search = min(self.config.cut_seconds, share / 6)
        return self.speech.find_pause(self.start + share - search, self.start + share)
