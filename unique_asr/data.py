"""Speech data: manifests, recordings and joined recordings, for training and for evaluation.

A manifest is JSON lines, one recording a row. `audio_filepath` is relative to the manifest; the other fields are
those of NeMo (`duration`, `offset`, `text`) plus `segments`: a list of {"start", "end", "text"} with times in seconds,
and `entities`: a list of names and numbers in the text, for the entity error rate.

    recordings = read_manifest("eval.jsonl", source="librispeech_test_clean")
    for item in join(recordings, seconds=30):
        samples, text = item.audio(), item.text
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

SAMPLE_RATE = 16000  # Hz, of everything that `audio()` and `blocks()` give

Within = Literal["recording", "speaker", "source", "all"]
T = TypeVar("T")


class ManifestError(ValueError):
    """A manifest that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Utterance:
    """A transcribed stretch of a recording."""

    start: float  # seconds
    end: float  # seconds
    text: str


@dataclass(frozen=True)
class Span:
    """A stretch of an audio file, from `start` to `end` seconds."""

    path: Path
    start: float
    end: float

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.end - self.start

    def audio(self) -> np.ndarray:
        """Decode the samples [n], float32 mono at 16 kHz; see `read_audio`."""
        return read_audio(self.path, self.start, self.end)


@dataclass(frozen=True)
class Recording:
    """Spans of audio played one after another, and what is said in them, with times counted from the beginning."""

    id: str
    spans: tuple[Span, ...]
    utterances: tuple[Utterance, ...]
    speaker: str = ""
    source: str = ""
    entities: tuple[str, ...] | None = None  # names and numbers as the text has them; None: they are not listed

    @property
    def duration(self) -> float:
        """Seconds."""
        return sum(span.duration for span in self.spans)

    @property
    def text(self) -> str:
        """The texts of all utterances, joined by spaces."""
        return " ".join(utterance.text for utterance in self.utterances if utterance.text)

    def audio(self) -> np.ndarray:
        """Decode all samples [duration * 16000], float32 mono at 16 kHz."""
        return np.concatenate([span.audio() for span in self.spans])

    def blocks(self, seconds: float = 30.0) -> Iterator[np.ndarray]:
        """Decode the samples in blocks [n] of at most `seconds`, so that memory does not grow with the recording."""
        for span in self.spans:
            steps = max(1, int(np.ceil(span.duration / seconds)))
            for step in range(steps):
                start = span.start + step * seconds
                yield read_audio(span.path, start, min(start + seconds, span.end))


