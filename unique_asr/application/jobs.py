"""From what the user names to files: which recordings, where their transcripts go, which are done already."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unique_asr.audio import AudioError
from unique_asr.remote import RemoteError, RemoteFile, full_place, is_uri, list_remote, to_path
from unique_asr.transcript import Transcript, TranscriptionInfo, Unfinished
from unique_asr.writers import WRITERS, SegmentLog, read_transcript

MEDIA_SUFFIXES = {
    *(".aac", ".ac3", ".aif", ".aiff", ".amr", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mp2", ".mp3", ".oga", ".ogg"),
    *(".opus", ".wav", ".weba", ".wma"),
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
}  # what a folder or a glob is searched for; a file named by itself may be called anything


STDIN = Path("-")  # standard input, as a recording


class OutputError(ValueError):
    """Transcripts that cannot go where they should; the message is one line with the remedy."""


def find_recordings(audio: str | Path | Iterable[str | Path]) -> list[Path | RemoteFile]:
    """Return what `audio` names: a file, a folder (without its subfolders), a glob, a URI, -, or a list of these.

    `@FILE` names what the lines of a text file name: paths and URIs, no folders or globs.

    Raises:
        AudioError: if a folder, a glob or a list holds no recording. That a file exists is not checked here.
    """
    names = [audio] if isinstance(audio, str | Path) else list(audio)
    found: dict[Path | RemoteFile, None] = {}
    for name in names:
        path = to_path(name)
        if is_uri(name):
            files = _find_remote(name)
        elif path == STDIN:
            files = [path]
        elif str(name).startswith("@") and not path.exists():
            files = _read_list(to_path(str(name)[1:]))
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if _is_media(file))
            if not files:
                raise AudioError(f"{path}: no audio or video files in this folder")
        elif not path.exists() and glob.has_magic(str(path)):
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            files = [match for match in matches if _is_media(match)] or [match for match in matches if match.is_file()]
            if not files:
                raise AudioError(f"{path}: no file matches")
        else:
            files = [path]
        found.update(dict.fromkeys(files))
    return list(found)


def _find_remote(uri: str) -> list[RemoteFile]:
    try:
        return list_remote(uri, lambda name: Path(name).suffix.lower() in MEDIA_SUFFIXES)
    except RemoteError as error:
        raise AudioError(str(error)) from error


def _read_list(path: Path) -> list[Path | RemoteFile]:
    """Recordings of a text file, one a line; # begins a comment. Many URIs end alike: each keeps its whole path."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise AudioError(f"audio=@{path}: the list cannot be read ({reason})") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise AudioError(f"audio=@{path}: the list names no recording")
    return [RemoteFile(name, full_place(name)) if is_uri(name) else to_path(name) for name in names]


def resolve_formats(value: str | Iterable[str]) -> list[str]:
    """Return the extensions that `txt,srt`, a list or `all` names, in the order of WRITERS.

    Raises:
        OutputError: if one is unknown, or there is none.
    """
    names = {name.strip() for name in value.split(",")} if isinstance(value, str) else set(value)
    unknown = names - {*WRITERS, "all"}
    if unknown or not names:
        listed = ", ".join(sorted(map(str, unknown))) or "nothing"
        raise OutputError(f"output.format: unknown {listed}; choose from {', '.join(WRITERS)} or all")
    return [extension for extension in WRITERS if extension in names or "all" in names]


