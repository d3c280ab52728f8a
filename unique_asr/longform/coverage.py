"""How a transcription goes: how much of the speech is in segments, what was skipped, and why passes were broken off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from unique_asr.longform.alignment import SpeechFrames

BREAKS = {  # stop reason of a pass -> what a warning says
    "end": "the text ended before the speech",
    "length": "the token budget ran out",
    "loop": "the text began to repeat itself",
    "gap": "the text left out speech",
    "lost": "the text was not what was said",
}


@dataclass
class LongformReport:
    """How a transcription went; complete once its segments are exhausted."""

    stop_reason: str = ""  # of the last pass; see `unique_asr.transcript.STOP_REASONS`
    passes: int = 0
    broken: int = 0  # passes that did not get to their end: the next one went on from where they came to, or went back
    longest: int = 0  # positions of the longest pass, prompt and text
    coverage: float = 0.0  # share of the recording's spikes that lie in a segment so far
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0, "align": 0.0})
    skipped: list[tuple[float, float]] = field(default_factory=list)  # seconds that no pass got over
    segments: int = 0
    covered: int = 0  # spikes in a segment
    counted: int = 0  # frames: the spikes before this one are counted

    def add_segment(self, frames: SpeechFrames, start: float, end: float) -> None:
        """Count a segment, and the speech in it: from `start` to `end`, in seconds."""
        low, high = (round(time / frames.frame_seconds) for time in (start, end))
        self.covered += frames.count(max(low, self.counted), high + 1)
        self.counted = max(high + 1, self.counted)
        self.coverage = self.covered / len(frames.spikes)
        self.segments += 1

    def add_skipped(self, start: float, end: float) -> None:
        """Note seconds that no pass got over, together with those just before them."""
        if self.skipped and self.skipped[-1][1] == start:
            start = self.skipped.pop()[0]
        self.skipped.append((start, end))

    def merge(self, later: LongformReport) -> None:
        """Add the report of the next section of the recording."""
        self.stop_reason = later.stop_reason or self.stop_reason
        self.passes += later.passes
        self.broken += later.broken
        self.longest = max(self.longest, later.longest)
        self.warnings += later.warnings
        for start, end in later.skipped:
            self.add_skipped(start, end)
        for stage, seconds in later.timings.items():
            self.timings[stage] += seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage of the timings."""
        begin = time.perf_counter()
        yield
        self.timings[stage] += time.perf_counter() - begin


def format_clock(seconds: float) -> str:
    """Write a time as 1:05 or 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
