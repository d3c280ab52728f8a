"""FlashAttention's decoding of a paged cache, the fastest dense step of torch: what sparse steps are compared with.

Switch a model to it with `set_attention(model, FLASH)`. It reads exactly the tokens written when a step is captured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from unique_asr.attention.cache import ACTIVE
from unique_asr.attention.huggingface import make_padding_mask

FLASH = "dense_baseline"  # of the attention implementation


def flash_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Run a static step over exactly the tokens written when it is captured: [B, H, 1, D] -> [B, 1, H, D]."""
    return run_flash_attention_operator(query, key, value, key.paged_layer.index, scaling), None


@torch.library.custom_op("unique_asr::flash_attention", mutates_args=())
def run_flash_attention_operator(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    """Run the step as one operator, so that a compiled model is one graph; `layer` is the index in the cache."""
    paged = ACTIVE.cache.layers[layer]
    paged.write_token(key, value)
    keys, values = (buffer[:, :, : paged.length + 1] for buffer in (paged.keys, paged.values))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if query.is_cuda else nullcontext():
        output = F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


@run_flash_attention_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


AttentionInterface.register(FLASH, flash_attention_forward)
AttentionMaskInterface.register(FLASH, make_padding_mask)
