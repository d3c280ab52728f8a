"""What every transcriber has in common: a model in memory with its settings, and recordings in, segments out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Self

import numpy as np

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.huggingface import resolve_combine
from unique_asr.audio import SAMPLE_RATE, AudioFile, check_part, check_vad, filter_speech
from unique_asr.decoding.engine import Engine, Pending, Sequence
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.page_reads import PageReads
from unique_asr.transcript import Progress, Segment, TranscriptionInfo, Unfinished, text_settings

Audio = str | PathLike[str] | np.ndarray  # a file, or samples [N] at 16 kHz


class PipelineError(ValueError):
    """A transcription that cannot start or go on; the message is one line and names the remedy."""


class Transcriber(ABC):
    """A speech LLM in memory and its settings; `unique_asr.transcribers.make_transcriber` chooses the subclass.

        transcriber = make_transcriber("default", budget=512)
        segments, info = transcriber.transcribe("talk.m4a")

    Attributes:
        name: of the model, as it was asked for.
        attention: how decode steps read the KV cache.
        languages: codes of the languages that the model can be told.
        records_reads: whether `transcribe` takes `reads`.

    Args:
        model: a name, a folder, a hub id, or a (model, processor) pair.
        loader: called as loader(model, device, dtype) for anything but a pair; returns one.
        attention, budget, device, dtype, progress: see `unique_asr.transcribe`.
        max_pass_seconds: the longest audio that the LLM gets at once; None: what suits the model.
        prefill_chunk: positions that the LLM reads at once, which bounds the memory of the prefill.

    Raises:
        ValueError: if a setting or the model cannot be used, in one line.
    """

    records_reads = False
    languages: tuple[str, ...] = ()

    def __init__(
        self,
        model: str | PathLike[str] | tuple[Any, Any],
        loader: Callable[..., tuple[Any, Any]],
        attention: str | SparseAttentionConfig,
        budget: int | None,
        device: str,
        dtype: str,
        max_pass_seconds: float | None,
        prefill_chunk: int,
        progress: Progress | None,
    ) -> None:
        self.attention = make_attention_config(attention, budget)
        if max_pass_seconds is not None and max_pass_seconds <= 0:
            raise PipelineError(f"max_pass_seconds={max_pass_seconds}: give a positive number of seconds")
        self.max_pass_seconds, self.prefill_chunk = max_pass_seconds, prefill_chunk
        begin = time.perf_counter()
        if isinstance(model, tuple):
            self.name = getattr(model[0].config, "name_or_path", "") or type(model[0]).__name__
            self.model, self.processor = model
        else:
            self.name = str(model)
            if progress:
                progress("load", 0, 1)
            self.model, self.processor = loader(model, device, dtype)
            if progress:
                progress("load", 1, 1)
        self.attention = resolve_combine(self.attention, self.model)
        self.load_seconds = time.perf_counter() - begin

    @abstractmethod
    def transcribe(
        self,
        audio: Audio | AudioFile | Samples,
        *,
        prompt: str | None = None,
        language: str | None = None,
        hotwords: str | None = None,
        progress: Progress | None = None,
        unfinished: Unfinished | None = None,
        on_pass: Callable[[dict[str, Any]], None] | None = None,
        sequence: Sequence | None = None,
        reads: PageReads | None = None,
    ) -> tuple[Iterator[Segment | Pending], TranscriptionInfo]:
        """Transcribe one recording.

        Args:
            prompt, language, hotwords, progress, reads: see `unique_asr.transcribe`.
            on_pass: called with a state, for JSON, whenever a pass of the LLM begins.
            unfinished: such a state and the segments until then: gives the segments that were still to come.
            sequence: of the engine that decodes (`make_engine`); PENDING comes among the segments where the engine has
                to make a step. None: the transcriber decodes by itself, and nothing is ever pending.

        Returns:
            Segments as they are decoded, and how they were made, which is complete once they are exhausted.

        Raises:
            ValueError: at once if the model cannot be told what it is told; while segments are taken if the recording
                cannot be read, or does not fit into memory.
        """

    def transcribe_encoded(
        self,
        encoded: Any,
        *,
        name: str = "<encoded>",
        prompt: str | None = None,
        progress: Progress | None = None,
        sequence: Sequence | None = None,
        report: LongformReport | None = None,
    ) -> tuple[Iterator[Segment | Pending], TranscriptionInfo]:
        """Transcribe a recording that the model's encoder has heard already; see `transcribe`.

        Args:
            encoded: what the model's `encode` returns, or a slice of it; times count from its beginning.
            name: what errors call the recording.
            report: filled in with what the info does not tell: passes that broke off, and the longest pass.

        Raises:
            PipelineError: if models of this kind encode each pass by itself.
        """
        raise PipelineError(f"{self.name}: encodes each pass by itself; give it the recording")

    def with_attention(self, attention: SparseAttentionConfig) -> Self:
        """Return a transcriber with the same model in memory that reads its KV cache in another way."""
        other = copy(self)
        other.attention, other.load_seconds = resolve_combine(attention, self.model), 0.0
        other._prepare_decoding()
        return other

    def make_engine(self) -> Engine | None:
        """Return an engine that decodes recordings side by side; None if they have to go one by one."""
        return None

    @abstractmethod
    def _prepare_decoding(self) -> None:
        """Make what decodes with `self.attention`, and drop what decoded with another."""

    def _describe(
        self, audio: str, duration: float | None, language_model: Any, part: AudioPart, **told: str | None
    ) -> TranscriptionInfo:
        """What is known of a transcription before it begins; `told`: prompt, language and hotwords."""
        weight = language_model.get_input_embeddings().weight
        return TranscriptionInfo(
            audio=audio,
            duration=duration or 0.0,
            model=self.name,
            device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            attention=self.attention.to_dict(),
            settings=text_settings(max_pass_seconds=self.max_pass_seconds, **asdict(part), **told),
            timings={"load": self.load_seconds},
        )


@dataclass(frozen=True)
class AudioPart:
    """The part of a file that is transcribed; see `AudioFile`."""

    start: float = 0.0  # s
    end: float | None = None  # s
    channel: int | None = None
    vad: bool = False
    track: int | None = None

    @classmethod
    def of(cls, source: AudioFile | Samples) -> AudioPart:
        """Return the part that an opened source gives."""
        return cls(source.start, source.end, source.channel, source.vad, source.track)


PIECE = 30 * SAMPLE_RATE  # samples that are looked at at once
LOUDEST = 8.0  # of 1; floats beyond it are integers in disguise
INTEGERS = {np.dtype(np.int16): (0, 2.0**15), np.dtype(np.int32): (0, 2.0**31), np.dtype(np.uint8): (128, 2.0**7)}


class Samples:
    """An array of samples [N] at 16 kHz in the place of an `AudioFile`.

    Args:
        samples: floats, of which -1 and 1 are the loudest, or integers as WAV files hold them: int16, int32, or uint8
            around 128. NaN and infinity become silence, as in files.
        start, end: seconds between which the array is taken; times count from its beginning.
        channel, track: 1 or None; an array has one of each.
        vad: drop what is not speech.

    Raises:
        PipelineError: if the array has several channels, or its numbers are no sound.
        AudioError: if start and end do not fit.
    """

    name = "<array>"

    def __init__(
        self,
        samples: np.ndarray,
        vad: bool = False,
        start: float = 0.0,
        end: float | None = None,
        channel: int | None = None,
        track: int | None = None,
    ) -> None:
        if samples.ndim != 1:
            raise PipelineError(f"audio: give samples of one channel, [N], not an array of shape {samples.shape}")
        for option, value in (("channel", channel), ("track", track)):
            if value not in (None, 1):
                raise PipelineError(f"audio: an array has no {option}={value}, only 1")
        check_part(start, end)
        seconds = len(samples) / SAMPLE_RATE
        if start and start >= seconds:
            raise PipelineError(f"audio: start={start:g}, but the array ends after {seconds:.1f} s")
        self.start, self.end, self.channel, self.track = start, end, channel, track
        last = None if end is None else round(end * SAMPLE_RATE)
        self.samples = samples[round(start * SAMPLE_RATE) : last]
        check_samples(self.samples)
        self.duration = len(self.samples) / SAMPLE_RATE
        self.vad, self.dropped, self.padded = vad, 0.0, 0.0
        self.warnings: list[str] = []
        if vad:
            check_vad()

    def blocks(self, seconds: float = 30.0) -> Iterator[np.ndarray]:
        """Yield the samples in blocks [n], float32."""
        self.warnings = []
        yield from filter_speech(self._pieces(), seconds, self)

    def _pieces(self) -> Iterator[np.ndarray]:
        """Arrays of at most PIECE samples, float32 and finite."""
        zero, loudest = INTEGERS.get(self.samples.dtype.newbyteorder("="), (0, 1.0))
        for first in range(0, len(self.samples), PIECE):
            piece = self.samples[first : first + PIECE]
            if loudest != 1.0:
                yield ((piece.astype(np.float64) - zero) / loudest).astype(np.float32)
                continue
            piece = piece.astype(np.float32, copy=False)
            yield piece if np.isfinite(piece).all() else np.nan_to_num(piece, posinf=0.0, neginf=0.0)


def check_samples(samples: np.ndarray) -> None:
    """Raise PipelineError if the numbers of an array [N] are no sound."""
    if samples.dtype.newbyteorder("=") in INTEGERS:
        return
    if samples.dtype.kind != "f":
        raise PipelineError(
            f"audio: give samples as floats between -1 and 1, int16, int32 or uint8, not {samples.dtype}"
        )
    for first in range(0, len(samples), PIECE):
        piece = np.abs(samples[first : first + PIECE])
        loudest = piece[np.isfinite(piece)].max(initial=0)
        if loudest > LOUDEST:
            raise PipelineError(
                f"audio: its floats reach {loudest:g}; scale them to between -1 and 1, those of 16 bits by 1 / 32768"
            )


def open_audio(
    audio: Audio | AudioFile | Samples,
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    vad: bool = False,
    track: int | None = None,
) -> AudioFile | Samples:
    """Return a source of samples; one that is a source already is returned as it is.

    Args:
        start, end, channel, track: the part of a file or an array, see `AudioFile`.
        vad: drop what is not speech.

    Raises:
        ValueError: if a file cannot be read, or an array is no sound, in one line.
    """
    if isinstance(audio, (AudioFile, Samples)):
        return audio
    if isinstance(audio, np.ndarray):
        return Samples(audio, vad, start, end, channel, track)
    if not isinstance(audio, str | PathLike):
        raise PipelineError(f"audio: give a file, or samples as a NumPy array, not a {type(audio).__name__}")
    return AudioFile(audio, start, end, channel, vad=vad, track=track)


def make_attention_config(attention: str | SparseAttentionConfig, budget: int | None = 512) -> SparseAttentionConfig:
    """Return the settings for `unique` with a budget in tokens, or for `dense`.

    Raises:
        PipelineError: if `attention` names anything else.
    """
    if isinstance(attention, SparseAttentionConfig):
        return attention
    if attention not in ("unique", "dense"):
        raise PipelineError(f"attention={attention}: use unique or dense, or give a SparseAttentionConfig")
    return SparseAttentionConfig(budget=budget if attention == "unique" else None)
