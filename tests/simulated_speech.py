"""A recording without audio: CTC posteriors made from a text with times, and a model whose decoder follows a script."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import torch

from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.passes import PassRunner
from unique_asr.models.speech_llm.ctc import normalize_ctc_text
from unique_asr.models.speech_llm.modeling import EncodedAudio

FRAME_SECONDS = 0.08
HIDDEN = 4


class Tokenizer:
    """Words, signs and halves of long words as tokens; grows with the texts it reads."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.pieces = ["<|im_end|>"]
        self.ids = {self.pieces[0]: 0}

    def encode(self, text: str) -> list[int]:
        parts = []
        for part in re.findall(r"\s?[\w']+|\s?[^\w\s]", text):
            half = len(part) // 2
            parts += [part[:half], part[half:]] if len(part) > 8 else [part]
        for part in parts:
            if part not in self.ids:
                self.ids[part] = len(self.pieces)
                self.pieces.append(part)
        return [self.ids[part] for part in parts]

    def decode(self, ids, skip_special_tokens=False, **options) -> str:
        return "".join(self.pieces[index] for index in ids if index or not skip_special_tokens)


class Processor:
    end_token_id = 0

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()

    def tokenize_ctc(self, text: str) -> tuple[list[int], list[int]]:
        ids, words = [], []
        for index, word in enumerate(text.split()):
            tokens = self.tokenizer.encode(" " + normalize_ctc_text(word)) if normalize_ctc_text(word) else []
            ids += tokens
            words += [index] * len(tokens)
        return ids, words

    def tokenize_prompt(self, prompt=None) -> tuple[list[int], list[int]]:
        return [0, 0], [0]


class Model:
    """Its CTC vectors are log-probabilities over a fixed number of symbols, the last of which is the blank."""

    symbols = 4096

    def __init__(self, max_pass_seconds: float = 1200.0) -> None:
        self.config = SimpleNamespace(blank_id=self.symbols - 1, max_pass_seconds=max_pass_seconds)
        self.table = torch.nn.Embedding(self.symbols, HIDDEN)
        self.language_model = SimpleNamespace(get_input_embeddings=lambda: self.table)

    def compute_ctc_log_probs(
        self, encoded: EncodedAudio, token_ids: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        return encoded.ctc[start:end, token_ids]


def timeline(text: str, start: float = 0.5, word: float = 0.32, gap: float = 0.08, pause: float = 0.5, long=()):
    """(word, start, end) of every word, `pause` after a sentence; `long`: pairs of a word's index and its pause."""
    long = dict(long)
    words = []
    for index, token in enumerate(text.split()):
        words.append((token, start, start + word))
        start += word + long.get(index, pause if token[-1] in ".?!" else gap)
    return words


def encode(model: Model, processor: Processor, words, duration: float | None = None, seed: int = 0, miss=0.0):
    """Spikes of one frame a token inside each word's time; a share `miss` of the tokens is heard as another one."""
    rng = np.random.default_rng(seed)
    duration = duration if duration is not None else words[-1][2] + 0.5
    frames = int(np.ceil(duration / FRAME_SECONDS))
    logits = rng.normal(0, 1, (frames, model.symbols)).astype(np.float32)
    logits[:, model.config.blank_id] = 16
    for word, start, end in words:
        ids, _ = processor.tokenize_ctc(word)
        for place, index in enumerate(ids):
            at = start + (end - start) * (place + 0.5) / len(ids)
            frame = min(int(at / FRAME_SECONDS), frames - 1)
            index = rng.integers(3000, 4000) if rng.random() < miss else index
            logits[frame, index] = 18
            logits[frame, model.config.blank_id] = 12
    log_probs = torch.from_numpy(logits).log_softmax(-1)
    best_log_prob, best = log_probs.max(-1)
    positions = torch.arange(0, frames, 4)
    return EncodedAudio(
        embeds=positions[:, None].float().expand(-1, HIDDEN).clone(),  # where in the recording a pass begins
        frames=positions,
        ctc=log_probs,
        log_z=torch.zeros(frames),
        best=best,
        best_log_prob=best_log_prob,
        blank_log_prob=log_probs[:, model.config.blank_id],
        duration=duration,
        frame_seconds=FRAME_SECONDS,
    )


class ScriptedDecoder:
    """Writes what `script(start, end)` returns for the span of a pass in seconds, then ends."""

    def __init__(self, processor: Processor, script) -> None:
        self.processor, self.script = processor, script
        self.passes: list[tuple[float, float]] = []
        self.log_probs: list[float] = []
        self.engine_seconds: dict[str, float] = {}

    def reset(self) -> None:
        self.log_probs = []

    def prefill(self, inputs_embeds, progress=None) -> None:
        positions = inputs_embeds[0, 2:-1, 0]
        self.passes.append((float(positions[0]) * FRAME_SECONDS, float(positions[-1] + 4) * FRAME_SECONDS))

    def tokens(self, max_new_tokens, stop_ids):
        for token in [*self.processor.tokenizer.encode(" " + self.script(*self.passes[-1])), 0][:max_new_tokens]:
            self.log_probs.append(-0.1)
            yield token
            if token in stop_ids:
                return


def said(words, start: float, end: float) -> str:
    """The text of the words that begin in a span."""
    return " ".join(word for word, begin, _ in words if start - 0.2 <= begin < end)


VOCABULARY = re.findall(
    r"\w+",
    "river stone garden window letter morning winter captain silver market bridge candle forest island music "
    "number picture shadow summer teacher village weather yellow doctor engine farmer harbor kitchen ladder mirror "
    "needle orange pocket quiet rabbit saddle tailor uncle valley wagon",
)


def sentences(count: int, seed: int = 0, words: int = 8) -> str:
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(VOCABULARY, k=words)).capitalize() + "." for _ in range(count))


