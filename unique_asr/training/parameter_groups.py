"""Which weights a stage trains, and at which rates."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from unique_asr.training.lora import PART as LORA
from unique_asr.training.lora import list_parts
from unique_asr.training.stages import StageConfig

LAYER = re.compile(r"\blayers\.(\d+)\.")


def make_parameter_groups(model: PreTrainedModel, stage: StageConfig) -> list[dict]:
    """Switch the gradients of everything on or off, and give an optimiser's groups of what trains.

    Returns:
        For each part of `stage.train`, {"params": its parameters, "lr": 0.0, "peak": its rate}. The longest name wins
        where parts lie in each other: encoder.layers.5 has its own rate beside encoder.

    Raises:
        ValueError: a part has no parameters.
    """
    parts = list_parts(model)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    prefixes = {part: _make_prefixes(part, parts) for part in stage.train}
    llm = parts["language_model"]
    groups = {part: {"params": [], "lr": 0.0, "peak": peak} for part, peak in stage.train.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        # The embedding table stays: the CTC head reads it, and it is stored exactly as it came.
        if id(parameter) in embeddings or "embed_positions" in name:
            continue
        if (layer := LAYER.search(name)) and name.startswith(llm) and int(layer[1]) < stage.frozen_layers:
            continue
        found = [part for part, prefix in prefixes.items() if name.startswith(prefix)]
        if ".lora_" in name:
            found = [part for part in stage.train if part == LORA]
        if name.startswith("projector.residual."):
            found = [part for part in found if part == "residual"]
        if found:
            parameter.requires_grad_(True)
            groups[max(found, key=lambda part: len(prefixes[part][0]))]["params"].append(parameter)
    unknown = [part for part, group in groups.items() if not group["params"]]
    if unknown:
        raise ValueError(
            f"stage {stage.name}: train has unknown parts {unknown}; give {', '.join(parts)}, lora (if `lora` is set), "
            "or how the names of some weights begin, such as language_model.layers.5"
        )
    return list(groups.values())


def freeze(model: nn.Module) -> None:
    """Switch all gradients off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _make_prefixes(part: str, parts: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """How the names of a part's weights begin; encoder.layers.5 are layers of what the model calls otherwise."""
    head, _, rest = part.partition(".")
    return tuple(f"{begin}{rest}." if rest else begin for begin in parts.get(head, (f"{head}.",)))
