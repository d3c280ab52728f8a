"""Weights packed to 4, 5, 6 or 8 bits a value, so that the default model fits in a package of less than 150 MB.

Each row is cut into groups of 32 values that share one fp16 scale: value = scale * integer, symmetric. 8-bit groups of
32 are GGUF's Q8_0, so a table that came as Q8_0 is kept exactly. Packing is storage only: loading gives ordinary
weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

GROUP = 32  # values that share a scale
INDEX = "packed_weights.json"  # the file that says how each weight is packed and where it is


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack a weight.

    Args:
        weight: [..., C], with C a multiple of 32.
        bits: 4, 5, 6 or 8.

    Returns:
        Packed values, uint8 [..., C * bits / 8], and scales, fp16 [..., C / 32].

    Raises:
        ValueError: `bits` is none of these.
    """
    integers, scale = _scale_to_integers(weight, bits)
    return _pack((integers.flatten(-2) + 2 ** (bits - 1) - 1).to(torch.uint8), bits), scale


def round_to_bits(weight: Tensor, bits: int) -> Tensor:
    """Round a weight [..., C] to the values that `quantize` keeps of it, float32."""
    integers, scale = _scale_to_integers(weight, bits)
    return (integers * scale.float()[..., None]).flatten(-2)


def _scale_to_integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Compute the integers [..., C / 32, 32], as floats, and the scales fp16 [..., C / 32] of a weight."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    limit = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1) / limit).half()
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    return (groups / divisor[..., None]).round().clamp(-limit, limit), scale


def find_bits(name: str, bits: Mapping[str, int]) -> int | None:
    """Find the bits of a weight: those of the longest prefix of its name, or None if it is not packed."""
    prefix = max((prefix for prefix in bits if name.startswith(prefix)), key=len, default=None)
    return None if prefix is None else bits[prefix]


def dequantize(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack what `quantize` made: [..., C] in `dtype`."""
    limit = 2 ** (bits - 1) - 1
    integers = _unpack(packed, bits).to(torch.int8 if bits < 8 else torch.int16) - limit
    return (integers.unflatten(-1, (-1, GROUP)).float() * scale.float()[..., None]).flatten(-2).to(dtype)


def _pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers [..., C], uint8 below 2 ** bits, into bytes [..., C * bits / 8]."""
    if bits == 8:
        return values
    if bits == 6:
        a, b, c, d = values.unflatten(-1, (-1, 4)).unbind(-1)
        return torch.stack([a | (d & 3) << 6, b | (d & 12) << 4, c | (d & 48) << 2], -1).flatten(-2)
    if bits not in (4, 5):
        raise ValueError(f"bits must be 4, 5, 6 or 8, not {bits}")
    low, high = (values & 15).unflatten(-1, (2, -1)).unbind(-2)
    nibbles = low | high << 4
    if bits == 4:
        return nibbles
    fifth = (values >> 4).unflatten(-1, (8, -1)).unbind(-2)
    return torch.cat([nibbles, sum(bit << place for place, bit in enumerate(fifth))], -1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    if bits == 6:
        x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
        return torch.stack([x & 63, y & 63, z & 63, x >> 6 | y >> 6 << 2 | z >> 6 << 4], -1).flatten(-2)
    nibbles = packed[..., : packed.shape[-1] * 4 // bits]
    values = torch.cat([nibbles & 15, nibbles >> 4], -1)
    if bits == 4:
        return values
    fifth = packed[..., nibbles.shape[-1] :]
    return values | torch.cat([(fifth >> place & 1) << 4 for place in range(8)], -1)


def save_packed(
    state: Mapping[str, Tensor], folder: Path, bits: Mapping[str, int], shard_bytes: int = 45_000_000
) -> None:
    """Write packed weights to a folder, in shards with an index.

    Args:
        state: weights by name.
        folder: it is created.
        bits: bits of matrices by name prefix, of which the longest one counts. Vectors, and matrices without a
            prefix or with rows that are no multiple of 32, stay fp16; integers stay as they are.
        shard_bytes: size of a shard, unless a single weight is larger.
    """
    index: dict[str, dict] = {}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        width = find_bits(name, bits)
        entry = {"bits": width} if width is not None and value.ndim == 2 and value.shape[-1] % GROUP == 0 else {}
        parts = _make_entries(name, value, **entry)
        added = sum(part.numel() * part.element_size() for part in parts.values())
        if size + added > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        size += added
        shards[-1].update(parts)
        index[name] = {"file": len(shards), **entry}
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    for entry in index.values():
        entry["file"] = files[entry["file"] - 1]
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _make_entries(name: str, value: Tensor, bits: int | None = None) -> dict[str, Tensor]:
    """Make the tensors of a file that hold a weight."""
    if bits is None:
        return {name: (value.half() if value.is_floating_point() else value).contiguous()}
    packed, scale = quantize(value, bits)
    return {name + ".packed": packed.contiguous(), name + ".scale": scale.contiguous()}


def save_packed_changes(changed: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """Copy a packed model with some of its weights changed; all else stays the same, byte for byte.

    Args:
        changed: new weights by name.
        source: folder of the packed model.
        folder: of the copy.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    index = json.loads((source / INDEX).read_text())
    for file in sorted({index[name]["file"] for name in changed}):
        shard = load_file(source / file)
        for name, value in changed.items():
            if index[name]["file"] == file:
                shard |= _make_entries(name, value.cpu(), index[name].get("bits"))
        save_file(shard, folder / file)


def save_packed_model(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, bits: Mapping[str, int]) -> None:
    """Write a model and its processor to a folder that `unique_asr.models.load` reads; bits: see `save_packed`."""
    tied = set(model.all_tied_weights_keys)
    save_packed({name: value for name, value in model.state_dict().items() if name not in tied}, folder, bits)
    model.config.save_pretrained(folder)
    model.language_model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer = folder / "tokenizer.json"  # written with an entry a line, which doubles its size
    if tokenizer.is_file():
        text = json.dumps(json.loads(tokenizer.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
        tokenizer.write_text(text, "utf-8")


def load_packed(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load the weights in `folder` by name, floating-point values in `dtype`."""
    index = json.loads((folder / INDEX).read_text())
    state = {}
    for file in sorted({entry["file"] for entry in index.values()}):
        with safe_open(folder / file, framework="pt") as shard:
            for name, entry in index.items():
                if entry["file"] != file:
                    continue
                if "bits" in entry:
                    packed, scale = shard.get_tensor(name + ".packed"), shard.get_tensor(name + ".scale")
                    state[name] = dequantize(packed, scale, entry["bits"], dtype)
                else:
                    value = shard.get_tensor(name)
                    state[name] = value.to(dtype) if value.is_floating_point() else value
    return state
