"""What a transcription gives: words, segments, and how they were made. Times are seconds from the file's beginning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

Progress = Callable[[str, float, float], None]  # stage, done, total


@dataclass
class Word:
    text: str
    start: float
    end: float
    confidence: float | None = None  # 0 to 1


@dataclass
class Segment:
    id: int
    start: float
    end: float
    text: str
    words: list[Word] = field(default_factory=list)
    confidence: float | None = None  # 0 to 1
    speaker: str | None = None  # where the model tells them apart

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Segment:
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
    duration: float = 0.0  # s, of what was transcribed
    model: str = "default"
    device: str = "cpu"
    dtype: str = "float32"
    attention: dict[str, Any] = field(default_factory=dict)  # the settings of SparseAttentionConfig
    settings: dict[str, Any] = field(default_factory=dict)  # other choices that change the text; start and end in s
    stop_reason: str = ""  # of the last pass: end, length, loop, gap; silence if nothing was said; interrupted; error
    coverage: float = 0.0  # share of the audio up to the last segment's end, 0 to 1
    dropped: float = 0.0  # s that voice activity detection took for anything but speech
    passes: int = 0  # times that decoding started: 1 unless it had to be continued
    sparsity: dict[str, Any] = field(default_factory=dict)  # SparsityCounters.to_dict()
    timings: dict[str, float] = field(default_factory=dict)  # s a stage: load, encode, prefill, decode
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranscriptionInfo:
        return cls(**values)


@dataclass
class Transcript:
    segments: list[Segment]
    info: TranscriptionInfo

    @property
    def text(self) -> str:
        return " ".join(segment.text.strip() for segment in self.segments)

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "segments": [segment.to_dict() for segment in self.segments],
            "info": self.info.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Transcript:
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
) -> dict[str, Any]:
    """What changes a transcript besides model and attention, as `TranscriptionInfo.settings` keeps it."""
    return {
        "prompt": prompt,
        "max_pass_seconds": max_pass_seconds,
        "start": start or None,
        "end": end,
        "channel": channel,
        "vad": vad or None,
        "language": language,
        "hotwords": hotwords,
    }
