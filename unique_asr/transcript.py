"""What a transcription gives: words, segments, and how they were made. Times are seconds from the file's beginning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

Progress = Callable[[str, float, float], None]  # stage (load, encode, prefill, decode), done, total

STOP_REASONS = {  # why the last pass over a recording stopped -> what that means
    "end": "the model ended its text by itself",
    "length": "the text reached the most tokens that a pass may have",
    "loop": "the text began to repeat itself",
    "gap": "the text left out a stretch of speech",
    "lost": "so much of the text was not said that it could not be placed in the audio",
    "silence": "no speech was heard; the transcript is empty",
    "interrupted": "whoever asked for the segments stopped before the end",
    "error": "an error ended the transcription; the last warning, or the error itself, says which",
}


@dataclass
class Word:
    """A word and when it was said."""

    text: str
    start: float
    end: float
    confidence: float | None = None  # 0 to 1


@dataclass
class Segment:
    """A sentence, or part of one, and when it was said."""

    id: int  # from 0, in order
    start: float
    end: float
    text: str
    words: list[Word] = field(default_factory=list)
    confidence: float | None = None  # 0 to 1
    speaker: str | None = None  # where the model tells them apart

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Segment:
        """Make a segment from what `to_dict` returned."""
        return cls(**{**values, "words": [Word(**word) for word in values.get("words", [])]})


@dataclass
class Unfinished:
    """A transcription that broke off: its segments up to the beginning of a pass, and what that pass needs."""

    segments: list[Segment]
    state: dict[str, Any]  # what `on_pass` of the pipeline was called with


@dataclass
class TranscriptionInfo:
    """How a transcript was made, and whether it is whole. Complete once the iterator of segments is exhausted."""

    audio: str  # the file's path
    file: dict[str, Any] = field(default_factory=dict)  # of the recording, for jobs on disk: size, modified, sha256 ...
    duration: float = 0.0  # s, of what was transcribed
    model: str = "default"
    device: str = "cpu"
    dtype: str = "float32"
    attention: dict[str, Any] = field(default_factory=dict)  # the settings of SparseAttentionConfig
    settings: dict[str, Any] = field(default_factory=dict)  # other choices that change the text; start and end in s
    stop_reason: str = ""  # of the last pass: a key of STOP_REASONS; empty until then
    coverage: float = 0.0  # share of the recording's speech that lies inside segments, 0 to 1
    dropped: float = 0.0  # s that voice activity detection left out, as they are not speech
    padded: float = 0.0  # s of silence for what the file lacks, or before its sound begins
    passes: int = 0  # times that decoding started: 1 unless it had to be continued
    sparsity: dict[str, Any] = field(default_factory=dict)  # SparsityCounters.to_dict()
    timings: dict[str, float] = field(default_factory=dict)  # s by stage: load, encode, prefill, decode
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranscriptionInfo:
        """Make an info from what `to_dict` returned."""
        return cls(**values)


@dataclass
class Transcript:
    """The segments of a recording, and how they were made."""

    segments: list[Segment]
    info: TranscriptionInfo

    @property
    def text(self) -> str:
        """The text of all segments in one line."""
        return " ".join(segment.text.strip() for segment in self.segments)

    def to_dict(self) -> dict[str, Any]:
        """Return text, segments and info for JSON."""
        return {
            "text": self.text,
            "segments": [segment.to_dict() for segment in self.segments],
            "info": self.info.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Transcript:
        """Make a transcript from what `to_dict` returned."""
        segments = [Segment.from_dict(segment) for segment in values["segments"]]
        return cls(segments, TranscriptionInfo.from_dict(values["info"]))


def text_settings(
    prompt: str | None,
    max_pass_seconds: float | None,
    start: float,
    end: float | None,
    channel: int | None,
    vad: bool = False,
    language: str | None = None,
    hotwords: str | None = None,
    track: int | None = None,
) -> dict[str, Any]:
    """Return what changes a transcript besides model and attention, as `TranscriptionInfo.settings` keeps it.

    Args:
        start, end: of the part of the file, in seconds.
        vad: whether what is not speech was dropped.
    """
    return {
        "prompt": prompt,
        "max_pass_seconds": max_pass_seconds,
        "start": start or None,
        "end": end,
        "channel": channel,
        "track": track,
        "vad": vad or None,
        "language": language,
        "hotwords": hotwords,
    }
