"""The systems that the harness compares. Those of one speech LLM share its encoded recordings."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.data import Recording
from unique_asr.decoding import engine as decoding
from unique_asr.decoding.engine import PENDING, Engine, Pending
from unique_asr.evaluation.encoder import Encoder
from unique_asr.evaluation.harness import System
from unique_asr.evaluation.methods import Sliding
from unique_asr.evaluation.results import Hypothesis
from unique_asr.longform.coverage import LongformReport
from unique_asr.transcript import Segment, TranscriptionInfo

if TYPE_CHECKING:
    from unique_asr.models.speech_llm.modeling import EncodedAudio


class SpeechLLM:
    """A speech LLM as users run it: one pass where the text covers the speech, continuation where it does not.

    Args:
        encoder: of the model; its encoded recordings are what is decoded.
        max_pass_seconds, prefill_chunk: see `unique_asr.transcribers.base.Transcriber`.
        chunk_seconds: passes are at most as long, however long `max_pass_seconds` lets them be.
        sliding: short windows and a stitched text instead.
        passes: passes over one recording that are decoded side by side.
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
        passes: int = 1,
    ) -> None:
        from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

        self.name, self.encoder, self.prompt, self.sliding = name, encoder, prompt, sliding
        if chunk_seconds is not None:
            max_pass_seconds = min(chunk_seconds, max_pass_seconds or encoder.model.config.max_pass_seconds)
        self.transcriber = SpeechLLMTranscriber(
            (encoder.model, encoder.processor),
            attention=attention,
            max_pass_seconds=max_pass_seconds,
            prefill_chunk=prefill_chunk,
            parallel_passes=passes,
        )

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        """Yield (index, hypothesis) of one recording after the other."""
        for index, recording in enumerate(recordings):
            encoded, encode_seconds = self.encoder(recording)
            started = time.perf_counter()
            transcription = EncodedTranscription(self, encoded)
            for _ in transcription.run():
                pass  # nothing is ever pending
            yield index, transcription.make_hypothesis(encode_seconds + time.perf_counter() - started)


class EncodedTranscription:
    """One encoded recording on its way to a hypothesis."""

    def __init__(self, system: SpeechLLM, encoded: EncodedAudio, sequence: decoding.Sequence | None = None) -> None:
        self.system, self.encoded, self.sequence = system, encoded, sequence
        self.report, self.segments = LongformReport(), []
        self._infos: list[TranscriptionInfo] = []  # several if the recording is cut into sliding windows

    def run(self) -> Iterator[Pending]:
        """Transcribe to the end; yields where the sequence's engine has to make a step."""
        if self.system.sliding is not None:
            found = self.system.sliding.transcribe(self._transcribe, self.encoded, self.report)
        else:
            found = self._transcribe(self.encoded, self.report)
        for segment in found:
            if segment is PENDING:
                yield PENDING
            else:
                self.segments.append(segment)

    def make_hypothesis(self, seconds: float) -> Hypothesis:
        """Return what was written; `seconds`: the wall time that it took."""
        counters, decode_seconds = SparsityCounters(), 0.0
        for info in self._infos:
            counters.add(SparsityCounters(**_select_counters(info)))
            decode_seconds += info.timings["decode"]
        return Hypothesis(
            text=" ".join(segment.text.strip() for segment in self.segments),
            stop_reason=self.report.stop_reason,
            coverage=self.report.coverage,
            passes=self.report.passes,
            broken=self.report.broken,
            longest=self.report.longest,
            sparsity=vars(counters),
            segments=self.segments,
            seconds=seconds,
            tokens=counters.steps,
            decode_seconds=decode_seconds,
        )

    def _transcribe(self, encoded: EncodedAudio, report: LongformReport) -> Iterator[Segment | Pending]:
        how = {"prompt": self.system.prompt, "sequence": self.sequence, "report": report}
        segments, info = self.system.transcriber.transcribe_encoded(encoded, **how)
        self._infos.append(info)
        return segments


