"""A speech LLM: audio encoder -> projector -> causal LM.

A recording of any length becomes one sequence of positions in the LLM's context: it is encoded in windows of
`window_seconds` that overlap by their margins, and the kept frames are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.listener import Listener
from unique_asr.models.speech_llm.projector import Frames, Positions, Projector, Residual

if TYPE_CHECKING:
    from unique_asr.models.speech_llm.processing import SpeechLLMProcessor

T = TypeVar("T")

SAMPLE_RATE = 16_000  # Hz
LEADS = 0.3, 0.5, 0.7, 1.0  # s of silence before a short recording that is heard again, as nothing was heard in it
SILENCE = 1e-4  # of 1; a recording that is never louder is not heard again


@dataclass
class EncodedAudio:
    """A recording, or a span of one, as the LLM and the aligner see it: M positions, T frames of `frame_seconds`."""

    embeds: Tensor  # [M, text hidden]
    frames: Tensor  # [M] first frame of each position, increasing
    ctc: Tensor  # [T, text hidden] states that the CTC head compares with the embeddings of tokens
    log_z: Tensor  # [T] log-sum-exp of the CTC logits
    best: Tensor  # [T] likeliest token ids of the LLM's vocabulary, or `blank_id`
    best_log_prob: Tensor  # [T] of `best`, by the CTC head
    blank_log_prob: Tensor  # [T] of the blank, by the CTC head
    duration: float  # seconds
    frame_seconds: float

    def slice(self, start_frame: int, end_frame: int | None = None) -> EncodedAudio:
        """Cut out the frames [start_frame, end_frame) and the positions that begin in them, counted from the first."""
        total = len(self.best)
        end = total if end_frame is None else min(end_frame, total)
        start = min(max(start_frame, 0), end)
        inside = (self.frames >= start) & (self.frames < end)
        duration = self.duration if end == total else end * self.frame_seconds
        per_frame = {
            name: getattr(self, name)[start:end] for name in ("ctc", "log_z", "best", "best_log_prob", "blank_log_prob")
        }
        return replace(
            self,
            embeds=self.embeds[inside],
            frames=self.frames[inside] - start,
            duration=max(duration - start * self.frame_seconds, 0.0),
            **per_frame,
        )


class SpeechLLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Transcribes speech with a causal LM that reads the whole recording as one sequence of positions."""

    config_class = SpeechLLMConfig
    config: SpeechLLMConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["listener"]  # greedy choices between words that are nearly as likely
    _no_split_modules = ["WhisperEncoderLayer", "LlamaDecoderLayer"]

    def __init__(self, config: SpeechLLMConfig) -> None:
        super().__init__(config)
        encoder = AutoModel.from_config(config.audio_config)
        self.encoder = encoder.get_encoder() if config.audio_config.is_encoder_decoder else encoder
        self.projector = Projector(config)
        if config.merge == "decoder":
            self.listener = Listener(config.audio_config, **config.listener)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.register_buffer("ctc_tokens", torch.arange(config.ctc_vocabulary_size))  # ids that the CTC head may emit
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Residual):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_ctc_embeddings(self) -> tuple[Tensor, Tensor]:
        """Look up the embeddings of the CTC tokens and their unit vectors, each [C, text hidden]."""
        embeddings = self.get_input_embeddings().weight[self.ctc_tokens]
        return embeddings, nn.functional.normalize(embeddings.float(), dim=-1).to(embeddings.dtype)

    def encode_windows(self, features: dict[str, Tensor]) -> Frames:
        """Encode W windows.

        Args:
            features: what `SpeechLLMProcessor.extract_features` makes of them.

        Returns:
            Frames [W, T, ...]; the padding at the end of a window is still there.
        """
        features = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in features.items()
        }
        states = self.encoder(**features).last_hidden_state
        frames = self.projector(states, self.get_ctc_embeddings()[1])
        return replace(frames, states=states) if self.config.merge == "decoder" else frames

    def make_positions(self, frames: Frames, spans: Tensor) -> Positions:
        """Make the LLM's positions of the frames [start, end) of each window; spans: [W, 2]."""
        if self.config.merge == "decoder":
            embeddings = self.get_input_embeddings().weight
            return self.listener.make_positions(frames, spans, self.config.stack_factor, embeddings)
        index = torch.arange(frames.logits.shape[1], device=frames.logits.device)
        spans = spans.to(index.device)
        keep = (index >= spans[:, :1]) & (index < spans[:, 1:])
        return self.projector.make_positions(frames, keep, self.get_ctc_embeddings()[0])

    def embed_positions(self, positions: Positions) -> Tensor:
        """Make the LLM's input embeddings [M, text hidden] of merged positions."""
        return self.projector.embed(positions)

    def join_windows(self, frames: Frames, spans: Tensor, duration: float) -> EncodedAudio:
        """Join consecutive windows of one recording.

        Args:
            frames: of W windows.
            spans: the frames [start, end) that are kept of each window, [W, 2].
            duration: seconds that they cover.
        """
        spans = spans.clamp(max=frames.logits.shape[1])
        positions = self.make_positions(frames, spans)
        lengths = spans[:, 1] - spans[:, 0]
        shift = lengths.cumsum(0) - lengths - spans[:, 0]  # from a window's frames to the joined ones
        firsts = positions.frames + shift.to(positions.frames.device).repeat_interleave(positions.counts)
        kept = [slice(start, end) for start, end in spans.tolist()]
        logits = torch.cat([frames.logits[window, span] for window, span in enumerate(kept)]).float()
        log_z = logits.logsumexp(-1)
        top, best = logits.max(-1)
        ids = torch.cat([self.ctc_tokens, self.ctc_tokens.new_tensor([self.config.blank_id])])
        return EncodedAudio(
            embeds=self.embed_positions(positions),
            frames=firsts,
            ctc=torch.cat([frames.ctc[window, span] for window, span in enumerate(kept)]),
            log_z=log_z,
            best=ids[best],
            best_log_prob=top - log_z,
            blank_log_prob=logits[:, -1] - log_z,
            duration=duration,
            frame_seconds=self.config.frame_seconds,
        )

    @torch.no_grad()
    def encode(
        self,
        blocks: Iterable[np.ndarray],
        processor: SpeechLLMProcessor,
        progress: Callable[[float], None] | None = None,
        batch: int | None = None,
    ) -> EncodedAudio:
        """Encode a recording.

        Args:
            blocks: float32 samples at 16 kHz.
            processor: of this model.
            progress: called with the seconds that are encoded so far.
            batch: windows at a time; None: 4, and 16 on a GPU, for which a thread prepares the next ones meanwhile.

        Raises:
            ValueError: the recording has no samples.
        """
        parts: list[EncodedAudio] = []
        on_gpu = self.device.type == "cuda"
        windows = processor.cut_windows(blocks)
        first = list(islice(windows, 2))
        groups = processor.batch_windows(chain(first, windows), batch or (16 if on_gpu else 4))
        for group in prefetch(groups) if on_gpu else groups:
            frames = self.encode_windows(group.features)
            parts.append(self.join_windows(frames, group.spans, group.duration))
            if progress:
                progress(sum(part.duration for part in parts))
        encoded = concatenate(parts)
        if len(first) == 1 and not self._has_speech(encoded):
            return self._encode_after_silence(first[0], processor) or encoded
        return encoded

    def _has_speech(self, encoded: EncodedAudio) -> bool:
        return bool((encoded.best != self.config.blank_id).any())

    def _encode_after_silence(
        self, window: tuple[np.ndarray, int, int], processor: SpeechLLMProcessor
    ) -> EncodedAudio | None:
        """Encode the only window of a recording again, with silence before it; None if nothing is heard again.

        The CTC head misses a word that begins with the first sample, as one that was cut out of its recording does.
        """
        samples, start, end = window
        for seconds in LEADS if np.abs(samples).max() > SILENCE else ():
            frames = round(seconds / processor.frame_seconds)
            lead = np.zeros(round(frames * processor.frame_seconds * SAMPLE_RATE), np.float32)
            if len(lead) + len(samples) > processor.window_seconds * SAMPLE_RATE:
                return None
            batch = processor.make_window_batch([(np.concatenate([lead, samples]), start + frames, end + frames)])
            encoded = self.join_windows(self.encode_windows(batch.features), batch.spans, batch.duration)
            if self._has_speech(encoded):
                return encoded
        return None

    def compute_ctc_log_probs(
        self, encoded: EncodedAudio, token_ids: Tensor, start: int = 0, end: int | None = None
    ) -> Tensor:
        """Compute the log-probabilities [T, L] that the CTC head gives to token ids [L] at the frames [start, end)."""
        table = self.get_input_embeddings().weight
        directions = nn.functional.normalize(table[token_ids.to(table.device)].float(), dim=-1)
        return encoded.ctc[start:end].float() @ directions.T - encoded.log_z[start:end, None]

    def _insert_audio(
        self, input_ids: Tensor, attention_mask: Tensor | None, audio: list[Tensor], labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put the audio positions of each row in the place of its placeholder; rows are padded on the left."""
        table = self.get_input_embeddings()
        rows, row_labels = [], []
        for row, ids in enumerate(input_ids):
            real = attention_mask[row].bool() if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)
            ids = ids[real]
            places = (ids == self.config.audio_token_id).nonzero().flatten().tolist()
            if len(places) != 1:
                raise ValueError(f"each prompt needs exactly one audio placeholder, row {row} has {len(places)}")
            at, positions = places[0], audio[row].to(table.weight.dtype)
            rows.append(torch.cat([table(ids[:at]), positions, table(ids[at + 1 :])]))
            if labels is not None:
                values = labels[row][real]
                ignored = values.new_full((len(positions),), -100)
                row_labels.append(torch.cat([values[:at], ignored, values[at + 1 :]]))
        longest = max(len(row) for row in rows)
        embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
        padded = None if labels is None else mask.new_full(mask.shape, -100)
        for row, values in enumerate(rows):
            embeds[row, longest - len(values) :] = values
            mask[row, longest - len(values) :] = 1
            if padded is not None:
                padded[row, longest - len(values) :] = row_labels[row]
        return embeds, mask, padded

    def embed_audio(
        self,
        input_features: Tensor,
        window_frames: Tensor,
        window_counts: Tensor,
        feature_attention_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Make the LLM's audio positions of each recording of a batch.

        Args:
            input_features: the W windows of all recordings, one after the other.
            window_frames: the frames [start, end) that are kept of each window, [W, 2].
            window_counts: windows of each recording, [B].
            feature_attention_mask: the encoder's, if it has one.

        Returns:
            [M, text hidden] for each recording.
        """
        features = {"input_features": input_features}
        if feature_attention_mask is not None:
            features["attention_mask"] = feature_attention_mask
        frames = self.encode_windows(features)
        positions = self.make_positions(frames, window_frames)
        recording = torch.repeat_interleave(window_counts).to(positions.counts.device)
        counts = torch.zeros_like(window_counts, device=recording.device).index_add_(0, recording, positions.counts)
        return list(self.embed_positions(positions).split(counts.tolist()))

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        window_frames: Tensor | None = None,
        window_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the LLM, over audio if features are given.

        Args:
            input_ids: [B, N]; with features, each row has one audio placeholder, which its positions replace.
            input_features, window_frames, window_counts, feature_attention_mask: see `embed_audio`.
            attention_mask: [B, N].
            inputs_embeds: [B, N, text hidden], in place of input_ids.
            labels: [B, N], -100 where there is no loss.

        Raises:
            ValueError: with features, a row has no placeholder or more than one.
        """
        if input_features is not None:
            audio = self.embed_audio(input_features, window_frames, window_counts, feature_attention_mask)
            inputs_embeds, attention_mask, labels = self._insert_audio(input_ids, attention_mask, audio, labels)
            input_ids = None
        return self.language_model(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        window_frames: Tensor | None = None,
        window_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate and return the new tokens alone, [B, new].

        Arguments are those of `forward`; all others go to the `generate` of transformers.
        """
        if input_features is None:
            return self.language_model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        audio = self.embed_audio(input_features, window_frames, window_counts, feature_attention_mask)
        embeds, mask, _ = self._insert_audio(input_ids, attention_mask, audio)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items; a thread makes the next one while the caller is busy with the last."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def concatenate(parts: Sequence[EncodedAudio]) -> EncodedAudio:
    """Join consecutive spans of one recording. Raises ValueError if there are none."""
    if not parts:
        raise ValueError("no audio to encode: the recording is empty")
    offsets = np.cumsum([0, *(len(part.best) for part in parts)])
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("embeds", "ctc", "log_z", "best", "best_log_prob", "blank_log_prob")
    }
    frames = torch.cat([part.frames + int(offset) for part, offset in zip(parts, offsets, strict=False)])
    duration = sum(part.duration for part in parts)
    return EncodedAudio(frames=frames, duration=duration, frame_seconds=parts[0].frame_seconds, **joined)


AutoModel.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
