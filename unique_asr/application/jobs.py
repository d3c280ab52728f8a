"""From what the user names to files: which recordings, where their transcripts go, which are done already."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import stat
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unique_asr.application.file_identity import has_changed, is_same_file, is_same_uri
from unique_asr.audio import AudioError
from unique_asr.remote import RemoteError, RemoteFile, full_place, is_uri, list_remote, to_path
from unique_asr.transcript import Transcript, TranscriptionInfo, Unfinished
from unique_asr.writers import WRITERS, ResultWriter, SegmentLog, read_transcript

MEDIA_SUFFIXES = {
    *(".aac", ".ac3", ".aif", ".aiff", ".amr", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mp2", ".mp3", ".oga", ".ogg"),
    *(".opus", ".wav", ".weba", ".wma"),
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
}  # what a folder or a glob is searched for; a file named by itself may be called anything
LOG, PLOT = "partial.jsonl", "reads.svg"  # the extensions of two files that are no transcripts
OUTPUT_EXTENSIONS = (*WRITERS, *(f"partial.{extension}" for extension in WRITERS), LOG, PLOT)
MAX_NAME = 255  # bytes of a file's name, on most file systems

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
        elif str(name).startswith("@") and not os.path.exists(path):
            files = _read_list(to_path(str(name)[1:]))
        elif os.path.isdir(path):  # unlike Path.is_dir, never raises
            files = sorted(file for file in path.iterdir() if _is_media(file))
            if not files:
                raise AudioError(f"{path}: no audio or video files in this folder")
        elif not os.path.exists(path) and glob.has_magic(str(path)):
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
    if value is None:
        raise OutputError(f"output.format=null: choose from {', '.join(WRITERS)} or all")
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
        return self.base.with_name(_fit_name(self.base.name, f".{extension}"))

    def partial_path(self, extension: str) -> Path:
        """Return where a transcript that was broken off goes; `jsonl` is the log of segments."""
        return self.path(f"partial.{extension}")

    def list_outputs(self) -> list[Path]:
        """Return every file that a transcription may write or remove."""
        return [self.path(extension) for extension in OUTPUT_EXTENSIONS]

    def check_outputs(self) -> None:
        """Check that nothing but files of transcripts lies where they go, before an hour is spent on them.

        Raises:
            OutputError: if one is the recording itself, by whatever name, or cannot be a file.
        """
        for path in self.list_outputs():
            try:
                status = os.stat(path)
                local = self.audio != STDIN and not is_uri(self.audio)
                itself = local and os.path.samestat(status, os.stat(self.audio))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise OutputError(
                    f"{path}: cannot be written ({error.strerror}); output.dir=FOLDER writes elsewhere"
                ) from error
            if itself:
                raise OutputError(
                    f"{path}: is the recording itself and stays as it is; output.dir=FOLDER writes elsewhere"
                )
            if stat.S_ISDIR(status.st_mode):
                raise OutputError(
                    f"{path}: cannot be written ({os.strerror(errno.EISDIR)}); output.dir=FOLDER writes elsewhere"
                )

    def check_writable(self) -> None:
        """Make the folder of the transcripts.

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

    def find_difference(self, provenance: Mapping[str, Any]) -> str | None:
        """Return what the .json on disk was made from that is not what is asked for now; None if nothing is.

        Args:
            provenance: model, settings of the attention, and those that `TranscriptionInfo.settings` keeps.
        """
        try:
            info = read_transcript(self.path("json")).info
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return "something other than a transcript"
        return self._compare(info, provenance)

    def has_changed(self) -> bool:
        """Return whether the recording, a URI, is perhaps no longer the one that the .json on disk was made from."""
        try:
            known = read_transcript(self.path("json")).info.file
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return is_same_uri(known, self.audio) and has_changed(known, self.audio)

    def _compare(self, info: TranscriptionInfo, provenance: Mapping[str, Any]) -> str | None:
        same_name = Path(info.audio).name == Path(self.name).name
        # Older transcripts know the name alone, and so it is where no file is there yet. The duration is no help:
        # many containers only estimate it.
        if info.file and is_uri(self.audio):
            same = is_same_uri(info.file, self.audio)
        elif info.file and os.path.isfile(self.audio):
            same = is_same_file(info.file, self.audio, same_name)
        else:
            same = same_name
        if not same:
            return f"another recording ({info.audio})"
        made = {"model": info.model, **info.attention, **info.settings}
        for name, value in provenance.items():
            if made.get(name) != value:
                return f"{name}={'null' if made.get(name) is None else made[name]}"
        return None

    def read_unfinished(self, provenance: Mapping[str, Any]) -> tuple[Unfinished | None, int]:
        """Return where an interrupted transcription goes on, None if there is none, and the bytes of its log to keep.

        Raises:
            OutputError: if the log cannot be read, or was made with other settings.
        """
        path = self.path(LOG)
        try:
            info, unfinished, keep = SegmentLog.read_unfinished(path)
        except FileNotFoundError:
            return None, 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: is no log of segments; resume=false begins anew") from error
        if info is None or unfinished is None:
            return None, 0
        if made_from := self._compare(info, provenance):
            raise OutputError(f"{path}: was made from {made_from}; ask for the same, or resume=false begins anew")
        return unfinished, keep

    def write(
        self, transcript: Transcript, formats: Iterable[str], writers: Mapping[str, ResultWriter] = WRITERS
    ) -> list[Path]:
        """Write a whole transcript; return the files."""
        paths = []
        for extension in formats:
            paths.append(self.path(extension))
            writers[extension].write_file(transcript, paths[-1])
        return paths

    def write_partial(
        self, transcript: Transcript, formats: Iterable[str], writers: Mapping[str, ResultWriter] = WRITERS
    ) -> list[Path]:
        """Write a transcript that was broken off, under names that tell it from a whole one; return the files."""
        paths = []
        for extension in formats:
            paths.append(self.partial_path(extension))
            writers[extension].write_file(transcript, paths[-1])
        return paths

    def remove_partial(self, keep_log: bool = False) -> None:
        """Remove what `write_partial` wrote, and the log of segments unless it is kept."""
        for extension in WRITERS if keep_log else (*WRITERS, "jsonl"):
            self.partial_path(extension).unlink(missing_ok=True)