@dataclass(frozen=True)
class Job:
    """One recording and where its transcripts go.

    Attributes:
        audio: the recording; STDIN for standard input; a URI if it lies elsewhere.
        base: path of its transcripts, without extension.
        title: what the recording is called, if not by its path.
    """

    audio: Path | str
    base: Path
    title: str = ""

    @property
    def name(self) -> str:
        """What messages and transcripts call the recording."""
        return self.title or str(self.audio)

    def path(self, extension: str) -> Path:
        """Return where the transcript of a format goes."""
        return self.base.with_name(f"{self.base.name}.{extension}")

    def partial_path(self, extension: str) -> Path:
        """Return where a transcript that was broken off goes; `jsonl` is the log of segments."""
        return self.path(f"partial.{extension}")

    def check_writable(self) -> None:
        """Make the folder of the transcripts, before an hour is spent on them.

        Raises:
            OutputError: if it cannot be made or written to.
        """
        folder = self.base.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made ({error.strerror}); output.dir=FOLDER writes elsewhere"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: is not writable; output.dir=FOLDER writes elsewhere")

    def find_existing(self, formats: Iterable[str]) -> list[str]:
        """Return the extensions of `formats` whose files are there."""
        return [extension for extension in formats if self.path(extension).exists()]

    def find_difference(self, duration: float | None, provenance: Mapping[str, Any]) -> str | None:
        """Return what the .json on disk was made from that is not what is asked for now; None if nothing is.

        Args:
            duration: seconds of what is to be transcribed, if known.
            provenance: model, settings of the attention, and those that `TranscriptionInfo.settings` keeps.
        """
        try:
            info = read_transcript(self.path("json")).info
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return "something other than a transcript"
        return self._compare(info, duration, provenance)

    def _compare(self, info: TranscriptionInfo, duration: float | None, provenance: Mapping[str, Any]) -> str | None:
        if Path(info.audio).name != Path(self.name).name:
            return f"another recording ({info.audio})"
        made = {"model": info.model, **info.attention, **info.settings}
        for name, value in provenance.items():
            if made.get(name) != value:
                return f"{name}={'null' if made.get(name) is None else made[name]}"
        if abs((duration or info.duration) - info.duration) > 1.0:
            return f"another recording ({info.audio})"
        return None

    def read_unfinished(self, duration: float | None, provenance: Mapping[str, Any]) -> tuple[Unfinished | None, int]:
        """Return where an interrupted transcription goes on, None if there is none, and the bytes of its log to keep.

        Raises:
            OutputError: if the log cannot be read, or was made with other settings.
        """
        path = self.partial_path("jsonl")
        try:
            info, unfinished, keep = SegmentLog.read_unfinished(path)
        except FileNotFoundError:
            return None, 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: is no log of segments; resume=false begins anew") from error
        if info is None or unfinished is None:
            return None, 0
        if made_from := self._compare(info, duration, provenance):
            raise OutputError(f"{path}: was made from {made_from}; ask for the same, or resume=false begins anew")
        return unfinished, keep

    def write(self, transcript: Transcript, formats: Iterable[str]) -> list[Path]:
        """Write a whole transcript; return the files."""
        paths = []
        for extension in formats:
            paths.append(self.path(extension))
            WRITERS[extension].write_file(transcript, paths[-1])
        return paths

    def write_partial(self, transcript: Transcript, formats: Iterable[str]) -> list[Path]:
        """Write a transcript that was broken off, under names that tell it from a whole one; return the files."""
        paths = []
        for extension in formats:
            paths.append(self.partial_path(extension))
            WRITERS[extension].write_file(transcript, paths[-1])
        return paths

    def remove_partial(self, keep_log: bool = False) -> None:
        """Remove what `write_partial` wrote, and the log of segments unless it is kept."""
        for extension in WRITERS if keep_log else (*WRITERS, "jsonl"):
            self.partial_path(extension).unlink(missing_ok=True)


def plan(recordings: Sequence[Path | RemoteFile], folder: str | Path | None = None) -> list[Job]:
    """Return a job for each recording, of which no two write the same files.

    talk.mp3 gives talk.txt; with a talk.wav beside it the two give talk.mp3.txt and talk.wav.txt.

    Args:
        folder: of the transcripts; by default that of each recording, and the current one for URIs.

    Raises:
        OutputError: if `folder` is a file or elsewhere, or two recordings would write the same files.
    """
    if is_uri(folder):
        raise OutputError(f"output.dir={folder}: is not a folder; transcripts go to a path, such as a mounted share")
    folder = to_path(folder) if folder is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise OutputError(f"output.dir={folder}: is not a folder")
    targets = [_find_target(recording, folder) for recording in recordings]
    stems = Counter((target.parent, target.stem) for target in targets)
    jobs: dict[Path, Job] = {}
    for recording, target in zip(recordings, targets, strict=True):
        local = isinstance(recording, Path)
        if recording == STDIN:
            job = Job(recording, target, "stdin")
        else:
            shared = stems[target.parent, target.stem] > 1 or (local and _has_sibling(recording))
            base = target if shared else target.with_name(target.stem)
            job = Job(recording, base) if local else Job(recording.uri, base, recording.name)
        if job.base in jobs:
            apart = "leave output.dir out or transcribe them one by one"
            raise OutputError(
                f"{jobs[job.base].name} and {job.name} would both be written to {job.base}.*; "
                f"{apart if local else 'list them in a file, audio=@FILE'}"
            )
        jobs[job.base] = job
    return list(jobs.values())


def _find_target(recording: Path | RemoteFile, folder: Path | None) -> Path:
    """The name of a recording in the folder of its transcripts."""
    if isinstance(recording, RemoteFile):
        return (folder or Path()) / recording.place
    return (folder or Path()) / "stdin" if recording == STDIN else (folder or recording.parent) / recording.name


def _has_sibling(path: Path) -> bool:
    """Whether another recording beside this one has the same stem: asked for now or not, so that names stay."""
    siblings = path.parent.glob(f"{glob.escape(path.stem)}.*") if path.parent.is_dir() else ()
    return any(other.stem == path.stem and other.name != path.name and _is_media(other) for other in siblings)


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in MEDIA_SUFFIXES and not path.name.startswith(".") and path.is_file()
