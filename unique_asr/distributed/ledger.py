"""What is known of jobs outside the workers that do them: how each ended, and how often it was begun."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unique_asr.application.display import Display
from unique_asr.transcript import TranscriptionInfo


@dataclass
class RecordingLog:
    """What a display is told of one recording, to be told to another display elsewhere.

    Attributes:
        told: (method, arguments), but for what is only of use while the work goes on.
        seconds: of audio that were transcribed; None if they were not.
        failed: whether an error ended it.
    """

    told: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    seconds: float | None = None
    failed: bool = False

    def replay(self, display: Display, folder: Path) -> None:
        """Tell a display what this one was told, with `folder` for that of the files."""
        for method, arguments in self.told:
            shown = (
                [folder / file.name for file in value] if isinstance(value, list) else value for value in arguments
            )
            getattr(display, method)(*shown)


class RecordingDisplay(Display):
    """Writes a log of a recording, and calls `on_end` when it is transcribed or has failed."""

    def __init__(self, on_end: Callable[[RecordingLog], None]) -> None:
        self.log, self._on_end = RecordingLog(), on_end

    def summary(self, info: TranscriptionInfo, seconds: float, files: Sequence[Path]) -> None:
        self.log.seconds = info.duration
        self.log.told.append(("summary", (info, seconds, list(files))))
        self._on_end(self.log)

    def kept(self, recording: str, files: Sequence[Path]) -> None:
        self.log.told.append(("kept", (recording, list(files))))

    def warning(self, message: str) -> None:
        self.log.told.append(("warning", (message,)))

    def error(self, message: str, recording: str | None = None) -> None:
        self.log.failed = True
        self.log.told.append(("error", (message, recording)))
        self._on_end(self.log)


class Ledger:
    """How often each job was begun, and the logs of those that have ended. It outlives the workers, which share it."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()
        self._ended: dict[int, RecordingLog] = {}

    def look_up(self, numbers: Sequence[int]) -> list[tuple[int, RecordingLog | None]]:
        """Return how often jobs were begun, and their logs; None for those that have not ended."""
        return [(self._begun[number], self._ended.get(number)) for number in numbers]

    def begin(self, numbers: Sequence[int]) -> None:
        """Note that jobs are begun."""
        self._begun.update(numbers)

    def end(self, number: int, log: RecordingLog) -> None:
        """Note how a job ended."""
        self._ended[number] = log
