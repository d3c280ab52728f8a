"""The model: a Whisper model and a causal LM, with weights in one folder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from unique_asr.models.listening_llm.configuration import ListeningLLMConfig
from unique_asr.models.listening_llm.listener import WhisperListener
from unique_asr.models.listening_llm.prompts import HeardPrompt
from unique_asr.models.loading import convert_load_errors, resolve_device, resolve_dtype
from unique_asr.models.sources import locate_model
from unique_asr.models.speech_llm.packing import INDEX, load_packed, save_packed

LISTENER = "listener"  # folder of the Whisper model's tokenizer, features and generation settings


class ListeningLLM(PreTrainedModel):
    """A Whisper model that listens and a causal LM that reads what it heard; both are classes of transformers."""

    config_class = ListeningLLMConfig
    config: ListeningLLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["listener"]  # greedy choices between words that are nearly as likely

    def __init__(self, config: ListeningLLMConfig) -> None:
        super().__init__(config)
        self.listener = WhisperForConditionalGeneration(config.audio_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the LLM on token ids, as its own `forward` does."""
        return self.language_model(*args, **kwargs)


class ListeningProcessor:
    """What goes in and out of a `ListeningLLM`.

    Attributes:
        whisper: the listener's features and tokenizer.
        tokenizer: the LLM's.
        prompt: makes the LLM's prompts.
    """

    def __init__(self, whisper: WhisperProcessor, tokenizer: Any) -> None:
        self.whisper, self.tokenizer = whisper, tokenizer
        self.prompt = HeardPrompt(tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **options: Any) -> ListeningProcessor:
        """Read the processor from the folder of a model."""
        whisper = WhisperProcessor.from_pretrained(folder, subfolder=LISTENER, **options)
        return cls(whisper, AutoTokenizer.from_pretrained(folder, **options))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the processor into the folder of a model."""
        self.tokenizer.save_pretrained(folder)
        self.whisper.save_pretrained(Path(folder) / LISTENER)

    def make_listener(self, model: ListeningLLM) -> WhisperListener:
        """Make the listener of a model."""
        return WhisperListener(model.listener, self.whisper, model.config)


def compose_listening_llm(
    whisper: str | PathLike[str], language_model: str | PathLike[str], **options: Any
) -> tuple[ListeningLLM, ListeningProcessor]:
    """Make a model of two pretrained ones, with float32 weights.

    Args:
        whisper, language_model: folders or hub ids.
        options: fields of `ListeningLLMConfig`.

    Raises:
        ValueError: options do not fit, or the LLM's vocabulary lacks a mark of the prompt.
    """
    audio_config, text_config = AutoConfig.from_pretrained(whisper), AutoConfig.from_pretrained(language_model)
    audio_config.name_or_path = text_config.name_or_path = ""  # folders of this machine say nothing elsewhere
    model = ListeningLLM(ListeningLLMConfig(audio_config, text_config, **options))
    model.listener = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    model.language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    processor = ListeningProcessor(
        WhisperProcessor.from_pretrained(whisper), AutoTokenizer.from_pretrained(language_model)
    )
    model.language_model.generation_config.eos_token_id = processor.prompt.end_token_id
    return model.eval(), processor


def save_listening_llm(model: ListeningLLM, processor: ListeningProcessor, folder: Path, bits: dict[str, int]) -> None:
    """Write a model and its processor to a folder that `load_listening_llm` reads.

    Args:
        bits: bits of the stored weights by name prefix; see `packing.save_packed`.
    """
    tied = set(model.all_tied_weights_keys)
    save_packed({name: value for name, value in model.state_dict().items() if name not in tied}, folder, bits)
    model.config.save_pretrained(folder)
    model.language_model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.listener.generation_config.save_pretrained(folder / LISTENER)


def load_listening_llm(
    name_or_path: str | PathLike[str], device: str = "auto", dtype: str = "auto"
) -> tuple[ListeningLLM, ListeningProcessor]:
    """Load a model for inference; arguments and errors are those of `unique_asr.models.load`.

    Raises:
        ModelError: the folder holds no such model.
    """
    chosen = resolve_device(device)
    precision = resolve_dtype(dtype, chosen)
    source, revision = locate_model(name_or_path)
    with convert_load_errors(name_or_path, "speech LLM", "; try model=default"):
        processor = ListeningProcessor.from_pretrained(source, **revision)
        options = {"dtype": precision, "output_loading_info": True, **revision}
        if (Path(source) / INDEX).is_file():
            config, state = ListeningLLMConfig.from_pretrained(source), load_packed(Path(source), precision)
            model, info = ListeningLLM.from_pretrained(None, config=config, state_dict=state, **options)
        else:
            model, info = ListeningLLM.from_pretrained(source, **options)
        if info["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        model.listener.generation_config = GenerationConfig.from_pretrained(
            source, config_file_name=f"{LISTENER}/generation_config.json", **revision
        )
    model.config.name_or_path = str(name_or_path)
    return model.to(chosen).eval(), processor
