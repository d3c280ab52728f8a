"""What was decoded, kept for the next run: one JSONL file for each system, in the folder of the results.

    decodings = Decodings(folder, {"system": "unique-512", "attention": {...}, "model": identity("my-model")})
    decodings.get(recording)  # a Hypothesis, or None

Everything that may change the text is in the settings, whose fingerprint names the file. Models and audio count by what
is in their files, wherever these lie: what one machine decoded another can score. Several processes may write to one
folder. A file that ends in the middle of a line, as a killed run leaves it, loses that line only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unique_asr.data import Recording
from unique_asr.evaluation.harness import Hypothesis
from unique_asr.models.sources import locate_model
from unique_asr.transcript import Segment, Word


class Rows:
    """Values by key, JSON in a file that only grows; `put` writes them at once, and the last value of a key counts."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        self.path = folder / f"{fingerprint(settings)}.jsonl"
        self._settings = settings
        self._known = self._read() if resume and self.path.is_file() else {}

    def _read(self) -> dict[str, Any]:
        known = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off
            if "key" in row:
                known[row["key"]] = row["value"]
        return known

    def get(self, key: str) -> Any | None:
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        self._known[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:  # one write a time: others may write to it too
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            lines = [] if size else [{"settings": self._settings}]
            text = "\n" if size and file.read(1) != b"\n" else ""  # a line was cut off
            for line in (*lines, {"key": key, "value": value}):
                text += json.dumps(line, ensure_ascii=False, default=str) + "\n"
            file.write(text.encode())


class Decodings:
    """Hypotheses by recording."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        self.rows = Rows(folder, settings, resume)

    def get(self, recording: Recording) -> Hypothesis | None:
        value = self.rows.get(recording_key(recording))
        if value is None:
            return None
        return Hypothesis(**{**value, "segments": [unpacked(segment) for segment in value["segments"]]})

    def put(self, recording: Recording, hypothesis: Hypothesis) -> None:
        value = asdict(hypothesis)
        value["segments"] = [packed(segment) for segment in value["segments"]]
        self.rows.put(recording_key(recording), value)


def packed(segment: dict[str, Any]) -> dict[str, Any]:
    """A segment whose words are lists [text, start, end, confidence], to the millisecond: a third of the bytes."""
    words = [[_rounded(value) for value in word.values()] for word in segment["words"]]
    return {name: _rounded(value) for name, value in segment.items()} | {"words": words}


def unpacked(segment: dict[str, Any]) -> Segment:
    return Segment(**segment | {"words": [Word(*word) for word in segment["words"]]})


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def fingerprint(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recording_key(recording: Recording) -> str:
    """Of the audio alone: the text may be corrected without decoding again."""
    spans = [f"{digest(span.path)}@{span.start:.4f}-{span.end:.4f}" for span in recording.spans]
    return hashlib.sha256("\n".join(spans).encode()).hexdigest()


def identity(model: str | Path) -> str | list[str]:
    """What a model is: the contents of its weights if it is a folder or a file, else its name."""
    folder = Path(locate_model(model)[0])
    if folder.is_file():
        return digest(folder)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [digest(file) for file in files] or str(model)


def digest(path: Path | str) -> str:
    """Of the bytes in a file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file; audio_filepath is relative to its manifest")
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