def plan(recordings: Sequence[Path | RemoteFile], folder: str | Path | None = None) -> list[Job]:
    """Return a job for each recording, of which no two write the same files, and none writes over a recording.

    talk.mp3 gives talk.txt; with a talk.wav beside it the two give talk.mp3.txt and talk.wav.txt. So does a recording
    that is itself called talk.txt.

    Args:
        folder: of the transcripts; by default that of each recording, and the current one for URIs.

    Raises:
        OutputError: if `folder` is a file or elsewhere, or two recordings would write the same files, or one over
            another.
    """
    if folder is not None and not isinstance(folder, str | Path):
        raise OutputError(f"output.dir={folder}: give one folder")
    if is_uri(folder):
        raise OutputError(f"output.dir={folder}: is not a folder; transcripts go to a path, such as a mounted share")
    folder = to_path(folder) if folder is not None else None
    if folder is not None and os.path.exists(folder) and not folder.is_dir():
        raise OutputError(f"output.dir={folder}: is not a folder")
    targets = [_find_target(recording, folder) for recording in recordings]
    stems = Counter((target.parent, _fold(target.stem)) for target in targets)
    files = [recording for recording in recordings if isinstance(recording, Path) and recording != STDIN]
    places = {_fold(os.path.abspath(path)): path for path in files}
    siblings = {parent: _list_media(parent) for parent in {path.parent for path in files}}
    jobs: dict[Path, Job] = {}
    folded: dict[str, Job] = {}
    for recording, target in zip(recordings, targets, strict=True):
        local = isinstance(recording, Path)
        if recording == STDIN:
            job = Job(recording, target, "stdin")
        else:
            whole = Job(recording, target) if local else Job(recording.uri, target, recording.name)
            job = replace(whole, base=target.with_name(target.stem))
            shared = stems[target.parent, _fold(target.stem)] > 1 or (
                local and siblings[recording.parent][_fold(recording.stem)] - {recording.name}
            )
            if shared or _is_named_as_output(target) or _find_covered(job, places):
                job = whole
            if covered := _find_covered(job, places):
                raise OutputError(
                    f"the transcript of {job.name} would be written over the recording {covered}; "
                    "output.dir=FOLDER writes elsewhere"
                )
        other = jobs.get(job.base) or folded.get(_fold(str(job.base)))
        if other is not None and (other.base == job.base or _ignores_case(job.base.parent)):
            apart = "leave output.dir out or transcribe them one by one"
            raise OutputError(
                f"{other.name} and {job.name} would both be written to {job.base}.*; "
                f"{apart if local else 'list them in a file, audio=@FILE'}"
            )
        jobs[job.base] = folded[_fold(str(job.base))] = job
    return list(jobs.values())


def _find_target(recording: Path | RemoteFile, folder: Path | None) -> Path:
    """The name of a recording in the folder of its transcripts."""
    if isinstance(recording, RemoteFile):
        return (folder or Path()) / recording.place
    return (folder or Path()) / "stdin" if recording == STDIN else (folder or recording.parent) / recording.name


def _fold(name: str) -> str:
    """A name as file systems compare it that ignore case, or how accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def _ignores_case(folder: Path) -> bool:
    """Whether names in a folder, or in the first folder above it that exists, differ in more than case."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(prefix="case", dir=folder) as file:
            return Path(file.name).with_name(Path(file.name).name.swapcase()).exists()
    except OSError:
        return False  # it cannot be written to: nothing is lost there


def _list_media(folder: Path) -> dict[str, set[str]]:
    """The names of the recordings in a folder by stem, asked for now or not, so that names of transcripts stay."""
    names = defaultdict(set)
    for path in folder.iterdir() if os.path.isdir(folder) else ():
        if _is_media(path):
            names[_fold(path.stem)].add(path.name)
    return names


def _is_named_as_output(path: Path) -> bool:
    """Whether a recording, or its transcript, would be called as what is written about another."""
    return path.suffix.lower() in {f".{name.rpartition('.')[2]}" for name in OUTPUT_EXTENSIONS} or (
        Path(path.stem).suffix.lower() == ".partial"
    )


def _find_covered(job: Job, places: Mapping[str, Path]) -> Path | None:
    """The recording, by its folded path one of `places`, where the job would write a file."""
    outputs = (_fold(os.path.abspath(path)) for path in job.list_outputs())
    return next((places[output] for output in outputs if output in places), None)


def _fit_name(stem: str, ending: str) -> str:
    """The name of a file; a stem too long for a file system is cut, and told from others by a digest."""
    encoded, room = os.fsencode(stem), MAX_NAME - len(os.fsencode(ending))
    if len(encoded) <= room:
        return stem + ending
    mark = f"~{hashlib.sha256(encoded).hexdigest()[:8]}"
    return encoded[: room - len(mark)].decode("utf-8", "ignore") + mark + ending


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in MEDIA_SUFFIXES and not path.name.startswith(".") and path.is_file()
