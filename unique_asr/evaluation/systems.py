"""The systems that the harness compares. Those of one speech LLM share its encoded recordings."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from unique_asr.attention.huggingface import resolve_combine
from unique_asr.data import Recording
from unique_asr.decoding.engine import PENDING, open_sequences
from unique_asr.evaluation.decodings import make_recording_key
from unique_asr.evaluation.harness import System
from unique_asr.evaluation.methods import rivals_active
from unique_asr.evaluation.results import Hypothesis
from unique_asr.models.speech_llm.fingerprint import compute_hearing_fingerprint
from unique_asr.models.speech_llm.listener import MAX_CAPTURED_WINDOWS
from unique_asr.models.speech_llm.modeling import EncodedAudio, concatenate, prefetch

if TYPE_CHECKING:
    from unique_asr.attention import SparseAttentionConfig, SparsityCounters
    from unique_asr.decoding.batch import BatchEngine
    from unique_asr.evaluation.methods import Sliding
    from unique_asr.longform.passes import LongformReport, LongformTranscriber
    from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from unique_asr.transcript import Segment


class Encoder:
    """Encodes each recording once, and keeps the result for the next system unless `keep` is False.

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
        self.folder = None if folder is None else folder / compute_hearing_fingerprint(model)
        self._encoded: dict[Recording, tuple[EncodedAudio, float]] = {}
        self._lock = threading.Lock()

    def shared(self) -> Encoder:
        """The same for another thread: a tokenizer serves one at a time."""
        other = copy.copy(self)
        other.processor = copy.deepcopy(self.processor)
        return other

    def __call__(self, recording: Recording) -> tuple[EncodedAudio, float]:
        """The encoded recording, and the seconds that encoding took when it was done."""
        with self._alone():
            if not self._has(recording):
                started = time.perf_counter()
                encoded = self.model.encode(recording.blocks(), self.processor)
                encoded.best.sum().item()  # wait for the device
                self._put(recording, encoded, time.perf_counter() - started)
        return self._encoded[recording] if self.keep else self._encoded.pop(recording)

    def together(self, recordings: Sequence[Recording], windows: int | None = None) -> None:
        """Encode recordings `windows` windows at a time, whichever they are of, and keep what was encoded.

        windows: None: as many as the listener reads in a CUDA graph, 4 on a CPU.
        """
        with self._alone():
            fresh = [each for each in recordings if not self._has(each)]
            if fresh:
                self._encode(fresh, windows or (MAX_CAPTURED_WINDOWS if self._on_gpu else 4))

    def _encode(self, fresh: Sequence[Recording], windows: int) -> None:
        started, kept = time.perf_counter(), []
        batches = self.processor.batch_windows(self._windows(fresh, kept), windows)
        with torch.no_grad():
            joined = concatenate(
                [
                    self.model.join_windows(self.model.encode_windows(batch.features), batch.spans, batch.duration)
                    for batch in (prefetch(batches) if self._on_gpu else batches)
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
            for window in self.processor.cut_windows(recording.blocks()):
                frames, seconds = frames + window[2] - window[1], seconds + self.processor.count_kept_seconds([window])
                yield window
            kept.append((frames, seconds))

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of all threads, and with a folder of all processes; what was encoded is there for every stream then."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock, nullcontext() if self.folder is None else FileLock(self.folder / "lock"):
            yield
            if self._on_gpu:
                torch.cuda.current_stream(self.model.device).synchronize()

    def _file(self, recording: Recording) -> Path:
        return self.folder / f"{make_recording_key(recording)}.pt"

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


class SpeechLLM:
    """A speech LLM as users run it: one pass where the text covers the speech, continuation where it does not.

    chunk_seconds: passes are at most as long, however long `max_pass_seconds` lets them be.
    sliding: short windows and a stitched text instead.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        attention: SparseAttentionConfig,
        prompt: str | None = None,
        max_pass_seconds: float | None = None,
        prefill_chunk: int = 2048,
        chunk_seconds: float | None = None,
        sliding: Sliding | None = None,
    ) -> None:
        self.name, self.encoder, self.attention, self.sliding = name, encoder, attention, sliding
        self.prompt, self.max_pass_seconds, self.prefill_chunk = prompt, max_pass_seconds, prefill_chunk
        if chunk_seconds is not None:
            self.max_pass_seconds = min(chunk_seconds, max_pass_seconds or encoder.model.config.max_pass_seconds)

    def transcriber(self, kind: type[LongformTranscriber] | None = None) -> LongformTranscriber:
        from unique_asr.longform.passes import LongformConfig, LongformTranscriber

        config = LongformConfig(max_pass_seconds=self.max_pass_seconds)
        kind = kind or LongformTranscriber
        return kind(self.encoder.model, self.encoder.processor, config, prompt=self.prompt)

    def segments(
        self, transcriber: LongformTranscriber, encoded: EncodedAudio, decoder: Any, report: LongformReport
    ) -> Iterator[Segment | None]:
        if self.sliding is not None:
            return self.sliding.transcribe(transcriber, encoded, decoder, report)
        return transcriber.transcribe(encoded, decoder, report)

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        from unique_asr.decoding.greedy import GreedyDecoder
        from unique_asr.longform.passes import LongformReport

        transcriber, model = self.transcriber(), self.encoder.model
        # One decoder for all recordings: its memory and CUDA graphs are kept.
        attention = resolve_combine(self.attention, model)
        decoder = GreedyDecoder(model.language_model, attention, prefill_chunk=self.prefill_chunk)
        for index, recording in enumerate(recordings):
            encoded, encode_seconds = self.encoder(recording)
            started, before = time.perf_counter(), decoder.counters.copy()
            decoder.capacity = max(decoder.capacity, transcriber.capacity(encoded))
            report = LongformReport()
            with rivals_active():
                segments = list(self.segments(transcriber, encoded, decoder, report))
            counted = decoder.counters.since(before)
            seconds = encode_seconds + time.perf_counter() - started
            yield index, _hypothesis(segments, report, counted, seconds, report.timings["decode"])


class PretrainedLLM:
    """A known speech LLM (`unique_asr.models.pretrained`), in passes as users run it."""

    def __init__(
        self,
        name: str,
        model: tuple[Any, Any],
        attention: SparseAttentionConfig,
        prompt: str | None = None,
        max_pass_seconds: float | None = None,
        prefill_chunk: int = 2048,
        chunk_seconds: float | None = None,
    ) -> None:
        from unique_asr.models.pretrained import find

        self.name, self.model, self.attention, self.prompt = name, model, attention, prompt
        self.max_pass_seconds, self.prefill_chunk = max_pass_seconds, prefill_chunk
        if chunk_seconds is not None:
            self.max_pass_seconds = min(chunk_seconds, max_pass_seconds or find(model[0]).pass_seconds)

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        from unique_asr.transcribers import make_transcriber

        options = {"max_pass_seconds": self.max_pass_seconds, "prefill_chunk": self.prefill_chunk}
        transcriber = make_transcriber(self.model, attention=self.attention, **options)
        for index, recording in enumerate(recordings):
            started = time.perf_counter()
            with rivals_active():
                segments, info = transcriber.transcribe(recording.audio(), prompt=self.prompt)
                segments = list(segments)
            yield (
                index,
                Hypothesis(
                    text=" ".join(segment.text.strip() for segment in segments),
                    stop_reason=info.stop_reason,
                    coverage=info.coverage,
                    passes=info.passes,
                    sparsity={key: value for key, value in info.sparsity.items() if key != "share_of_pages_read"},
                    segments=segments,
                    seconds=time.perf_counter() - started,
                    tokens=info.sparsity.get("steps", 0),
                    decode_seconds=info.timings.get("decode", 0.0),
                ),
            )


class BatchedSpeechLLM(SpeechLLM):
    """The same for `batch` recordings at a time: one decode step writes a token for each of them.

    One begins where another has ended. The windows of the next `batch` are encoded together; times are those of the
    batch, counted once.
    """

    def __init__(self, *args: Any, batch: int = 16, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batch = batch

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        from unique_asr.decoding.batch import BatchEngine
        from unique_asr.transcribers.batch import interleave

        transcriber = self.transcriber()
        model = self.encoder.model
        # Rivals and dense attention read the whole cache for every place, and the longest recordings go on for long.
        decoder = BatchEngine(
            model.language_model, resolve_combine(self.attention, model), self.prefill_chunk, spare_places=2
        )
        heard = 0.0  # seconds of hearing since the last hypothesis, which the recordings count themselves

        def begun() -> Iterator[Generator[None, None, Hypothesis]]:
            nonlocal heard
            for first in range(0, len(recordings), self.batch):
                group, started = recordings[first : first + self.batch], time.perf_counter()
                self.encoder.together(group)
                heard += time.perf_counter() - started
                yield from (self._transcribed(recording, transcriber, decoder) for recording in group)

        last = time.perf_counter()
        with rivals_active():
            for index, hypothesis in interleave(begun(), self.batch, decoder.step):
                now = time.perf_counter()
                yield index, replace(hypothesis, seconds=hypothesis.seconds + now - last - heard)
                last, heard = now, 0.0

    def _transcribed(
        self, recording: Recording, transcriber: LongformTranscriber, decoder: BatchEngine
    ) -> Generator[None, None, Hypothesis]:
        """Yields where the batch has to make a step; the seconds are those of encoding."""
        from unique_asr.longform.passes import LongformReport

        encoded, encode_seconds = self.encoder(recording)
        row, report, segments = decoder.new_sequence(), LongformReport(), []
        try:
            for segment in self.segments(transcriber, encoded, row, report):
                if segment is PENDING:
                    yield PENDING
                else:
                    segments.append(segment)
        finally:
            decoder.remove(row)
        return _hypothesis(segments, report, row.counters, encode_seconds, row.engine_seconds["decode"])


class ParallelSpeechLLM(SpeechLLM):
    """The same with `passes` passes over each recording decoded side by side."""

    def __init__(self, *args: Any, passes: int = 8, **options: Any) -> None:
        super().__init__(*args, **options)
        self.passes = passes

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        from unique_asr.decoding.batch import BatchEngine
        from unique_asr.longform.parallel import ParallelTranscriber
        from unique_asr.longform.passes import LongformReport

        transcriber, model = self.transcriber(ParallelTranscriber), self.encoder.model
        batch = BatchEngine(model.language_model, resolve_combine(self.attention, model), self.prefill_chunk)
        for index, recording in enumerate(recordings):
            encoded, encode_seconds = self.encoder(recording)
            started, report, segments = time.perf_counter(), LongformReport(), []
            with rivals_active(), open_sequences(batch, self.passes) as rows:
                for segment in transcriber.transcribe(encoded, rows, report):
                    if segment is PENDING:
                        batch.step()
                    else:
                        segments.append(segment)
            seconds = encode_seconds + time.perf_counter() - started
            yield index, _hypothesis(segments, report, rows.counters, seconds, rows.engine_seconds["decode"])


class Deferred:
    """A system that is made, with its model, when there is a recording to decode."""

    def __init__(self, name: str, make: Callable[[], System]) -> None:
        self.name, self.make = name, make

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        yield from self.make().transcribe(recordings)


class GreedyCTC:
    """The CTC head's best path: what the encoder and the projector hear, before the LLM."""

    name = "ctc"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        blank, tokenizer = self.encoder.model.config.blank_id, self.encoder.processor.tokenizer
        for index, recording in enumerate(recordings):
            encoded, seconds = self.encoder(recording)
            ids = [token for token, _ in groupby(encoded.best.tolist()) if token != blank]
            yield index, Hypothesis(text=tokenizer.decode(ids).strip(), seconds=seconds)


class Whisper:
    """Whisper itself through faster-whisper, the reference: greedy, 8 bit, English, no voice activity detection.

    model: a folder of CTranslate2 files or a name that faster-whisper knows. Recordings longer than 30 s are decoded
    window after window as Whisper does; no window sees the text before it, which avoids Whisper's loops.
    """

    name = "whisper"

    def __init__(self, model: str, device: str = "auto", compute_type: str = "int8", threads: int = 0) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise ImportError("the Whisper reference needs faster-whisper: pip install faster-whisper") from None
        self.model = WhisperModel(model, device=device, compute_type=compute_type, cpu_threads=threads)

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        for index, recording in enumerate(recordings):
            started = time.perf_counter()
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
            yield (
                index,
                Hypothesis(
                    text=" ".join(segment.text.strip() for segment in segments),
                    coverage=end / max(info.duration, 1e-9),
                    seconds=time.perf_counter() - started,
                ),
            )


def _hypothesis(
    segments: list[Segment], report: LongformReport, counted: SparsityCounters, seconds: float, decode_seconds: float
) -> Hypothesis:
    return Hypothesis(
        text=" ".join(segment.text.strip() for segment in segments),
        stop_reason=report.stop_reason,
        coverage=report.coverage,
        passes=report.passes,
        broken=report.broken,
        longest=report.longest,
        sparsity=vars(counted.copy()),
        segments=segments,
        seconds=seconds,
        tokens=counted.steps,
        decode_seconds=decode_seconds,
    )