class SimulatedRecording:
    """A simulated recording and the transcript that a script makes of it."""

    def __init__(self, words, max_pass_seconds=1200.0, miss=0.0, duration=None):
        self.words = words
        self.model, self.processor = Model(max_pass_seconds), Processor()
        self.encoded = encode(self.model, self.processor, words, duration, miss=miss)

    def transcribe(self, script=None, config=None, segmentation=None):
        """script(start, end, said): the text of a pass, given its span and what was said in it."""
        self.report = LongformReport()

        def write(start, end):
            text = said(self.words, start, end)
            return script(start, end, text) if script else text

        self.decoder = ScriptedDecoder(self.processor, write)
        runner = PassRunner(self.model, self.processor, config, segmentation=segmentation)
        _, capacity = runner.count_positions(self.encoded)
        self.segments = list(runner.run(self.encoded, self.decoder, self.report))
        assert capacity >= max((end - start for start, end in self.decoder.passes), default=0) / 0.32
        times = [time for segment in self.segments for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert all(0 <= time <= self.encoded.duration for time in times)
        assert [segment.id for segment in self.segments] == list(range(len(self.segments)))
        assert self.report.passes == len(self.decoder.passes)
        return " ".join(segment.text for segment in self.segments)

    @property
    def text(self):
        return " ".join(word for word, _, _ in self.words)


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def speech(seconds, pauses=()):
    """Noise as loud as speech, with silence in `pauses`."""
    samples = np.random.default_rng(0).standard_normal(int(16000 * seconds)).astype(np.float32) / 10
    for start, end in pauses:
        samples[int(start * 16000) : int(end * 16000)] = 0
    return samples


def describe(transcript):
    """All but what rounding may touch."""
    segments = [(each.text, each.start, each.end, [word.text for word in each.words]) for each in transcript.segments]
    info = transcript.info
    return segments, info.stop_reason, info.coverage, info.passes, info.warnings, info.duration
