"""From joined items to the tensors of a training step, on the training device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.speech_llm.processing import SAMPLE_RATE
from unique_asr.training.augment import AugmentConfig, Perturbation, add_noise, compute_log_mel, mask_spectrogram
from unique_asr.training.corpus import Source, TrainingItem


@dataclass
class SpeechBatch:
    """B items in W windows. Sizes are on the CPU, where they are needed."""

    features: dict[str, Tensor]  # of the encoder, such as input_features [W, mels, frames]
    spans: Tensor  # int [W, 2], frames to keep of each window
    windows: Tensor  # int [B], windows of each item
    ctc_targets: list[list[int]]  # of each item, indices into the model's `ctc_tokens`
    before: list[list[int]]  # of each item, token ids before the positions
    after: list[list[int]]  # and after them, the transcript at the end
    labels: list[int]  # of each item, tokens of the transcript
    seconds: float  # of audio in all


class SpeechBatcher:
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

    def make_batch(self, items: Sequence[TrainingItem], transcripts: bool = True) -> SpeechBatch:
        """Augment the items and compute their features and texts.

        Args:
            transcripts: whether the LLM's side of the batch is needed.
        """
        drawn = Perturbation.draw(len(items), self.augment, self.random)
        cuts, counts, seconds = [], [], 0.0
        for number, (item, speed) in enumerate(zip(items, drawn.speed.tolist(), strict=True)):
            samples = int(sum(source_samples for _, _, source_samples in walk_timeline(item)) / speed)
            spans = self.processor.list_window_spans(samples)
            cuts += [(number, *span) for span in spans]
            counts.append(len(spans))
            seconds += samples / SAMPLE_RATE
        return replace(
            self.make_texts(items if transcripts else []),
            features=self._features(items, cuts, drawn),
            spans=torch.tensor([[first, last] for *_, first, last in cuts]),
            windows=torch.tensor(counts),
            ctc_targets=[self._ctc_target(item) for item in items],
            seconds=seconds,
        )

    def make_texts(self, items: Sequence[TrainingItem]) -> SpeechBatch:
        """Make the LLM's side of a batch alone, without features."""
        found = [self._text(item) for item in items]
        before, after, labels = map(list, zip(*found, strict=True)) if found else ([], [], [])
        none = torch.zeros(0, dtype=torch.long)
        return SpeechBatch({}, none.view(0, 2), none, [], before, after, labels, 0.0)

    def _features(
        self, items: Sequence[TrainingItem], cuts: list[tuple[int, int, int, int, int]], drawn: Perturbation
    ) -> dict[str, Tensor]:
        lengths = torch.tensor([end - start for _, start, end, _, _ in cuts])
        size = round(self.processor.window_seconds * SAMPLE_RATE) if self.on_device else int(lengths.max())
        windows = render_waveforms(
            items, [(item, start, end) for item, start, end, *_ in cuts], drawn, size, self.device
        )
        if not self.on_device:
            parts = zip(windows.cpu().numpy(), lengths.tolist(), strict=True)
            return self.processor.extract_features([window[:length] for window, length in parts])
        return {"input_features": mask_spectrogram(compute_log_mel(windows, self.mel_filters), self.augment)}

    def _ctc_target(self, item: TrainingItem) -> list[int]:
        text = " ".join(utterance.text for _, utterance, _ in item.pieces)
        ids, _ = self.processor.tokenize_ctc(text)
        return [self.ctc_index[token] for token in ids if token in self.ctc_index]

    def _text(self, item: TrainingItem) -> tuple[list[int], list[int], int]:
        before, after = self.processor.tokenize_prompt(item.prompt)
        transcript = self.processor.tokenizer(item.text, add_special_tokens=False)["input_ids"]
        transcript = [*transcript, self.processor.end_token_id]
        return before, after + transcript, len(transcript)


def walk_timeline(item: TrainingItem) -> Iterator[tuple[int, int, int]]:
    """Yield for each utterance the samples of the silence before it, its own samples, and their sum."""
    for _, utterance, gap in item.pieces:
        silence = int(gap * SAMPLE_RATE)
        speech = utterance.end - utterance.start
        yield silence, speech, silence + speech


def render_waveforms(
    items: Sequence[TrainingItem],
    cuts: Sequence[tuple[int, int, int]],
    drawn: Perturbation,
    size: int,
    device: torch.device,
) -> Tensor:
    """Play items into windows, float32 [W, size] on `device`.

    Args:
        cuts: of each of W windows, the index of its item, its first sample there and the one after its last.
        drawn: tempo, level and noise of each item.
    """
    windows = torch.zeros(len(cuts), size, device=device)
    for source, pieces in _pieces(items, cuts, drawn.speed.tolist(), size).items():
        _play(source.audio, pieces, windows)
    rows, lengths = [item for item, *_ in cuts], torch.tensor([end - start for _, start, end in cuts])
    parameters = [lengths, *(values[rows] for values in (drawn.gain, drawn.noise, drawn.low))]
    return add_noise(windows, *(send(values, device) for values in parameters))


def _pieces(
    items: Sequence[TrainingItem], cuts: Sequence[tuple[int, int, int]], speeds: list[float], size: int
) -> dict[Source, list[tuple[float, ...]]]:
    """By source, the pieces for `_play`: one for each utterance, or part of one, in each window."""
    pieces: dict[Source, list[tuple[float, ...]]] = {}
    for row, (number, start, end) in enumerate(cuts):
        item, speed = items[number], speeds[number]
        at = 0
        for (source, utterance, _), (gap, length, whole) in zip(item.pieces, walk_timeline(item), strict=True):
            begin = at + gap
            first, last = max(math.ceil(begin / speed), start), min(math.ceil((begin + length) / speed), end)
            if first < last:
                place = row * size + first - start
                piece = (last - first, utterance.start, length, first * speed - begin, speed, place)
                pieces.setdefault(source, []).append(piece)
            at += whole
    return pieces


def _play(audio: Tensor, pieces: list[tuple[float, ...]], windows: Tensor) -> None:
    """Write pieces of `audio` (int16 [samples]) into `windows` [W, N], all at once.

    A piece is: number of samples to write, start and length of the utterance in `audio`, position of the first
    sample in the utterance, step from one sample to the next, place in the flattened windows.
    """
    counts = [int(count) for count, *_ in pieces]
    table = send(torch.tensor(pieces, dtype=torch.float64), windows.device)
    repeats, total = table[:, 0].long(), sum(counts)
    piece = torch.repeat_interleave(repeats, output_size=total)
    step = torch.arange(total, device=windows.device) - (repeats.cumsum(0) - repeats)[piece]
    start, length, position, speed, place = table[:, 1:].T[:, piece]
    position = (position + step * speed).clamp_min(0)
    before = position.floor()
    after = torch.minimum(before + 1, length - 1)
    left, right = (audio[(start + torch.minimum(index, length - 1)).long()].float() for index in (before, after))
    values = torch.lerp(left, right, (position - before).float()) / 32768
    windows.view(-1)[place.long() + step] = values


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy `values` to the device without waiting for what the device still has to do."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
