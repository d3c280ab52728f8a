"""Transcripts as files: one ResultWriter a format, and a log of segments that survives a crash."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TextIO

from unique_asr.subtitles import Cue, SubtitleLimits, build_cues
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo, Unfinished


def format_timestamp(seconds: float, decimal_mark: str = ".", always_hours: bool = True) -> str:
    """Return HH:MM:SS.mmm of seconds, rounded to a millisecond; MM:SS.mmm below an hour unless `always_hours`."""
    milliseconds = max(0, round(seconds * 1000))
    hours, milliseconds = divmod(milliseconds, 3_600_000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    seconds, milliseconds = divmod(milliseconds, 1000)
    prefix = f"{hours:02d}:" if always_hours or hours else ""
    return f"{prefix}{minutes:02d}:{seconds:02d}{decimal_mark}{milliseconds:03d}"


@contextmanager
def open_replacement(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes the place of `path` once it is whole; what else `path` links to stays as it is.

    It is UTF-8, in which JSON escapes the bytes of file names that are not.
    """
    temporary = path.with_name(f".unique-asr-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class ResultWriter:
    """Writer of one format of transcripts; a subclass has `extension`, that of its files, and `write`."""

    extension: ClassVar[str]

    def write_file(self, transcript: Transcript, path: Path) -> None:
        """Write a transcript to `path`, in UTF-8 without a byte order mark, and make its folder.

        It is written beside `path` and moved over it: an old file stays whole until the new one is.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_replacement(path) as file:
            self.write(transcript, file)

    def write(self, transcript: Transcript, file: TextIO) -> None:
        """Write a transcript to an open file."""
        raise NotImplementedError


class TextWriter(ResultWriter):
    """Plain text, one segment a line."""

    extension = "txt"

    def write(self, transcript: Transcript, file: TextIO) -> None:
        for segment in transcript.segments:
            print(_format_line(segment), file=file)


class SubtitleWriter(ResultWriter):
    """What writes cues.

    Args:
        limits: of a cue.
    """

    def __init__(self, limits: SubtitleLimits | None = None) -> None:
        self.limits = limits or SubtitleLimits()

    def build_cues(self, transcript: Transcript) -> list[Cue]:
        """Return the cues of a transcript."""
        info = transcript.info
        begin = info.settings.get("start") or 0.0  # of the part that was transcribed
        return build_cues(transcript.segments, self.limits, begin + info.duration if info.duration else None)


class SubRipWriter(SubtitleWriter):
    """Subtitles for most players."""

    extension = "srt"

    def write(self, transcript: Transcript, file: TextIO) -> None:
        for number, cue in enumerate(self.build_cues(transcript), start=1):
            start, end = (format_timestamp(time, ",") for time in (cue.start, cue.end))
            print(f"{number}\n{start} --> {end}\n{cue.text.replace('-->', '->')}\n", file=file)


class WebVTTWriter(SubtitleWriter):
    """Subtitles for web pages."""

    extension = "vtt"

    def write(self, transcript: Transcript, file: TextIO) -> None:
        print("WEBVTT\n", file=file)
        for cue in self.build_cues(transcript):
            start, end = (format_timestamp(time) for time in (cue.start, cue.end))
            text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            print(f"{start} --> {end}\n{text}\n", file=file)


class TabSeparatedWriter(ResultWriter):
    """Start and end in whole milliseconds, then the text; free of the quoting that CSV needs."""

    extension = "tsv"

    def write(self, transcript: Transcript, file: TextIO) -> None:
        print("start\tend\ttext", file=file)
        for segment in transcript.segments:
            start, end = round(1000 * segment.start), round(1000 * segment.end)
            print(f"{start}\t{end}\t{_format_line(segment)}", file=file)


class JSONWriter(ResultWriter):
    """Everything: text, segments with words and confidences, and how they were made."""

    extension = "json"

    def write(self, transcript: Transcript, file: TextIO) -> None:
        json.dump(transcript.to_dict(), file, ensure_ascii=False, indent=2)
        file.write("\n")


def make_writers(limits: SubtitleLimits) -> dict[str, ResultWriter]:
    """Return a writer for each format, by its extension; those of subtitles keep to `limits`."""
    writers = (TextWriter(), SubRipWriter(limits), WebVTTWriter(limits), TabSeparatedWriter(), JSONWriter())
    return {writer.extension: writer for writer in writers}


WRITERS = make_writers(SubtitleLimits())


def read_transcript(path: str | Path) -> Transcript:
    """Return the transcript that JSONWriter wrote.

    Raises:
        OSError: if there is no such file.
        ValueError, KeyError, TypeError: if it is no transcript.
    """
    return Transcript.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


class SegmentLog:
    """Log of segments: a .jsonl file that gets each the moment it is decoded, so that a crash loses none.

    One JSON object a line: {"transcription": how it is made}, then {"pass": what is needed to go on from here} before
    the first segment of each pass, and the segments. The file is begun with the first segment: until then, that of an
    earlier attempt stays.

    Args:
        keep: bytes of the file, as `read_unfinished` gives them, that the new segments follow; by default none.

    Attributes:
        info: how the segments are made, for the first line; set it before the first segment.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path, self.keep = path, keep
        self.info: TranscriptionInfo | None = None
        self._state: dict[str, Any] | None = None
        self._file: TextIO | None = None

    def begin_pass(self, state: dict[str, Any]) -> None:
        """Note what is needed to go on from here; it is written with the pass's first segment."""
        self._state = state

    def append(self, segment: Segment) -> None:
        """Write a segment. Raises OSError if the disk is full."""
        if self._file is None:
            self._begin()
        if self._state is not None:
            self._write({"pass": self._state})
            self._state = None
        self._write(segment.to_dict())

    def close(self, keep: bool) -> None:
        """Close the file, and remove it unless it is to be kept."""
        if self._file is not None:
            with suppress(OSError):  # a full disk has been reported when the line was written
                self._file.close()
        if not keep:
            self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        if self.keep:
            os.truncate(self.path, self.keep)
        else:
            self.path.unlink(missing_ok=True)  # it may be a link
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
        if self.info is not None and not self.keep:
            self._write({"transcription": self.info.to_dict()})

    def _write(self, values: dict[str, Any]) -> None:
        print(json.dumps(values, ensure_ascii=False), file=self._file, flush=True)

    @staticmethod
    def read(path: Path) -> list[Segment]:
        """Return the segments of a log; a last line that was cut off is left out."""
        return [Segment.from_dict(values) for _, values in _read_log_lines(path) if "id" in values]

    @staticmethod
    def read_unfinished(path: Path) -> tuple[TranscriptionInfo | None, Unfinished | None, int]:
        """Return how the log's segments were made, where to go on, and the bytes of the log until there.

        The last pass is left to do as a whole: what it writes depends on all that it has written.
        """
        info, unfinished, keep, segments = None, None, 0, []
        for place, values in _read_log_lines(path):
            if "transcription" in values:
                info = TranscriptionInfo.from_dict(values["transcription"])
            elif "pass" in values:
                unfinished, keep = Unfinished(list(segments), values["pass"]), place
            else:
                segments.append(Segment.from_dict(values))
        return info, unfinished, keep


def _read_log_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each line begins, in bytes, and what it holds."""
    place = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            yield place, json.loads(line)
        except ValueError:
            break
        place += len(line)


def _format_line(segment: Segment) -> str:
    """The text on one line, with the speaker before it where there is one."""
    text = _join_lines(segment.text)
    return f"{segment.speaker}: {text}" if segment.speaker else text


def _join_lines(text: str) -> str:
    return " ".join(text.split())
