"""From joined items to the tensors of a training step, on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.processing import SAMPLE_RATE

from .augment import AugmentConfig, augment_waveform, log_mel, mask_spectrogram
from .corpus import Item


@dataclass
class Batch:
    """B items in W windows.

    features [W, mels, frames]; spans [W, 2]: frames to keep of each window; windows [B]: windows of each item (both on
    the CPU, where the sizes are needed); seconds: audio in all;
    ctc_targets: per item, indices into the model's `ctc_tokens`; before, after: per item, token ids around the
    positions, the last `labels` ids of `after` being the transcript.
    """

    features: dict[str, Tensor]
    spans: Tensor
    windows: Tensor
    ctc_targets: list[list[int]]
    before: list[list[int]]
    after: list[list[int]]
    labels: list[int]
    seconds: float


class Batcher:
    """Builds batches; features of Whisper encoders are computed on the device, others by their feature extractor."""

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        augment: AugmentConfig,
        seed: int,
    ) -> None:
        self.processor = processor
        self.augment = augment
        self.device = model.device
        self.random = torch.Generator().manual_seed(seed)
        self.ctc_index = {int(token): index for index, token in enumerate(model.ctc_tokens.tolist())}
        filters = getattr(processor.feature_extractor, "mel_filters", None)
        self.on_device = type(processor.feature_extractor).__name__ == "WhisperFeatureExtractor"
        self.mel_filters = torch.as_tensor(filters, dtype=torch.float32).to(self.device) if self.on_device else None

    def batch(self, items: Sequence[Item], transcripts: bool = True) -> Batch:
        """transcripts: whether the LLM's side of the batch is needed."""
        windows, spans, counts, seconds = [], [], [], 0.0
        for item in items:
            samples = augment_waveform(self._waveform(item), self.augment, self.random)
            cuts = self.processor.window_spans(len(samples))
            windows += [samples[start:end] for start, end, _, _ in cuts]
            spans += [(first, last) for _, _, first, last in cuts]
            counts.append(len(cuts))
            seconds += len(samples) / SAMPLE_RATE
        texts = [self._text(item) for item in items] if transcripts else []
        return Batch(
            features=self._features(windows),
            spans=torch.tensor(spans),
            windows=torch.tensor(counts),
            ctc_targets=[self._ctc_target(item) for item in items],
            before=[before for before, _, _ in texts],
            after=[after for _, after, _ in texts],
            labels=[labels for _, _, labels in texts],
            seconds=seconds,
        )

    def _waveform(self, item: Item) -> Tensor:
        parts = []
        for source, utterance, gap in item.pieces:
            parts.append(torch.zeros(int(gap * SAMPLE_RATE), device=self.device))
            parts.append(source.audio[utterance.start : utterance.end].to(self.device).float() / 32768)
        return torch.cat(parts)

    def _features(self, windows: list[Tensor]) -> dict[str, Tensor]:
        if not self.on_device:
            return self.processor.features([window.cpu().numpy() for window in windows])
        padded = torch.zeros(len(windows), round(self.processor.window_seconds * SAMPLE_RATE), device=self.device)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window)] = window
        return {"input_features": mask_spectrogram(log_mel(padded, self.mel_filters), self.augment)}

    def _ctc_target(self, item: Item) -> list[int]:
        text = " ".join(utterance.text for _, utterance, _ in item.pieces)
        ids, _ = self.processor.ctc_ids(text)
        return [self.ctc_index[token] for token in ids if token in self.ctc_index]

    def _text(self, item: Item) -> tuple[list[int], list[int], int]:
        before, after = self.processor.prompt(item.prompt)
        transcript = self.processor.tokenizer(item.text, add_special_tokens=False)["input_ids"]
        transcript = [*transcript, self.processor.end_token_id]
        return before, after + transcript, len(transcript)