def read_audio(path: Path | str, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Decode the samples [n] of an audio file, float32 mono at 16 kHz.

    Files at 16 kHz that libsndfile reads (wav, flac, mp3, ogg, opus) are decoded from `start` on, all others as a
    whole, by `unique_asr.audio`.

    Args:
        path: the file.
        start, end: seconds; None: to the end of the file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file; audio_filepath is relative to its manifest")
    first = round(start * SAMPLE_RATE)
    count = -1 if end is None else round(end * SAMPLE_RATE) - first
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate == SAMPLE_RATE:
                file.seek(min(first, file.frames))
                samples = file.read(count, dtype="float32", always_2d=True)  # [n, channels]
                return samples.mean(axis=1)
    except soundfile.LibsndfileError:
        pass  # a container that only FFmpeg reads
    from unique_asr.audio import load_audio

    samples = load_audio(path)
    return samples[first:] if end is None else samples[first : first + count]


def read_manifest(
    path: Path | str, source: str | Sequence[str] | None = None, select: str | None = None
) -> list[Recording]:
    """Read the recordings of a JSON lines manifest, in its order.

    Args:
        path: the manifest.
        source: keep the rows of this source, or of these.
        select: keep the recordings whose id (the file name without suffix) matches this glob, such as "lj-*".

    Raises:
        ManifestError: there is no such file, a row cannot be read, or no recording is left.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest")
    sources = {source} if isinstance(source, str) else set(source or ())
    recordings, seen = [], set()
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                seen.add(row.get("source", ""))
                recording = _read_row(row, path.parent)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ManifestError(f"{path}, line {number}: not a manifest row ({error!r})") from None
            if sources and recording.source not in sources:
                continue
            if select is not None and not fnmatch.fnmatchcase(recording.id, select):
                continue
            recordings.append(recording)
    if not recordings:
        wanted = f"source {' or '.join(sorted(sources)) or 'any'}, id {select or 'any'}"
        raise ManifestError(f"{path}: no recordings of {wanted}; its sources are {', '.join(sorted(seen)) or 'none'}")
    return recordings


def join(recordings: Sequence[Recording], seconds: float, within: Within = "recording") -> list[Recording]:
    """Join consecutive utterances to recordings of at most `seconds`; a longer utterance stays alone.

    Two utterances of one row of a manifest keep the pause between them, those of two rows are played without one.

    Args:
        recordings: of a manifest.
        seconds: length of a joined recording, at most.
        within: which border a joined recording may not cross. `recording` joins the utterances of one file only,
            `speaker` goes on with the next file of the speaker, `source` and `all` with the next speaker.

    Raises:
        ValueError: `within` is none of these.
    """
    joined: list[Recording] = []
    pieces: list[tuple[Recording, Span, Utterance]] = []
    length, group = 0.0, None

    def flush() -> None:
        if pieces:
            joined.append(_join_pieces(pieces))
            pieces.clear()

    for recording in _sort_by_group(recordings, within):
        if _find_group(recording, within) != group:
            flush()
            group = _find_group(recording, within)
        for span, utterance in _list_pieces(recording):
            follows = bool(pieces) and pieces[-1][0] is recording and _continues(pieces[-1][1], span)
            added = span.end - pieces[-1][1].end if follows else span.duration
            if pieces and length + added > seconds + 1e-6:
                flush()
            length = length + added if pieces else span.duration
            pieces.append((recording, span, utterance))
    flush()
    return joined


def take_evenly(items: Sequence[T], count: int | None) -> list[T]:
    """Take `count` items, evenly spaced over all of them; all if there are fewer or `count` is None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def _read_row(row: dict, folder: Path) -> Recording:
    path = folder / row["audio_filepath"]
    offset, duration = float(row.get("offset") or 0.0), float(row["duration"])
    text = row.get("text") or ""
    segments = row.get("segments") or [{"start": 0.0, "end": duration, "text": text}]
    utterances = tuple(Utterance(float(s["start"]), float(s["end"]), s["text"].strip()) for s in segments)
    return Recording(
        id=f"{path.stem}@{offset:.2f}" if offset else path.stem,
        spans=(Span(path, offset, offset + duration),),
        utterances=utterances,
        speaker=str(row.get("speaker") or ""),
        source=str(row.get("source") or ""),
        entities=None if row.get("entities") is None else tuple(map(str, row["entities"])),
    )


def _find_group(recording: Recording, within: Within) -> tuple:
    keys = {
        "recording": (recording.source, recording.speaker, recording.spans[0].path),
        "speaker": (recording.source, recording.speaker),
        "source": (recording.source,),
        "all": (),
    }
    if within not in keys:
        raise ValueError(f"within={within!r}: choose one of {', '.join(keys)}")
    return keys[within]


def _sort_by_group(recordings: Sequence[Recording], within: Within) -> Iterable[Recording]:
    """Put the recordings of a source, of a speaker and of a file side by side, else keep their order."""
    ranks: dict[tuple, int] = {}
    for recording in recordings:
        for level in ("source", "speaker", "recording"):
            ranks.setdefault(_find_group(recording, level), len(ranks))
    return sorted(
        recordings, key=lambda r: [ranks[_find_group(r, level)] for level in ("source", "speaker", "recording")]
    )


def _list_pieces(recording: Recording) -> Iterator[tuple[Span, Utterance]]:
    """List the utterances of a recording of a manifest, each with its span of the file."""
    (span,) = recording.spans
    for utterance in recording.utterances:
        yield Span(span.path, span.start + utterance.start, span.start + utterance.end), utterance


def _continues(previous: Span, span: Span) -> bool:
    """Tell whether a span of the same row follows the previous one, so that the two can be read as one."""
    return previous.start <= span.start and previous.end <= span.end


def _join_pieces(pieces: Sequence[tuple[Recording, Span, Utterance]]) -> Recording:
    """Make one recording of pieces; pieces that follow each other in a row become one span."""
    spans: list[Span] = []
    utterances: list[Utterance] = []
    before = 0.0  # seconds of the spans before the last one
    row = None
    for recording, span, utterance in pieces:
        if recording is row and _continues(spans[-1], span):
            spans[-1] = Span(span.path, spans[-1].start, span.end)
        else:
            before = sum(earlier.duration for earlier in spans)
            spans.append(span)
        row = recording
        shift = before - spans[-1].start
        utterances.append(Utterance(round(span.start + shift, 4), round(span.end + shift, 4), utterance.text))
    (first, head, _), (last, tail, _) = pieces[0], pieces[-1]
    end = f"{tail.end:.2f}" if last is first else f"{last.id}@{tail.end:.2f}"
    return Recording(
        id=f"{first.id}@{head.start:.2f}-{end}",
        spans=tuple(spans),
        utterances=tuple(utterances),
        speaker=",".join(dict.fromkeys(recording.speaker for recording, _, _ in pieces)),
        source=first.source,
        entities=_join_entities(list(dict.fromkeys(recording for recording, _, _ in pieces))),
    )


def _join_entities(recordings: Sequence[Recording]) -> tuple[str, ...] | None:
    """Join the entities of all recordings; None unless every one has a list."""
    if any(recording.entities is None for recording in recordings):
        return None
    return tuple(dict.fromkeys(entity for recording in recordings for entity in recording.entities))
