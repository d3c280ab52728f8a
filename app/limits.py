"""What may be transcribed: recordings from an allowed place, not too long. All else is refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unique_asr.application.limits import RecordingLimits, Refusal
from unique_asr.remote import expand_home


@dataclass(frozen=True)
class Limits(RecordingLimits):
    """What may be transcribed: files of these folders, of this length and size at most."""

    folders: Sequence[Path] = ()  # whose files may be named

    def choose(self, uploads: Sequence[str] | None, recorded: str | None, path: str | None) -> tuple[list[Path], bool]:
        """Return the recordings that are meant, and whether they were uploaded.

        Raises:
            Refusal: if none is, or more than one kind, or one may not be read or is too long.
        """
        path = (path or "").strip()
        given = [name for name in (uploads, recorded, path) if name]
        if len(given) != 1:
            what = "nothing" if not given else "more than one"
            raise Refusal(f"Give files, the microphone or a path; {what} was given.")
        if path:
            recordings = [self._allowed(path)]
        else:
            recordings = [Path(name) for name in (uploads or [recorded])]
        for recording in recordings:
            self.check(recording)
        return recordings, not path

    def _allowed(self, name: str) -> Path:
        """A file inside an allowed folder, wherever links and .. lead. What lies outside is not even said to exist."""
        for folder in self.folders:
            root = expand_home(folder).resolve()
            try:
                path = (root / expand_home(name)).resolve()
                if path.is_relative_to(root) and path.is_file():
                    return path
            except (OSError, ValueError, RuntimeError):
                continue
        raise Refusal("There is no such file in the folders that this page may read.")
