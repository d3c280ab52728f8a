"""What a model's attention must be like: anything else is refused, not computed wrongly or left dense unnoticed.

What reaches the attention function decides, not the name of the class, so that a new model of transformers needs no
entry here. `docs/sparse-attention.md` lists the classes; `tests/attention/test_supported.py` derives that list.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from unique_asr.attention.cache import ACTIVE, CACHE_ARGUMENT

EXTRAS = {  # arguments of an attention function by which logits, or what is read, are not those of query and key alone
    "s_aux": "sink logits",
    "sinks": "sink logits",
    "softcap": "soft-capping",
    "position_bias": "a bias of positions",
    "indices": "a selection of its own",
    "block_indices": "a selection of its own",
}


def check_decoder(decoder: PreTrainedModel, name: str) -> None:
    """Refuse decoders that attend to more than their own tokens.

    Encoder-decoders have no text decoder by themselves, see `huggingface.find_text_decoder`.

    Args:
        decoder: the text decoder, or the model that holds it.
        name: of the attention implementation, for the message.

    Raises:
        ValueError: it has cross-attention, whose keys would lie in the same cache.
    """
    if getattr(decoder.config, "cross_attention_layers", None):
        raise ValueError(f"{type(decoder).__name__} has cross-attention, which {name!r} attention does not support")


def check_call(module: nn.Module, attention_mask: Tensor | None, name: str, arguments: dict[str, Any]) -> None:
    """Refuse a call of the attention function that query, key, value and a mask of tokens do not describe.

    Args:
        attention_mask: [B, 1, 1 or T, N]; None: causal attention.
        name: of the attention implementation, for the message.
        arguments: those of transformers' attention functions that it does not name.

    Raises:
        ValueError: the logits have another term, or each head has a mask of its own.
    """
    for argument, meaning in EXTRAS.items():
        if arguments.get(argument) is not None:
            raise ValueError(f"{type(module).__name__} has {meaning}, which {name!r} attention does not support")
    if attention_mask is not None and attention_mask.shape[1] != 1:
        raise ValueError(f"{type(module).__name__} has a mask for each head, which {name!r} attention does not support")


def is_causal(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a call without a mask is causal; arguments as for `check_call`."""
    given = arguments.get("is_causal")
    return getattr(module, "is_causal", True) if given is None else given


def decodes(query: Tensor, key: Tensor) -> bool:
    """Whether a call is one of a decode step; a static step shows its new key alone, whatever is cached."""
    return query.shape[2] == 1 and (key.shape[2] > 1 or getattr(ACTIVE, "cache", None) is not None)


def check_cached(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arguments: dict[str, Any]
) -> None:
    """Refuse a call over a paged cache, or over another one, that a sparse step could not continue.

    Keys that a `PagedCache` returned have the attribute `paged_layer`: their layer, or None for a layer without pages
    (a sliding window). Values of a paged layer have it too.

    Args:
        query: [B, H, T, D].
        key: [B, K, N, D]; value: [B, K, N, D].
        mask: as for `check_call`; so are `arguments`.

    Raises:
        ValueError: the model attends to other keys or values than it caches, its cache has no pages, or it attends to
            later tokens.
    """
    causal = is_causal(module, arguments)
    if getattr(key, "paged_layer", None) is not None:
        if getattr(value, "paged_layer", None) is not key.paged_layer:
            raise ValueError(
                f"{type(module).__name__} attends to other values than it caches: it cannot be read by pages"
            )
        if not causal and query.shape[2] > 1 and (mask is None or mask.shape[2] != query.shape[2]):
            raise ValueError(f"{type(module).__name__} is not causal: it cannot be read by pages")
    elif not hasattr(key, "paged_layer") and causal and decodes(query, key):
        raise ValueError(
            f"{type(module).__name__} decodes with keys that no PagedCache holds, so nothing would be sparse: "
            f"pass {CACHE_ARGUMENT}=sparse.make_cache(); "
            "multi-head latent attention and others that change cached keys cannot be read by pages"
        )
