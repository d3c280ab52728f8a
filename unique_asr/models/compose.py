"""A new speech LLM from a pretrained encoder and a pretrained LLM; only the projector starts from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration import SpeechLLMConfig
from .ctc import ctc_vocabulary
from .modeling import SpeechLLMForConditionalGeneration
from .processing import SpeechLLMProcessor


def compose(
    encoder: str,
    language_model: str,
    ctc_texts: Iterable[str] = (),
    ctc_units: int | None = None,
    **options: Any,
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Weights are float32.

    Args:
        encoder, language_model: folders or hub ids.
        ctc_texts, ctc_units: the CTC head writes this many of the tokens most frequent in the texts; None: all.
        options: fields of `SpeechLLMConfig`.
    """
    audio_config, text_config = AutoConfig.from_pretrained(encoder), AutoConfig.from_pretrained(language_model)
    audio_config.name_or_path = text_config.name_or_path = ""  # folders of this machine say nothing elsewhere
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    ctc_tokens = ctc_vocabulary(tokenizer, ctc_texts, ctc_units)
    config = SpeechLLMConfig(
        audio_config,
        text_config,
        ctc_vocabulary_size=len(ctc_tokens),
        **options,
    )
    model = SpeechLLMForConditionalGeneration(config)
    pretrained = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    model.encoder = pretrained.get_encoder() if config.audio_config.is_encoder_decoder else pretrained
    model.language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    feature_extractor = AutoFeatureExtractor.from_pretrained(encoder)
    processor = SpeechLLMProcessor.from_config(config, feature_extractor, tokenizer, ctc_tokens)
    config.audio_token_id = processor.audio_token_id
    model.ctc_tokens = torch.tensor(ctc_tokens)
    config.text_config.eos_token_id = processor.end_token_id
    model.language_model.generation_config.eos_token_id = processor.end_token_id
    return model, processor
