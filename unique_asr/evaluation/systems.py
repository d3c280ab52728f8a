"""The systems that the harness compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..data import Recording
from .harness import Hypothesis


class Whisper:
    """Whisper itself through faster-whisper, the reference: greedy, 8 bit, English, no voice activity detection.

    model: a folder of CTranslate2 files or a name that faster-whisper knows. Recordings longer than 30 s are decoded
    window after window as Whisper does; no window sees the text before it, which avoids Whisper's loops.
    """

    def __init__(self, model: str, device: str = "auto", compute_type: str = "int8", threads: int = 0):
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise ImportError("the Whisper reference needs faster-whisper: pip install faster-whisper") from None
        self.name = "whisper"
        self.model = WhisperModel(model, device=device, compute_type=compute_type, cpu_threads=threads)

    def transcribe(self, recordings: Iterable[Recording]) -> Iterator[Hypothesis]:
        for recording in recordings:
            segments, info = self.model.transcribe(
                recording.audio(),
                language="en",
                beam_size=1,
                temperature=0.0,
                condition_on_previous_text=False,
                vad_filter=False,
            )
            segments = list(segments)
            end = min(segments[-1].end, info.duration) if segments else 0.0
            yield Hypothesis(
                text=" ".join(segment.text.strip() for segment in segments),
                coverage=end / max(info.duration, 1e-9),
            )
