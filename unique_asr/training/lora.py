"""LoRA in the LLM (arXiv 2106.09685), by peft; what is saved has no trace of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from unique_asr.models.pretrained import find

EXTENSION = "embed_tokens_extend"  # of Phi-4's decoder: its encoders of audio and images
PART = "lora"  # its name in a stage's `train`


@dataclass
class LoraSettings:
    """Low-rank updates of the LLM's linear layers: weight + alpha / rank * B A."""

    rank: int = 64
    alpha: float = 128.0
    targets: str | list[str] = "all-linear"  # or how the names of the layers end: q_proj, v_proj ...
    dropout: float = 0.0


def add_lora(model: PreTrainedModel, config: LoraSettings) -> None:
    """Put LoRA that changes nothing yet into the LLM (of a speech LLM, its own); a stage trains it as `lora`.

    Raises ValueError if `targets` names no linear layer.
    """
    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets,
        lora_dropout=config.dropout,
        exclude_modules=rf"{EXTENSION}\..*" if hasattr(find_language_model(model), EXTENSION) else None,
    )
    try:
        inject_adapter_in_model(options, find_language_model(model))
    except ValueError as error:
        raise ValueError(f"lora.targets is {config.targets}: {str(error).splitlines()[0]}") from None
    model.to(model.device)


@torch.no_grad()
def copy_without_lora(model: PreTrainedModel) -> PreTrainedModel:
    """A model to save: the original layout, with LoRA merged, other weights shared; the model itself if it has none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        return model
    state = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        merged = (weight + layer.get_delta_weight("default")).to(weight.dtype)
        state[f"{name}.weight"] = merged.cpu()  # a second LLM may not fit beside the first
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for ours, theirs in ((plain, model), (find_language_model(plain), find_language_model(model))):
        if theirs.can_generate():
            ours.generation_config = theirs.generation_config
    return plain


def find_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The LLM of a speech LLM (of a known model its decoder), or the model itself."""
    return model.get_decoder() if find(model) else getattr(model, "language_model", model)


def list_parts(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """By each part that a stage's `train` may name, how the names of its weights begin."""
    if known_model := find(model):
        return known_model.parts
    if find_language_model(model) is model:
        return {"language_model": ("",)}
    named = {part: (f"{part}.",) for part in ("encoder", "projector", "residual", "language_model")}
    return named | {"residual": ("projector.residual.",)}
