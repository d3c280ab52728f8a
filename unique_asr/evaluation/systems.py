"""The systems that the harness compares. Those of one speech LLM share its encoded recordings."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import Recording
from ..models.modeling import EncodedAudio, concatenate
from .harness import Hypothesis

if TYPE_CHECKING:
    from ..attention import SparseAttentionConfig, SparsityStatistics
    from ..batch_decoding import BatchDecoder
    from ..longform import LongformReport, LongformTranscriber
    from ..models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from ..transcript import Segment
    from .methods import Sliding


class Encoder:
    """Encodes each recording once, and keeps the result for the next system unless `keep` is False."""

    def __init__(
        self, model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, keep: bool = True
    ) -> None:
        self.model, self.processor, self.keep = model, processor, keep
        self._encoded: dict[Recording, tuple[EncodedAudio, float]] = {}

    def __call__(self, recording: Recording) -> tuple[EncodedAudio, float]:
        """The encoded recording, and the seconds that encoding took when it was done."""
        if recording in self._encoded:
            return self._encoded[recording]
        started = time.perf_counter()
        encoded = self.model.encode(recording.blocks(), self.processor)
        encoded.best.sum().item()  # wait for the device
        result = encoded, time.perf_counter() - started
        if self.keep:
            self._encoded[recording] = result
        return result

    def together(self, recordings: Sequence[Recording], windows: int = 64) -> None:
        """Encode recordings `windows` windows at a time, whichever they are of, and keep what was encoded."""
        if not self.keep:
            self._encoded.clear()
        started, fresh = time.perf_counter(), [each for each in recordings if each not in self._encoded]
        cut = [list(self.processor.windows(recording.blocks())) for recording in fresh]
        flat = [window for of_one in cut for window in of_one]
        parts = [self._joined(flat[first : first + windows]) for first in range(0, len(flat), windows)]
        joined, start = concatenate(parts) if parts else None, 0
        seconds = (time.perf_counter() - started) / max(len(fresh), 1)
        for recording, of_one in zip(fresh, cut, strict=True):
            end = start + sum(last - first for _, first, last in of_one)
            own = replace(joined.slice(start, end), duration=self.processor.kept_seconds(of_one))
            self._encoded[recording], start = (own, seconds), end

    def _joined(self, windows: Sequence[tuple[np.ndarray, int, int]]) -> EncodedAudio:
        """Windows as if they were of one recording."""
        batch = self.processor.window_batch(windows)
        with torch.no_grad():
            return self.model.join_windows(self.model.encode_windows(batch.features), batch.spans, batch.duration)


class SpeechLLM:
    """A speech LLM as users run it: one pass where the text covers the speech, continuation where it does not.

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
        sliding: Sliding | None = None,
    ) -> None:
        self.name, self.encoder, self.attention, self.sliding = name, encoder, attention, sliding
        self.prompt, self.max_pass_seconds, self.prefill_chunk = prompt, max_pass_seconds, prefill_chunk

    def transcriber(self) -> LongformTranscriber:
        from ..longform import LongformConfig, LongformTranscriber

        config = LongformConfig(max_pass_seconds=self.max_pass_seconds)
        return LongformTranscriber(self.encoder.model, self.encoder.processor, config, prompt=self.prompt)

    def transcribe(self, recordings: Iterable[Recording]) -> Iterator[Hypothesis]:
        from ..decoding import GreedyDecoder
        from ..longform import LongformReport
        from .methods import RivalConfig, rivals_active

        transcriber, model = self.transcriber(), self.encoder.model
        # One decoder for all recordings: its memory and CUDA graphs are kept.
        static = False if isinstance(self.attention, RivalConfig) else None
        decoder = GreedyDecoder(model.language_model, self.attention, prefill_chunk=self.prefill_chunk, static=static)
        for recording in recordings:
            encoded, encode_seconds = self.encoder(recording)
            started, before = time.perf_counter(), decoder.statistics.to_dict()
            decoder.capacity = max(decoder.capacity, transcriber.capacity(encoded))
            report = LongformReport()
            with rivals_active():
                if self.sliding is None:
                    segments = list(transcriber.transcribe(encoded, decoder, report))
                else:
                    segments = list(self.sliding.transcribe(transcriber, encoded, decoder, report))
            counted = _counted(before, decoder.statistics)
            seconds = encode_seconds + time.perf_counter() - started
            yield _hypothesis(segments, report, counted, seconds, report.timings["decode"])


