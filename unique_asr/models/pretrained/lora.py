"""LoRA weights that come with a known model: switched on where it keeps them for speech, or merged into its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MERGED = "lora_merged"  # field of a model's configuration: its LoRA weights for speech are part of its own weights


def load_lora(model: Any, folder: str, source: str, **options: str) -> None:
    """Load and switch on the LoRA weights that a model keeps for speech.

    Args:
        model: a transformers model; it is changed.
        folder: where the LoRA weights are, below `source`.
        source: the folder or the hub id of the model.
        options: `revision` of a hub id.
    """
    from peft.tuners.lora import LoraLayer

    if Path(source).is_dir():
        model.load_adapter(str(Path(source) / folder), adapter_name="speech")
    else:
        model.load_adapter(source, adapter_name="speech", adapter_kwargs={"subfolder": folder, **options})
    for module in model.modules():  # transformers 5.24's own `set_adapter` asks for a peft that is not released
        if isinstance(module, LoraLayer):
            module.set_adapter("speech")


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add the LoRA weights of a model to its own weights, in place; saved, it loads without them."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        model._hf_peft_config_loaded = False
        setattr(model.config, MERGED, True)
