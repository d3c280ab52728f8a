"""Loading a speech LLM of our architecture, from packed weights or from those of `save_pretrained`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from unique_asr.models.loading import convert_load_errors, resolve_device, resolve_dtype
from unique_asr.models.sources import locate_model
from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.modeling import SpeechLLMForConditionalGeneration
from unique_asr.models.speech_llm.packing import INDEX, load_packed
from unique_asr.models.speech_llm.processing import SpeechLLMProcessor


def load(
    name_or_path: str | PathLike[str] = "default", device: str = "auto", dtype: str = "auto"
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Load a speech LLM of our architecture for inference.

    Arguments, results and errors are those of `unique_asr.models.load`.

    Raises:
        ModelError: also for a model of any other architecture.
    """
    chosen = resolve_device(device)
    precision = resolve_dtype(dtype, chosen)
    source, revision = locate_model(name_or_path)
    with convert_load_errors(name_or_path, "speech LLM", "; try model=default"):
        kind = SpeechLLMConfig.get_config_dict(source, **revision)[0].get("model_type", "nothing")
        if kind != SpeechLLMConfig.model_type:
            raise ValueError(f"its config.json describes {kind}, not {SpeechLLMConfig.model_type}")
        processor = SpeechLLMProcessor.from_pretrained(source, **revision)
        options = {"dtype": precision, "output_loading_info": True, **revision}
        if (Path(source) / INDEX).is_file():
            config, state = SpeechLLMConfig.from_pretrained(source), load_packed(Path(source), precision)
            source, options = None, options | {"config": config, "state_dict": state}
        model, info = SpeechLLMForConditionalGeneration.from_pretrained(source, **options)
        if info["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
    model.config.name_or_path = str(name_or_path)
    return model.to(chosen).eval(), processor
