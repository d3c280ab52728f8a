"""What the page's player plays, where the recording itself would be out of step with its transcript."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from unique_asr.audio import SAMPLE_RATE, AudioError, AudioFile

IN_STEP = 0.05  # s of silence that stand for what a file lacks, and that nobody notices


def write_heard(recording: Path, padded: float, path: Path) -> None:
    """Write what the model heard as FLAC, if a browser may play something else; nothing, if that cannot be written.

    A browser plays the track that it chooses, and leaves out holes and the time before the sound begins.

    Args:
        padded: seconds of silence that stand for what the recording lacks.
        path: of the FLAC file.
    """
    partial = path.with_suffix(".part")
    with suppress(AudioError, OSError, av.error.FFmpegError):
        source = AudioFile(recording)
        if padded <= IN_STEP and source.tracks == 1:
            return
        with av.open(str(partial), "w", format="flac") as output:
            stream, position = output.add_stream("flac", rate=SAMPLE_RATE, layout="mono"), 0
            for block in source.blocks():
                samples = np.round(block.clip(-1, 1) * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
                frame.sample_rate, frame.pts = SAMPLE_RATE, position
                position += len(samples)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        partial.replace(path)
    partial.unlink(missing_ok=True)
