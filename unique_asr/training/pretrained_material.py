"""What a pretrained speech LLM of transformers learns from: recordings joined to items, and answers in its own format.

The model reads an item as when it transcribes: its processor's request, with the audio's positions in place. The answer
follows as its parser would read it, with times where the model gives them, and the token that ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unique_asr.generation import stop_ids
from unique_asr.models.pretrained import ParsedUtterance, find
from unique_asr.models.pretrained.prompting import embed_prompt
from unique_asr.models.speech_llm.processing import SAMPLE_RATE
from unique_asr.training.augment import AugmentConfig, Perturbation
from unique_asr.training.corpus import Corpus, TrainingItem, draw_log_uniform
from unique_asr.training.decoders import GraphedDecoder, PlainDecoder
from unique_asr.training.losses import compute_llm_loss
from unique_asr.training.speech_batches import SpeechBatch, render_waveforms, walk_timeline
from unique_asr.training.speech_material import describe_items
from unique_asr.training.stages import StageConfig

TEXT_TOKENS_A_SECOND = 5.0  # of speech
PROMPT_TOKENS = 32  # of the request beside the audio
WINDOW_SECONDS = 30.0  # what a stage's `windows` count


class PretrainedMaterial:
    """Draws micro-batches of items and computes the loss of their answers' tokens.

    Args:
        augment: of it, what changes waveforms: tempo, level and noise. Transcripts are the manifests' own.

    Raises:
        ValueError: the model is none that is known.
    """

    def __init__(self, model: Any, processor: Any, corpus: Corpus, augment: AugmentConfig, seed: int = 0) -> None:
        known_model = find(model)
        if known_model is None:
            raise ValueError(
                f"{type(model).__name__} is no known speech LLM; fine-tune a model of conf/model, or text.model"
            )
        self.model, self.processor, self.known_model = model, processor, known_model
        self.corpus, self.augment = corpus, augment
        self.random = torch.Generator().manual_seed(seed)
        self.end = find_end_token(model, processor.tokenizer)
        self.logits_scaling = getattr(model.config.get_text_config(decoder=True), "logits_scaling", 1.0)
        self.drawn: list[list[TrainingItem]] = []  # of the micro-batches since `clear_drawn`

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None = None, mark_decoded: bool = False
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """See `Material`; measures are `llm`, `seconds` and `tokens`. `decoder` is not used."""
        items = self.draw_items(stage)
        self.drawn.append(items)
        heard, answers = self._heard(items)
        with torch.set_grad_enabled(self._audio_trains()):
            prompts = [embed_prompt(self.known_model, self.model, self.processor, samples)[0] for samples in heard]
        none, seconds = torch.zeros(0, dtype=torch.long), sum(map(len, heard)) / SAMPLE_RATE
        batch = SpeechBatch(
            {}, none, none, [], [[] for _ in items], answers, [len(answer) for answer in answers], seconds
        )
        loss, tokens = compute_llm_loss(self.model, prompts, batch, None, self._states, mark_decoded, slips=stage.slips)
        return loss, {"llm": loss.detach(), "seconds": seconds, "tokens": tokens}

    def draw_items(self, stage: StageConfig) -> list[TrainingItem]:
        """Items of one length, so many that the LLM reads about `tokens`, or that the audio fills `windows` of 30 s.

        Raises ValueError for options of a stage that the model cannot have.
        """
        low, high = stage.seconds
        if high > self.known_model.pass_seconds:
            raise ValueError(
                f"stage {stage.name}: seconds reaches {high:g} and {self.known_model.model_type} hears "
                f"{self.known_model.pass_seconds:g} in one pass: lower `seconds`"
            )
        for option in ("position_dropout", "pack"):
            if getattr(stage, option):
                raise ValueError(f"stage {stage.name}: {option} is for this package's own models; leave it out")
        if self.corpus.random.random() < stage.short_share:
            low, high = min(5.0, low), min(29.0, high)
        seconds = draw_log_uniform(self.corpus.random, low, high)
        count = stage.windows * WINDOW_SECONDS / max(seconds, WINDOW_SECONDS)
        if stage.tokens:
            a_second = self.known_model.tokens_a_second + self.known_model.marker_tokens_a_second + TEXT_TOKENS_A_SECOND
            seconds = min(seconds, (stage.tokens - PROMPT_TOKENS) / a_second)
            count = stage.tokens / (PROMPT_TOKENS + a_second * seconds)
        return [self.corpus.draw_item(seconds, stage.cased_share) for _ in range(max(1, int(count)))]

    def write_answer(self, item: TrainingItem, speed: float = 1.0) -> list[int]:
        """Token ids of what the model should write of an item that is played `speed` times as fast."""
        utterances, at = [], 0
        for (_, utterance, _), (gap, length, whole) in zip(item.pieces, walk_timeline(item), strict=True):
            start, end = ((at + moment) / speed / SAMPLE_RATE for moment in (gap, gap + length))
            utterances.append(ParsedUtterance(utterance.cased or utterance.text, start, end))
            at += whole
        text = self.known_model.opening + self.known_model.parser.write(utterances)
        return [*self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def _heard(self, items: Sequence[TrainingItem]) -> tuple[list[np.ndarray], list[list[int]]]:
        """The samples of each item, float32 [S] at 16 kHz, as it was augmented, and its answer."""
        drawn = Perturbation.draw(len(items), self.augment, self.random)
        whole = torch.tensor([sum(samples for *_, samples in walk_timeline(item)) for item in items])
        # What would take longer than a pass is played faster.
        drawn.speed = drawn.speed.maximum(whole / (self.known_model.pass_seconds * SAMPLE_RATE))
        lengths = (whole / drawn.speed).int().tolist()
        cuts = [(number, 0, length) for number, length in enumerate(lengths)]
        rows = render_waveforms(items, cuts, drawn, max(lengths), self.model.device).cpu().numpy()
        answers = [self.write_answer(item, speed) for item, speed in zip(items, drawn.speed.tolist(), strict=True)]
        return [row[:length] for row, length in zip(rows, lengths, strict=True)], answers

    def _states(self, embeds: Tensor, decoded: Tensor | None = None) -> Tensor:
        """Last hidden states, divided as Granite's LLM divides its logits."""
        states = PlainDecoder(self.model.get_decoder())(embeds, decoded)
        return states if self.logits_scaling == 1 else states / self.logits_scaling

    def _audio_trains(self) -> bool:
        places = self.known_model.parts.get("encoder", ()) + self.known_model.parts["projector"]
        return any(weight.requires_grad for name, weight in self.model.named_parameters() if name.startswith(places))

    def collect_random_states(self) -> dict[str, Any]:
        """See `Material`."""
        return {"corpus": self.corpus.random.bit_generator.state, "augment": self.random.get_state()}

    def restore_random_states(self, states: dict[str, Any]) -> None:
        """See `Material`."""
        self.corpus.random.bit_generator.state = states["corpus"]
        self.random.set_state(states["augment"])

    def clear_drawn(self) -> None:
        """See `Material`."""
        self.drawn.clear()

    def describe(self) -> list[list[dict[str, Any]]]:
        """See `Material`."""
        return describe_items(self.drawn)


def find_end_token(model: Any, tokenizer: Any) -> int:
    """The token that ends an answer: the tokenizer's, or else one of those that end decoding.

    Raises ValueError if there is none.
    """
    found = stop_ids(model, tokenizer)
    if not found:
        raise ValueError(f"{type(model).__name__} has no token that ends an answer: set eos_token_id of its tokenizer")
    return tokenizer.eos_token_id if tokenizer.eos_token_id in found else min(found)