class BatchedSpeechLLM(SpeechLLM):
    """The same for `batch` recordings at a time: one decode step writes a token for each of them.

    One begins where another has ended. The windows of the next `batch` are encoded together; times are those of the
    batch, counted once.
    """

    def __init__(self, *args: Any, batch: int = 16, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batch = batch

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        """Yield (index, hypothesis) as they are complete."""
        from unique_asr.decoding.batch import BatchEngine
        from unique_asr.transcribers.batch import interleave

        transcriber = self.transcriber
        # Rivals and dense attention read the whole cache for every place, and the longest recordings go on for long.
        options = {"prefill_chunk": transcriber.prefill_chunk, "spare_places": 2}
        engine = BatchEngine(transcriber.model.language_model, transcriber.attention, **options)
        encode_seconds = 0.0  # since the last hypothesis; the recordings count them themselves

        def begin() -> Iterator[Generator[Pending, None, Hypothesis]]:
            nonlocal encode_seconds
            for first in range(0, len(recordings), self.batch):
                group, started = recordings[first : first + self.batch], time.perf_counter()
                self.encoder.encode_together(group)
                encode_seconds += time.perf_counter() - started
                yield from (self._transcribe(recording, engine) for recording in group)

        last = time.perf_counter()
        for index, hypothesis in interleave(begin(), self.batch, engine.step):
            now = time.perf_counter()
            yield index, replace(hypothesis, seconds=hypothesis.seconds + now - last - encode_seconds)
            last, encode_seconds = now, 0.0

    def _transcribe(self, recording: Recording, engine: Engine) -> Generator[Pending, None, Hypothesis]:
        """Yields where the engine has to make a step; the seconds of the hypothesis are those of encoding."""
        encoded, encode_seconds = self.encoder(recording)
        sequence = engine.new_sequence()
        transcription = EncodedTranscription(self, encoded, sequence)
        try:
            yield from transcription.run()
        finally:
            engine.remove(sequence)
        return transcription.make_hypothesis(encode_seconds)


class ParallelSpeechLLM(SpeechLLM):
    """The same with `passes` passes over each recording decoded side by side."""

    def __init__(self, *args: Any, passes: int = 8, **options: Any) -> None:
        super().__init__(*args, passes=passes, **options)


class PretrainedLLM:
    """A known speech LLM of transformers (`unique_asr.models.pretrained`), in passes as users run it."""

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
        from unique_asr.models import pretrained
        from unique_asr.transcribers import make_transcriber

        self.name, self.prompt = name, prompt
        if chunk_seconds is not None:
            max_pass_seconds = min(chunk_seconds, max_pass_seconds or pretrained.find(model[0]).pass_seconds)
        options = {"max_pass_seconds": max_pass_seconds, "prefill_chunk": prefill_chunk}
        self.transcriber = make_transcriber(model, attention=attention, **options)

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        """Yield (index, hypothesis) of one recording after the other."""
        for index, recording in enumerate(recordings):
            started = time.perf_counter()
            segments, info = self.transcriber.transcribe(recording.audio(), prompt=self.prompt)
            segments = list(segments)
            hypothesis = Hypothesis(
                text=" ".join(segment.text.strip() for segment in segments),
                stop_reason=info.stop_reason,
                coverage=info.coverage,
                passes=info.passes,
                sparsity=_select_counters(info),
                segments=segments,
                seconds=time.perf_counter() - started,
                tokens=info.sparsity.get("steps", 0),
                decode_seconds=info.timings.get("decode", 0.0),
            )
            yield index, hypothesis


class ListenerAlone:
    """The words that the listener of a `ListeningLLM` heard, without the LLM."""

    name = "listener"

    def __init__(self, model: tuple[Any, Any]) -> None:
        self.listener = model[1].make_listener(model[0])

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        """Yield (index, hypothesis) of one recording after the other."""
        for index, recording in enumerate(recordings):
            started = time.perf_counter()
            *_, heard = self.listener.listen(recording.blocks(), 16)
            yield index, Hypothesis(text=heard.text, seconds=time.perf_counter() - started)


class Deferred:
    """A system that is made, and its model loaded, when there is a recording to decode."""

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


def _select_counters(info: TranscriptionInfo) -> dict[str, int]:
    """Those that can be summed."""
    return {name: value for name, value in info.sparsity.items() if name != "share_of_pages_read"}
