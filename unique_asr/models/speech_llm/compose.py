"""Making a new speech LLM of a pretrained encoder and a pretrained LLM; only the projector starts from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
)

from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.ctc import choose_ctc_vocabulary
from unique_asr.models.speech_llm.listener import Listener
from unique_asr.models.speech_llm.modeling import SpeechLLMForConditionalGeneration
from unique_asr.models.speech_llm.processing import SpeechLLMProcessor


def compose(
    encoder: str,
    language_model: str,
    ctc_texts: Iterable[str] = (),
    ctc_units: int | None = None,
    ctc_tokens: Sequence[int] | None = None,
    listener_ascii: bool = False,
    **options: Any,
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Make a speech LLM of two pretrained models, with float32 weights.

    Args:
        encoder, language_model: folders or hub ids. With merge="decoder", `encoder` has to be a whole Whisper model
            with its tokenizer, which then listens to English.
        ctc_texts, ctc_units: the CTC head writes this many of the tokens most frequent in the texts; None: all tokens.
        ctc_tokens: ids of the tokens that the CTC head writes, in place of these two.
        listener_ascii: with merge="decoder", leave out Whisper's tokens that are not ASCII, which are a quarter.
        options: fields of `SpeechLLMConfig`.

    Returns:
        The model and its processor.

    Raises:
        ValueError: options do not fit each other.
    """
    audio_config, text_config = AutoConfig.from_pretrained(encoder), AutoConfig.from_pretrained(language_model)
    audio_config.name_or_path = text_config.name_or_path = ""  # folders of this machine say nothing elsewhere
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    ctc_tokens = ctc_tokens or choose_ctc_vocabulary(tokenizer, ctc_texts, ctc_units)
    if options.get("merge") == "decoder":
        whisper_tokens = AutoTokenizer.from_pretrained(encoder)
        kept = list_listener_tokens(whisper_tokens, ascii_only=listener_ascii)
        options["listener"] = make_listener_settings(encoder, audio_config, kept)
        audio_config.vocab_size = len(kept)
        audio_config.pad_token_id = audio_config.bos_token_id = audio_config.eos_token_id = options["listener"]["stop"]
        audio_config.decoder_start_token_id = options["listener"]["prompt"][0]
    config = SpeechLLMConfig(
        audio_config,
        text_config,
        ctc_vocabulary_size=len(ctc_tokens),
        **options,
    )
    model = SpeechLLMForConditionalGeneration(config)
    pretrained = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    model.encoder = pretrained.get_encoder() if config.audio_config.is_encoder_decoder else pretrained
    if config.merge == "decoder":
        weights = pretrained.decoder.state_dict()
        weights["embed_tokens.weight"] = weights["embed_tokens.weight"][kept]
        model.listener.decoder.load_state_dict(weights)
        texts = [whisper_tokens.decode([token]) for token in kept[: model.listener.stop]]
        model.listener.pieces = make_listener_pieces(texts, tokenizer, model.listener)
    model.language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    feature_extractor = AutoFeatureExtractor.from_pretrained(encoder)
    processor = SpeechLLMProcessor.from_config(config, feature_extractor, tokenizer, ctc_tokens)
    config.audio_token_id = processor.audio_token_id
    model.ctc_tokens = torch.tensor(ctc_tokens)
    config.text_config.eos_token_id = processor.end_token_id
    model.language_model.generation_config.eos_token_id = processor.end_token_id
    return model, processor


REQUEST = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]  # English text without times


def list_listener_tokens(whisper: PreTrainedTokenizerBase, ascii_only: bool) -> list[int]:
    """List the ids of Whisper that the listener keeps: those of text, the end of a transcript, and the request."""
    end = whisper.convert_tokens_to_ids("<|endoftext|>")
    texts = [token for token in range(end) if not ascii_only or whisper.decode([token]).isascii()]
    return [*texts, end, *whisper.convert_tokens_to_ids(REQUEST)]


def make_listener_settings(folder: str, config: WhisperConfig, kept: list[int]) -> dict[str, Any]:
    """Make the arguments of `Listener`: how Whisper is asked, and which heads align. Ids are places in `kept`."""
    generation, place = GenerationConfig.from_pretrained(folder), {token: index for index, token in enumerate(kept)}
    last = [[config.decoder_layers - 1, head] for head in range(config.decoder_attention_heads)]
    suppressed = getattr(generation, "suppress_tokens", None) or []
    return {
        "prompt": list(range(len(kept) - len(REQUEST), len(kept))),
        "stop": len(kept) - len(REQUEST) - 1,
        "heads": getattr(generation, "alignment_heads", None) or last,
        "suppressed": [place[token] for token in suppressed if token in place],
    }


def make_listener_pieces(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, listener: Listener) -> torch.Tensor:
    """Cut the texts of Whisper's tokens into tokens of the LLM, [V, PIECES]; none for parts of a character."""
    pieces = torch.full_like(listener.pieces, -1)
    for place, text in enumerate(texts):
        if "\ufffd" not in text:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: pieces.shape[1]]
            pieces[place, : len(ids)] = torch.tensor(ids, dtype=pieces.dtype)
    return pieces
