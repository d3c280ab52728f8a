"""How large and how long a recording of somebody else may be; what is not allowed is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unique_asr.audio import AudioError, AudioFile


class Refusal(ValueError):
    """A request that is not carried out; the message is one line."""


class TooLarge(Refusal):
    """A recording beyond the limits of size or duration."""


@dataclass(frozen=True)
class RecordingLimits:
    """The size and the length that a recording may have at most."""

    max_minutes: float = 180.0
    max_megabytes: float = 1000.0

    def check(self, recording: Path, name: str = "") -> None:
        """Raise Refusal if a recording is too large, too long, or cannot be read.

        Args:
            name: what messages call it, if not by the name of its file.
        """
        name = name or recording.name
        size = recording.stat().st_size / 1e6
        if size > self.max_megabytes:
            raise TooLarge(f"{name} has {size:.0f} MB; the limit is {self.max_megabytes:g} MB.")
        try:
            duration = AudioFile(recording, name=name).duration
        except AudioError as error:
            raise Refusal(str(error)) from error
        if duration is not None:
            self.check_duration(duration)

    def check_duration(self, seconds: float) -> None:
        """Raise TooLarge if a recording of so many seconds is too long."""
        if seconds > 60 * self.max_minutes:
            raise TooLarge(f"The recording is longer than {self.max_minutes:g} minutes, which is the limit.")
