"""Sliding chunks: short windows transcribed one by one, stitched where their words lie in time.

The usual way to transcribe long recordings with a short model, as in transformers' chunked ASR pipeline: neighbouring
windows overlap, and each keeps the words of its middle, where it has heard what comes before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from unique_asr.decoding.engine import PENDING, Pending
from unique_asr.longform.coverage import LongformReport
from unique_asr.transcript import Segment


@dataclass(frozen=True)
class Sliding:
    """Windows of `seconds`, each of which keeps the words in the middle, `overlap` seconds from either end."""

    seconds: float = 30.0
    overlap: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.overlap < self.seconds:
            raise ValueError(f"rivals.sliding: an overlap of {self.overlap} s at both ends fills {self.seconds} s")

    def transcribe(
        self,
        transcribe: Callable[[Any, LongformReport], Iterator[Segment | Pending]],
        encoded: Any,
        report: LongformReport,
    ) -> Iterator[Segment | Pending]:
        """Yield the segments of the whole recording, and PENDING where the next token is.

        Args:
            transcribe: gives the segments of a window of the encoded recording, and fills in its report.
            encoded: an `EncodedAudio`.
            report: summed over the windows.
        """
        step = self.seconds - 2 * self.overlap
        covered, start, index = 0.0, 0.0, 0
        while start < encoded.duration or index == 0:
            # The first window begins with its middle, and the last one keeps everything to the end.
            begin = max(0.0, start - self.overlap)
            last = begin + self.seconds >= encoded.duration
            end = encoded.duration if last else begin + self.seconds
            middle = start, encoded.duration + 1 if last else end - self.overlap
            first_frame = round(begin / encoded.frame_seconds)
            part = encoded.slice(first_frame, None if last else round(end / encoded.frame_seconds))
            inner = LongformReport()
            for segment in transcribe(part, inner):
                if segment is PENDING:
                    yield PENDING
                    continue
                segment = shifted(segment, first_frame * encoded.frame_seconds)
                words = [word for word in segment.words if middle[0] <= (word.start + word.end) / 2 < middle[1]]
                if words:
                    text = " ".join(word.text for word in words)
                    yield Segment(index, words[0].start, words[-1].end, text, words, segment.confidence)
                    index += 1
            covered += inner.coverage * (min(middle[1], encoded.duration) - start)
            report.passes += inner.passes
            report.stop_reason = inner.stop_reason
            report.warnings += inner.warnings
            for stage, seconds in inner.timings.items():
                report.timings[stage] += seconds
            if last:
                break
            start = middle[1] if step > 0 else end
        report.coverage = covered / max(encoded.duration, 1e-9)


def shifted(segment: Segment, seconds: float) -> Segment:
    words = [replace(word, start=word.start + seconds, end=word.end + seconds) for word in segment.words]
    return replace(segment, start=segment.start + seconds, end=segment.end + seconds, words=words)
