"""What was decoded, kept for the next run: one JSONL file for each system, in the folder of the results.

    decodings = Decodings(folder, {"system": "unique-512", "attention": {...}, "model": "default"})
    decodings.get(recording)  # a Hypothesis, or None

Everything that may change the text is in the settings, whose fingerprint names the file. A file that ends in the middle
of a line, as a killed run leaves it, loses that line only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import Recording
from ..transcript import Segment
from .harness import Hypothesis


class Rows:
    """Values by key, JSON in a file; `put` writes them at once."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._known = self._read() if resume and self.path.is_file() else {}
        lines = [{"settings": settings}, *({"key": key, "value": value} for key, value in self._known.items())]
        written = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(written, encoding="utf-8")
        fresh.replace(self.path)

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
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")


class Decodings:
    """Hypotheses by recording."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True) -> None:
        self.rows = Rows(folder, settings, resume)

    def get(self, recording: Recording) -> Hypothesis | None:
        value = self.rows.get(recording_key(recording))
        if value is None:
            return None
        return Hypothesis(**{**value, "segments": [Segment.from_dict(segment) for segment in value["segments"]]})

    def put(self, recording: Recording, hypothesis: Hypothesis) -> None:
        self.rows.put(recording_key(recording), asdict(hypothesis))


def recording_key(recording: Recording) -> str:
    """Of the audio alone: the text may be corrected without decoding again."""
    spans = [f"{span.path.resolve()}@{span.start:.4f}-{span.end:.4f}" for span in recording.spans]
    return hashlib.sha256("\n".join(spans).encode()).hexdigest()
