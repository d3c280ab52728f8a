"""The listener: Whisper through the `generate` of transformers, window by window, with times for its words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput

from unique_asr.models.listening_llm.configuration import ListeningLLMConfig
from unique_asr.models.listening_llm.heard import HeardSpeech, HeardWord, mark_alternatives
from unique_asr.models.listening_llm.windows import SAMPLE_RATE, cut_windows

FRAME_SECONDS = 0.02  # of the encoder's frames
MAX_TOKENS = 224  # of a window, half of Whisper's context, as in OpenAI's own code
SILENCE = 1e-4  # loudness, of 1, of a window that nobody needs to hear


class WhisperListener:
    """Hears recordings with a Whisper model.

    Args:
        model: in evaluation mode, on any device.
        processor: its feature extractor and tokenizer.
        config: windows, beams and the language; see `ListeningLLMConfig`.
    """

    def __init__(
        self, model: WhisperForConditionalGeneration, processor: WhisperProcessor, config: ListeningLLMConfig
    ) -> None:
        self.model, self.processor, self.config = model, processor, config
        generation = model.generation_config
        last = [[model.config.decoder_layers - 1, head] for head in range(model.config.decoder_attention_heads)]
        self.heads = getattr(generation, "alignment_heads", None) or last

    def listen(self, blocks: Iterable[np.ndarray], batch: int = 4) -> Iterator[HeardSpeech]:
        """Hear a recording.

        Args:
            blocks: float32 samples [n] at 16 kHz, of any length.
            batch: windows at a time.

        Yields:
            What was heard so far, the same object each time, whenever some windows have been heard.
        """
        heard = HeardSpeech()
        windows = cut_windows(blocks, self.config.window_seconds, self.config.search_seconds)
        for group in _group(windows, batch):
            loud = [float(np.sqrt(np.mean(samples**2))) > SILENCE for _, samples in group]
            found = iter(self.hear([samples for (_, samples), is_loud in zip(group, loud, strict=True) if is_loud]))
            for (start, samples), is_loud in zip(group, loud, strict=True):
                end = start + len(samples) / SAMPLE_RATE
                words = next(found) if is_loud else []
                heard.words += [_shift(word, start, end) for word in words]
                heard.cuts.append(end)
            yield heard

    @torch.no_grad()
    def hear(self, windows: Sequence[np.ndarray]) -> list[list[HeardWord]]:
        """Hear windows [n] of at most 30 s, all at once; times count from the beginning of each."""
        if not windows:
            return []
        config, model = self.config, self.model
        features = self.processor.feature_extractor(list(windows), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = features["input_features"].to(model.device, model.dtype)
        encoded = model.get_encoder()(features)
        request = self._make_request(encoded)
        returned = config.alternatives + 1
        # Whisper's own `generate` cannot return several hypotheses of a beam; that of all models can.
        written = GenerationMixin.generate(
            model,
            encoder_outputs=encoded,
            decoder_input_ids=request,
            num_beams=config.beams,
            num_return_sequences=returned,
            max_new_tokens=MAX_TOKENS,
        )
        best, prompt = written[::returned], request.shape[1]
        frames, probabilities = self._place(encoded.last_hidden_state, best, prompt)
        found = []
        for index, samples in enumerate(windows):
            words = self._make_words(best[index, prompt:], frames[index], probabilities[index], len(samples))
            others = [
                self._split_words(written[index * returned + other, prompt:].tolist())[0]
                for other in range(1, returned)
            ]
            found.append(mark_alternatives(words, others))
        return found

    def _make_request(self, encoded: BaseModelOutput) -> Tensor:
        """Make what Whisper reads before it writes, [W, 2 or 4]: language, task, and that no times are wanted."""
        tokenizer, windows = self.processor.tokenizer, len(encoded.last_hidden_state)
        names = ["<|startoftranscript|>", "<|notimestamps|>"]
        if getattr(self.model.generation_config, "is_multilingual", False):
            names[1:1] = [f"<|{self.config.language or 'en'}|>", "<|transcribe|>"]
        request = torch.tensor([tokenizer.convert_tokens_to_ids(names)] * windows, device=self.model.device)
        if self.config.language is None and len(names) == 4:
            request[:, 1] = self.model.detect_language(encoder_outputs=encoded)
        return request

    def _place(self, states: Tensor, written: Tensor, prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the frame [W, N] at which each written token begins, and its probability [W, N].

        The decoder reads the finished text once more; the alignment heads of its cross-attention say where it looks
        (Whisper's own way to word times), and the best path through them goes one way.
        """
        decoder = self.model.get_decoder()
        before = decoder.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the others do not give weights
        try:
            output = decoder(
                input_ids=written[:, :-1], encoder_hidden_states=states, output_attentions=True, use_cache=False
            )
        finally:
            self.model.set_attn_implementation(before)
        looks = torch.stack([output.cross_attentions[layer][:, head] for layer, head in self.heads]).float().mean(0)
        logits = self.model.proj_out(output.last_hidden_state[:, prompt - 1 :]).float()
        probabilities = logits.softmax(-1).gather(-1, written[:, prompt:, None])[..., 0]
        return trace_path(looks[:, prompt - 1 :]).cpu().numpy(), probabilities.cpu().numpy()

    def _split_words(self, tokens: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """Split the tokens of a window into words: their texts, and the places of their tokens."""
        tokenizer, texts, places = self.processor.tokenizer, [], []
        kept = [place for place, token in enumerate(tokens) if token not in tokenizer.all_special_ids]
        pending: list[int] = []
        for place in kept:
            pending.append(place)
            text = tokenizer.decode([tokens[each] for each in pending], clean_up_tokenization_spaces=False)
            if text.endswith("\ufffd"):  # part of a character
                continue
            if text[:1].isspace() or not texts:
                texts.append(text)
                places.append(pending)
            else:
                texts[-1] += text
                places[-1] = places[-1] + pending
            pending = []
        return texts, places

    def _make_words(
        self, tokens: Tensor, frames: np.ndarray, probabilities: np.ndarray, samples: int
    ) -> list[HeardWord]:
        texts, places = self._split_words(tokens.tolist())
        end = samples / SAMPLE_RATE
        starts = [min(float(frames[place[0]]) * FRAME_SECONDS, end) for place in places]
        return [
            HeardWord(text, start, max(following, start), float(probabilities[place].mean()))
            for text, place, start, following in zip(texts, places, starts, [*starts, end][1:], strict=True)
        ]


def trace_path(scores: Tensor) -> Tensor:
    """Find the frames [W, N], none before that of the token before it, whose scores [W, N, F] have the largest sum."""
    best = scores.new_zeros(scores.shape[0], scores.shape[2])
    sources = []
    for token in scores.unbind(1):
        before, source = best.cummax(-1)  # the best sum that ends at or before each frame
        best = before + token
        sources.append(source)
    path = [best.argmax(-1, keepdim=True)]
    for source in reversed(sources[1:]):
        path.append(source.gather(1, path[-1]))
    return torch.cat(path[::-1], 1)


def _shift(word: HeardWord, start: float, end: float) -> HeardWord:
    """The word with times from the beginning of the recording, in a window from `start` to `end` seconds."""
    return replace(word, start=min(word.start + start, end), end=min(word.end + start, end))


def _group(windows: Iterable[tuple[float, np.ndarray]], size: int) -> Iterator[list[tuple[float, np.ndarray]]]:
    group: list[tuple[float, np.ndarray]] = []
    for window in windows:
        group.append(window)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