class PretrainedLLM:
    """A speech LLM of transformers that has an adapter (`unique_asr.models.adapters`), in passes as users run it."""

    def __init__(
        self,
        name: str,
        model: tuple[Any, Any],
        attention: SparseAttentionConfig,
        prompt: str | None = None,
        max_pass_seconds: float | None = None,
        prefill_chunk: int = 2048,
    ) -> None:
        self.name, self.model, self.attention, self.prompt = name, model, attention, prompt
        self.max_pass_seconds, self.prefill_chunk = max_pass_seconds, prefill_chunk

    def transcribe(self, recordings: Iterable[Recording]) -> Iterator[Hypothesis]:
        from ..models.adapters import make_transcriber
        from .methods import RivalConfig, rivals_active

        options = {"max_pass_seconds": self.max_pass_seconds, "prefill_chunk": self.prefill_chunk}
        transcriber = make_transcriber(self.model, attention=self.attention, **options)
        if isinstance(self.attention, RivalConfig):
            transcriber.decoder.static = False
        for recording in recordings:
            started = time.perf_counter()
            with rivals_active():
                segments, info = transcriber.transcribe(recording.audio(), prompt=self.prompt)
                segments = list(segments)
            yield Hypothesis(
                text=" ".join(segment.text.strip() for segment in segments),
                stop_reason=info.stop_reason,
                coverage=info.coverage,
                passes=info.passes,
                sparsity={key: value for key, value in info.sparsity.items() if key != "share_of_pages_read"},
                segments=segments,
                seconds=time.perf_counter() - started,
                tokens=info.sparsity.get("steps", 0),
                decode_seconds=info.timings.get("decode", 0.0),
            )


class BatchedSpeechLLM(SpeechLLM):
    """The same for `batch` recordings at a time: one decode step writes a token for each of them.

    Their windows are encoded together; times are shares of the batch's.
    """

    def __init__(self, *args: Any, batch: int = 16, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batch = batch

    def transcribe(self, recordings: Iterable[Recording]) -> Iterator[Hypothesis]:
        from ..batch import interleave
        from ..batch_decoding import BatchDecoder

        transcriber = self.transcriber()
        decoder = BatchDecoder(self.encoder.model.language_model, self.attention, self.prefill_chunk)
        remaining = iter(recordings)
        while group := list(islice(remaining, self.batch)):
            self.encoder.together(group)
            started = time.perf_counter()
            tasks = (self._transcribed(recording, transcriber, decoder) for recording in group)
            found = dict(interleave(tasks, self.batch, decoder.step))
            share = (time.perf_counter() - started) / len(group)
            for _, hypothesis in sorted(found.items()):
                yield replace(hypothesis, seconds=hypothesis.seconds + share)

    def _transcribed(
        self, recording: Recording, transcriber: LongformTranscriber, decoder: BatchDecoder
    ) -> Generator[None, None, Hypothesis]:
        """Yields where the batch has to make a step; the seconds are those of encoding."""
        from ..longform import LongformReport

        encoded, encode_seconds = self.encoder(recording)
        row, report, segments = decoder.row(), LongformReport(), []
        try:
            for segment in transcriber.transcribe(encoded, row, report):
                if segment is None:
                    yield
                else:
                    segments.append(segment)
        finally:
            decoder.remove(row)
        return _hypothesis(segments, report, _counts(row.statistics), encode_seconds, row.seconds["decode"])


class GreedyCTC:
    """The CTC head's best path: what the encoder and the projector hear, before the LLM."""

    name = "ctc"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def transcribe(self, recordings: Iterable[Recording]) -> Iterator[Hypothesis]:
        blank, tokenizer = self.encoder.model.config.blank_id, self.encoder.processor.tokenizer
        for recording in recordings:
            encoded, seconds = self.encoder(recording)
            ids = [token for token, _ in groupby(encoded.best.tolist()) if token != blank]
            yield Hypothesis(text=tokenizer.decode(ids).strip(), seconds=seconds)


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


def _hypothesis(
    segments: list[Segment], report: LongformReport, counted: dict[str, Any], seconds: float, decode_seconds: float
) -> Hypothesis:
    return Hypothesis(
        text=" ".join(segment.text.strip() for segment in segments),
        stop_reason=report.stop_reason,
        coverage=report.coverage,
        passes=report.passes,
        sparsity=counted,
        segments=segments,
        seconds=seconds,
        tokens=counted["steps"],
        decode_seconds=decode_seconds,
    )


def _counts(statistics: SparsityStatistics) -> dict[str, Any]:
    """Without the share of pages, which is computed from sums."""
    return {name: value for name, value in statistics.to_dict().items() if name != "share_of_pages_read"}


def _counted(before: dict[str, Any], statistics: SparsityStatistics) -> dict[str, Any]:
    """What was counted since `before`."""
    return {name: value - before[name] for name, value in _counts(statistics).items()}
