"""Recordings that are encoded once and shared by the systems of one speech LLM, its threads and other runs."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from unique_asr.data import Recording
from unique_asr.evaluation.decodings import recording_key
from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.speech_llm.fingerprint import hearing_fingerprint
from unique_asr.models.speech_llm.listener import CAPTURED
from unique_asr.models.speech_llm.modeling import EncodedAudio, concatenate, prefetched


class Encoder:
    """Encodes each recording once, for several systems.

    Args:
        keep: whether an encoded recording stays in memory for the next system.
        folder: keeps it for other runs too, of models that hear the same; of several that run now one encodes, and the
            others wait for it.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        keep: bool = True,
        folder: Path | None = None,
    ) -> None:
        self.model, self.processor, self.keep = model, processor, keep
        self.folder = None if folder is None else folder / hearing_fingerprint(model)
        self._encoded: dict[Recording, tuple[EncodedAudio, float]] = {}
        self._lock = threading.Lock()

    def share(self) -> Encoder:
        """Return an encoder for another thread with the same recordings: a tokenizer serves one thread at a time."""
        other = copy.copy(self)
        other.processor = copy.deepcopy(self.processor)
        return other

    def __call__(self, recording: Recording) -> tuple[EncodedAudio, float]:
        """Return the encoded recording, and the seconds that encoding took when it was done."""
        with self._lock_all():
            if not self._has(recording):
                started = time.perf_counter()
                encoded = self.model.encode(recording.blocks(), self.processor)
                encoded.best.sum().item()  # wait for the device
                self._put(recording, encoded, time.perf_counter() - started)
        return self._encoded[recording] if self.keep else self._encoded.pop(recording)

    def encode_together(self, recordings: Sequence[Recording], windows: int | None = None) -> None:
        """Encode recordings `windows` windows at a time, whichever they are of, and keep what was encoded.

        Args:
            windows: None: as many as the listener reads in a CUDA graph, 4 on a CPU.
        """
        with self._lock_all():
            fresh = [each for each in recordings if not self._has(each)]
            if fresh:
                self._encode(fresh, windows or (CAPTURED if self._on_gpu else 4))

    def _encode(self, fresh: Sequence[Recording], windows: int) -> None:
        started, kept = time.perf_counter(), []
        batches = self.processor.window_batches(self._windows(fresh, kept), windows)
        with torch.no_grad():
            joined = concatenate(
                [
                    self.model.join_windows(self.model.encode_windows(batch.features), batch.spans, batch.duration)
                    for batch in (prefetched(batches) if self._on_gpu else batches)
                ]
            )
        start, seconds = 0, (time.perf_counter() - started) / len(fresh)
        for recording, (frames, duration) in zip(fresh, kept, strict=True):
            self._put(recording, replace(joined.slice(start, start + frames), duration=duration), seconds)
            start += frames

    def _windows(
        self, recordings: Sequence[Recording], kept: list[tuple[int, float]]
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """Those of all recordings; `kept` gets the frames and the seconds of each recording."""
        for recording in recordings:
            frames, seconds = 0, 0.0
            for window in self.processor.windows(recording.blocks()):
                frames, seconds = frames + window[2] - window[1], seconds + self.processor.kept_seconds([window])
                yield window
            kept.append((frames, seconds))

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    @contextmanager
    def _lock_all(self) -> Iterator[None]:
        """Keep out other threads, and processes with the same folder; at the end, every stream has what was encoded."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock, nullcontext() if self.folder is None else FileLock(self.folder / "lock"):
            yield
            if self._on_gpu:
                torch.cuda.current_stream(self.model.device).synchronize()

    def _file(self, recording: Recording) -> Path:
        return self.folder / f"{recording_key(recording)}.pt"

    def _has(self, recording: Recording) -> bool:
        if recording not in self._encoded and self.folder is not None and self._file(recording).is_file():
            encoded, seconds = torch.load(self._file(recording), map_location=self.model.device, weights_only=True)
            self._encoded[recording] = EncodedAudio(**encoded), seconds
        return recording in self._encoded

    def _put(self, recording: Recording, encoded: EncodedAudio, seconds: float) -> None:
        self._encoded[recording] = encoded, seconds
        if self.folder is not None:
            part = self._file(recording).with_suffix(f".{os.getpid()}")
            # Slices share the storage of the whole batch, which would be saved with each of them.
            values = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in vars(encoded).items()}
            torch.save((values, seconds), part)
            part.replace(self._file(recording))
