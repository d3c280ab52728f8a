"""What was decoded, kept for the next run: one JSONL file for each system, in the folder of the results.

    decodings = Decodings(folder, {"system": "unique-512", "attention": {...}, "model": identify_weights("my-model")})
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
from unique_asr.evaluation.results import Hypothesis
from unique_asr.models.sources import locate_model
from unique_asr.transcript import Segment, Word


class JsonLinesStore:
    """Values by key in a JSON lines file that only grows; of several values of a key the last one counts.

    Args:
        folder: where the file is; it is created with the first value.
        settings: what the values depend on. Their fingerprint names the file.
        resume: read the values that the file has already.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        self.path = folder / f"{make_fingerprint(settings)}.jsonl"
        self._settings = settings
        self._known = self._read() if resume and self.path.is_file() else {}

    def _read(self) -> dict[str, Any]:
        known = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that was cut off
            if "key" in row:
                known[row["key"]] = row["value"]
        return known

    def get(self, key: str) -> Any | None:
        """Look up the value of a key; None if there is none."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Append a value to the file at once. Values that JSON does not have are written as strings."""
        self._known[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:  # one write a value: other processes may append too
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            lines = [] if size else [{"settings": self._settings}]
            text = "\n" if size and file.read(1) != b"\n" else ""  # the last line was cut off
            for line in (*lines, {"key": key, "value": value}):
                text += json.dumps(line, ensure_ascii=False, default=str) + "\n"
            file.write(text.encode())


class Decodings:
    """Hypotheses by recording, kept in a `JsonLinesStore`, whose arguments these are."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        self.store = JsonLinesStore(folder, settings, resume)

    def get(self, recording: Recording) -> Hypothesis | None:
        """Look up the hypothesis of a recording; None if it was not decoded.

        Raises:
            FileNotFoundError: the audio of the recording is gone.
        """
        value = self.store.get(make_recording_key(recording))
        if value is None:
            return None
        return Hypothesis(**{**value, "segments": [unpack_segment(segment) for segment in value["segments"]]})

    def put(self, recording: Recording, hypothesis: Hypothesis) -> None:
        """Write a hypothesis to the file."""
        value = asdict(hypothesis)
        value["segments"] = [pack_segment(segment) for segment in value["segments"]]
        self.store.put(make_recording_key(recording), value)


def pack_segment(segment: dict[str, Any]) -> dict[str, Any]:
    """Make a list [text, start, end, confidence] of each word, to the millisecond: a third of the bytes."""
    words = [[_round(value) for value in word.values()] for word in segment["words"]]
    return {name: _round(value) for name, value in segment.items()} | {"words": words}


def unpack_segment(segment: dict[str, Any]) -> Segment:
    """Read what `pack_segment` made."""
    return Segment(**segment | {"words": [Word(*word) for word in segment["words"]]})


def _round(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def make_fingerprint(settings: Any) -> str:
    """Hash settings that JSON can write; what it cannot write counts as its string. 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_recording_key(recording: Recording) -> str:
    """Hash the audio of a recording. Its text is left out: it may be corrected without decoding again.

    Raises:
        FileNotFoundError: the audio is gone.
    """
    spans = [f"{digest_file(span.path)}@{span.start:.4f}-{span.end:.4f}" for span in recording.spans]
    return hashlib.sha256("\n".join(spans).encode()).hexdigest()


def identify_weights(model: str | Path) -> str | list[str]:
    """Say which weights a model has.

    Args:
        model: the name of a shipped model, a folder, a file, or a hub id.

    Returns:
        The digests of the files with weights, or the name of what is no folder or file here.
    """
    path = Path(locate_model(model)[0])
    if path.is_file():
        return digest_file(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return [digest_file(file) for file in files] or str(model)


def digest_file(path: Path | str) -> str:
    """Hash the bytes of a file, once for each time that it was changed. 16 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file; audio_filepath is relative to its manifest")
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
