"""A small manifest on disk."""

import json

import numpy as np
import pytest
import soundfile

SEGMENTS = {
    "first.wav": [
        {"start": 0.0, "end": 1.5, "text": "the cat sat", "cased": "The cat sat.", "match": 1.0},
        {"start": 1.5, "end": 2.25, "text": "on a mat", "cased": None, "match": 0.9},
        {"start": 2.5, "end": 4.0, "text": "it's ten o'clock", "cased": "It's ten o'clock!"},
    ],
    "second.wav": [{"start": 0.25, "end": 2.0, "text": "Mr. Bell, the baker", "match": 0.5}],
}


@pytest.fixture
def write_manifest(tmp_path):
    """Writes a manifest and noise for its files: {file: its segments} and the fields of every row."""

    def write(segments=SEGMENTS, seconds=4.0, name="train.jsonl", rate=16000, **fields):
        rows = []
        for number, (file, found) in enumerate(segments.items()):
            samples = np.random.default_rng(number).normal(0, 3000, int(seconds * rate)).astype(np.int16)
            soundfile.write(tmp_path / file, samples, rate)
            row = {"audio_filepath": file, "duration": seconds, "source": "news", "segments": found}
            rows.append({**row, **fields})
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
