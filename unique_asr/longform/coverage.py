"""How a transcription goes: how much of the speech is in segments, what was skipped, and why passes were broken off."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from unique_asr.longform.alignment import SpeechFrames
from unique_asr.transcript import Word

BREAKS = {  # stop reason of a pass -> what a warning says
    "end": "the text ended before the speech",
    "length": "the token budget ran out",
    "loop": "the text began to repeat itself",
    "gap": "the text left out speech",
    "lost": "the text was not what was said",
}

MIN_CONFIDENCE = 0.6  # mean of the words of a stretch; English has 0.7 with noise at 5 dB, other languages 0.3 to 0.55
STRETCH_WORDS = 20  # words whose confidence is judged together, at least,
FEWEST_WORDS = 3  # but for a recording with fewer; below these nothing is judged
SHOWN_STRETCHES = 3  # in a warning


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
    # Stretches of low confidence: start and end in seconds, how many words, and the sum of their confidences.
    unsure: list[tuple[float, float, int, float]] = field(default_factory=list)
    stretch: tuple[float, float, int, float] | None = None  # that is not judged yet
    stretches: int = 0  # that were judged
    was_unsure: bool = False  # the last one of them

    def add_segment(self, frames: SpeechFrames, start: float, end: float) -> None:
        """Count a segment, and the speech in it: from `start` to `end`, in seconds."""
        low, high = (round(time / frames.frame_seconds) for time in (start, end))
        self.covered += frames.count(max(low, self.counted), high + 1)
        self.counted = max(high + 1, self.counted)
        self.coverage = self.covered / len(frames.spikes)
        self.segments += 1

    def add_confidence(self, words: list[Word]) -> None:
        """Count how sure the words of a segment are."""
        start, _, count, total = self.stretch or (words[0].start, 0.0, 0, 0.0)
        total += sum(word.confidence or 0.0 for word in words)
        self.stretch = start, words[-1].end, count + len(words), total
        if self.stretch[2] >= STRETCH_WORDS:
            self.close_stretch()

    def close_stretch(self) -> None:
        """Judge the open stretch; one that is short alone, or together with an unsure one before it."""
        if self.stretch is None:
            return
        start, end, count, total = self.stretch
        self.stretch = None
        enough = count >= STRETCH_WORDS or self.was_unsure or (self.stretches == 0 and count >= FEWEST_WORDS)
        unsure = enough and total < MIN_CONFIDENCE * count
        if unsure and self.was_unsure:
            start, _, before, sum_before = self.unsure.pop()
            count, total = count + before, total + sum_before
        if unsure:
            self.unsure.append((start, end, count, total))
        self.was_unsure, self.stretches = unsure, self.stretches + 1

    def describe_unsure(self, offset: float, languages: Sequence[str]) -> str | None:
        """Return one line about the stretches of low confidence; None if there are none.

        Args:
            offset: the second of the file at which the recording begins.
            languages: names of those that the model knows; none if that is not known.
        """
        if not self.unsure:
            return None
        clocks = [[format_clock(time + offset) for time in stretch[:2]] for stretch in self.unsure]
        places = ", ".join("-".join(clock) for clock in clocks[:SHOWN_STRETCHES])
        if len(clocks) > SHOWN_STRETCHES:
            places += f" and {len(clocks) - SHOWN_STRETCHES} more"
        confidence = sum(stretch[3] for stretch in self.unsure) / sum(stretch[2] for stretch in self.unsure)
        knows = f"; the model knows {' and '.join(languages)} only" if languages else ""
        return f"{places}: low confidence ({100 * confidence:.0f} %), the text may not be what was said{knows}"

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
