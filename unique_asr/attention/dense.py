"""Dense attention over a paged cache: `sdpa`, and chunks of a prefill without a mask of the whole.

The queries of a chunk are those of the last tokens. FlashAttention aligns them so by itself; elsewhere the causal mask
is built for some of the queries at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

MASK_ELEMENTS = 1 << 24  # elements of a causal mask built at once: a chunked prefill goes by slices of queries
BATCHED_TOKENS = 4096  # up to here padded rows are prefilled together: a mask costs less than launches for each row


def attend_densely(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Attend as `sdpa` does, without a causal mask of a whole chunk of queries over a longer cache.

    Args:
        module: the attention module of the model.
        query: [B, H, T, D] of the last T tokens.
        key: [B, K, N, D]; value: [B, K, N, D].
        mask: what `huggingface.make_padding_mask` gives, or any mask [B, 1, T, N].
        kwargs: of transformers' attention functions.

    Returns:
        [B, T, H, D], and None in the place of the weights.
    """
    queries, tokens = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    if not causal or (mask is not None and mask.shape[2] == queries):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    padding = getattr(mask, "padding", None)
    if padding is None or tokens <= BATCHED_TOKENS or not supports_flash(query, key, value):
        return attend_causally(module, query, key, value, mask, **kwargs), None
    output = query.new_zeros(len(query), queries, query.shape[1], value.shape[-1])
    for row, start in enumerate(padding):
        first = max(0, start - (tokens - queries))  # queries before it are padding: their zeros are masked everywhere
        if first < queries:
            tensors = query[row, None, :, first:], key[row, None, :, start:], value[row, None, :, start:]
            output[row, first:] = attend_causally(module, *tensors, None, **kwargs)
    return output, None


def attend_causally(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
) -> Tensor:
    """Attend causally with the queries of the last tokens.

    Args:
        query: [B, H, T, D]; key: [B, K, N, D]; value: [B, K, N, D].
        mask: bool [B, 1, 1, N], False for padding; None: no padding.

    Returns:
        [B, T, H, D].
    """
    queries, tokens = query.shape[2], key.shape[2]
    if mask is None and queries in (1, tokens):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]
    if mask is None and supports_flash(query, key, value):
        bias, dropout = causal_lower_right(queries, tokens), kwargs.get("dropout", 0.0)
        output = F.scaled_dot_product_attention(
            query, key, value, bias, dropout, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return output.transpose(1, 2).contiguous()
    outputs = []
    past, rows = tokens - queries, max(1, MASK_ELEMENTS // tokens)
    position = torch.arange(tokens, device=query.device)
    for start in range(0, queries, rows):
        end = min(queries, start + rows)
        seen = past + end  # the later tokens are masked for every query of the slice
        part = position[:seen] <= position[past + start : seen, None]
        part = part[None, None] if mask is None else part & mask[..., :seen]
        arguments = query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], part
        outputs.append(sdpa_attention_forward(module, *arguments, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def supports_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention runs on these tensors: CUDA, 16 bits, and head dims up to 256."""
    return query.is_cuda and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))
