"""A new speech LLM from a pretrained encoder and a pretrained LLM; only the projector starts from scratch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration import SpeechLLMConfig
from .modeling import SpeechLLMForConditionalGeneration
from .processing import SpeechLLMProcessor, ctc_token_ids


def compose(
    encoder: str, language_model: str, **options: Any
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """encoder, language_model: folders or hub ids; options: fields of `SpeechLLMConfig`. Weights are float32."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    ctc_tokens = ctc_token_ids(tokenizer)
    config = SpeechLLMConfig(
        AutoConfig.from_pretrained(encoder),
        AutoConfig.from_pretrained(language_model),
        ctc_vocabulary_size=len(ctc_tokens),
        **options,
    )
    model = SpeechLLMForConditionalGeneration(config)
    pretrained = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    model.encoder = pretrained.get_encoder() if config.audio_config.is_encoder_decoder else pretrained
    model.language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    processor = SpeechLLMProcessor.from_config(config, AutoFeatureExtractor.from_pretrained(encoder), tokenizer)
    config.audio_token_id = processor.audio_token_id
    model.ctc_tokens = torch.tensor(ctc_tokens)
    model.language_model.generation_config.eos_token_id = processor.end_token_id
    return model, processor
