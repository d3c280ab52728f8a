"""Audio and text in and out of a speech LLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.ctc import CTCUnits, choose_ctc_vocabulary

SAMPLE_RATE = 16_000  # Hz
AUDIO_TOKEN = "<|audio|>"


@dataclass
class WindowBatch:
    """W windows, as the encoder takes them."""

    features: dict[str, Tensor]  # the encoder's inputs
    spans: Tensor  # [W, 2] the frames [start, end) to keep of each window
    duration: float  # seconds that the kept frames cover


class SpeechLLMProcessor(ProcessorMixin):
    """Cuts audio into windows, builds prompts and decodes transcripts.

    Args:
        feature_extractor: the audio encoder's.
        tokenizer: the LLM's; gets the placeholder `<|audio|>` if it has none.
        frame_seconds, window_seconds, margin_seconds: as in `SpeechLLMConfig`.
        ctc_tokens: ids of the tokens that the CTC head writes; None: every one in lower case.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        frame_seconds: float = 0.08,
        window_seconds: float = 30.0,
        margin_seconds: float = 0.96,
        ctc_tokens: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if AUDIO_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        self.frame_seconds = frame_seconds
        self.window_seconds = window_seconds
        self.margin_seconds = margin_seconds
        self.ctc_tokens = choose_ctc_vocabulary(tokenizer) if ctc_tokens is None else list(ctc_tokens)
        names = tokenizer.convert_ids_to_tokens(self.ctc_tokens)
        self._units = CTCUnits(dict(zip(names, self.ctc_tokens, strict=True)))
        super().__init__(feature_extractor, tokenizer, **kwargs)

    @classmethod
    def from_config(
        cls,
        config: SpeechLLMConfig,
        feature_extractor: Any,
        tokenizer: Any,
        ctc_tokens: Sequence[int] | None = None,
    ) -> SpeechLLMProcessor:
        """Make a processor with the window lengths of a model's configuration."""
        return cls(
            feature_extractor,
            tokenizer,
            frame_seconds=config.frame_seconds,
            window_seconds=config.window_seconds,
            margin_seconds=config.margin_seconds,
            ctc_tokens=ctc_tokens,
        )

    @property
    def audio_token_id(self) -> int:
        """The placeholder of the recording in a prompt."""
        return self.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)

    @property
    def end_token_id(self) -> int:
        """The token that ends a transcript."""
        return self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    # Audio

    def cut_windows(self, blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int, int]]:
        """Cut a recording into windows that overlap by their margins.

        Args:
            blocks: float32 samples at 16 kHz, of any length.

        Yields:
            The samples of a window, and the frames [start, end) to keep of it.
        """
        window = round(self.window_seconds * SAMPLE_RATE)
        margin = round(self.margin_seconds / self.frame_seconds)  # frames
        frame = self.frame_seconds * SAMPLE_RATE  # samples
        hop = self._compute_hop()
        buffer, first = np.zeros(0, np.float32), True
        for block in blocks:
            buffer = np.concatenate([buffer, np.asarray(block, np.float32)])
            while len(buffer) > window:
                yield buffer[:window], 0 if first else margin, int(window / frame) - margin
                buffer, first = buffer[hop:], False
        if len(buffer):
            yield buffer, 0 if first else margin, int(np.ceil(len(buffer) / frame))

    def _compute_hop(self) -> int:
        """Compute the samples between the beginnings of two windows: a window less its margins, in whole frames."""
        margin = round(self.margin_seconds / self.frame_seconds)
        return round((self.window_seconds - 2 * margin * self.frame_seconds) * SAMPLE_RATE)

    def list_window_spans(self, samples: int) -> list[tuple[int, int, int, int]]:
        """List (first sample, last sample + 1, first frame to keep, last + 1) of each window of a recording."""
        blocks = [np.zeros(samples, np.float32)]
        hop = self._compute_hop()
        return [
            (index * hop, index * hop + len(window), first, last)
            for index, (window, first, last) in enumerate(self.cut_windows(blocks))
        ]

    def extract_features(self, windows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Make the encoder's inputs of W windows of float32 samples at 16 kHz."""
        options: dict[str, Any] = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt"}
        if self.feature_extractor.__class__.__name__ == "WhisperFeatureExtractor":
            return {"input_features": self.feature_extractor(list(windows), **options)["input_features"]}
        return dict(self.feature_extractor(list(windows), padding=True, **options))

    def batch_windows(self, windows: Iterable[tuple[np.ndarray, int, int]], size: int) -> Iterator[WindowBatch]:
        """Group what `cut_windows` yields by `size`, so that the features of an hour are never in memory at once."""
        group: list[tuple[np.ndarray, int, int]] = []
        for window in windows:
            group.append(window)
            if len(group) == size:
                yield self.make_window_batch(group)
                group = []
        if group:
            yield self.make_window_batch(group)

    def make_window_batch(self, group: Sequence[tuple[np.ndarray, int, int]]) -> WindowBatch:
        """Make a batch of windows as `cut_windows` yields them."""
        spans = torch.tensor([(start, end) for _, start, end in group])
        return WindowBatch(
            self.extract_features([samples for samples, _, _ in group]), spans, self.count_kept_seconds(group)
        )

    def count_kept_seconds(self, group: Sequence[tuple[np.ndarray, int, int]]) -> float:
        """Count the seconds that are kept of windows; the last window may end within a frame."""
        return sum(
            min(end * self.frame_seconds, len(samples) / SAMPLE_RATE) - start * self.frame_seconds
            for samples, start, end in group
        )

    # Text

    def tokenize_prompt(self, prompt: str | None = None) -> tuple[list[int], list[int]]:
        """Make the token ids before and after the audio positions; prompt: an instruction, such as `lower case`."""
        before, after = self._template(prompt).split(AUDIO_TOKEN)
        return tuple(self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))

    @staticmethod
    def _template(prompt: str | None) -> str:
        return f"<|im_start|>user\n{AUDIO_TOKEN}{prompt or ''}<|im_end|>\n<|im_start|>assistant\n"

    def apply_transcription_request(
        self, audio: np.ndarray | Sequence[np.ndarray], prompt: str | None = None
    ) -> BatchFeature:
        """Make a batch for `model.generate(**batch)`.

        Args:
            audio: a recording or several, as float32 samples [n] at 16 kHz.
            prompt: an instruction.

        Raises:
            ValueError: a recording has no samples.
        """
        recordings = [audio] if isinstance(audio, np.ndarray) and audio.ndim == 1 else list(audio)
        windows = [list(self.cut_windows([samples])) for samples in recordings]
        for index, found in enumerate(windows):
            if not found:
                raise ValueError(f"recording {index} of the batch has no samples")
        flat = [window for recording in windows for window in recording]
        features = self.extract_features([samples for samples, _, _ in flat])
        before, after = self.tokenize_prompt(prompt)
        ids = torch.tensor([before + [self.audio_token_id] + after] * len(recordings))
        if "attention_mask" in features:
            features["feature_attention_mask"] = features.pop("attention_mask")
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "window_frames": torch.tensor([[start, end] for _, start, end in flat]),
                "window_counts": torch.tensor([len(recording) for recording in windows]),
                **features,
            }
        )

    def __call__(self, audio: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Make a transcription request of audio, or tokenize text if there is no audio."""
        if audio is not None:
            return self.apply_transcription_request(audio, prompt=text if isinstance(text, str) else None)
        return self.tokenizer(text, **kwargs)

    def decode(self, token_ids: Any, return_format: str = "transcription", **kwargs: Any) -> Any:
        """Turn token ids into text.

        Args:
            token_ids: of one sequence.
            return_format: `transcription` (plain text) or `raw` (with special tokens).
            kwargs: of the tokenizer's `decode`.

        Raises:
            ValueError: `return_format` is neither.
        """
        if return_format not in ("transcription", "raw"):
            raise ValueError(f"return_format must be 'transcription' or 'raw', not {return_format!r}")
        kwargs.setdefault("skip_special_tokens", return_format == "transcription")
        text = self.tokenizer.decode(token_ids, **kwargs)
        return text.strip() if return_format == "transcription" and isinstance(text, str) else text

    def batch_decode(self, token_ids: Any, **kwargs: Any) -> list[Any]:
        """Decode each of several sequences; see `decode`."""
        return [self.decode(ids, **kwargs) for ids in token_ids]

    def tokenize_ctc(self, text: str) -> tuple[list[int], list[int]]:
        """List the units that the CTC head writes for a text, and for each the index of its word."""
        return self._units.tokenize(text)


AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor)
