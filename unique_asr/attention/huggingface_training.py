"""Training through the page selection in transformers: the attention function, its mask, and the switch for a model.

    with training_attention(model, TrainingAttentionConfig(mode="soft", tau=0.05, budget=256)):
        model(input_ids, labels=labels, decoded=labels != -100).loss.backward()

The method is in `soft_mask.py`.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from unique_asr.attention.huggingface import find_text_decoder, set_attention
from unique_asr.attention.soft_mask import TrainingAttentionConfig, attention

NAME = "unique_training"  # of the attention implementation


def training_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    decoded: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend through the page mask of training; the signature is that of transformers' attention functions.

    Args:
        query: [B, H, N, D], post-RoPE; key: [B, K, N, D]; value: [B, K, N, D].
        attention_mask: what `make_starts_mask` gives.
        decoded: bool [B, N], passed to the model's `forward`: the queries of tokens that inference decodes.

    Returns:
        [B, N, H, D], and None in the place of the weights.

    Raises:
        ValueError: the model or the call has what this attention does not support, `decoded` is missing, or
            backend=triton does not fit the configuration.
    """
    for unknown in ("s_aux", "softcap", "sliding_window"):
        given = kwargs.get(unknown)
        if given is not None and not (unknown == "sliding_window" and given >= query.shape[2]):
            raise ValueError(f"{type(module).__name__} has {unknown}, which {NAME!r} attention does not support")
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}: {NAME!r} attention has none; set it to 0")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{NAME!r} attention reads whole sequences: restore() the model before it generates")
    handle: TrainingAttention = module.training_attention
    config = handle.config
    starts = None if attention_mask is None else attention_mask[:, 0, 0]
    if starts is None and (not config.masks or module.layer_idx < config.sparse.dense_layers):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    masked = None
    if module.layer_idx < config.sparse.dense_layers:
        masked = torch.zeros(1, query.shape[2], dtype=torch.bool, device=query.device)
    elif config.masks and config.queries == "decoded":
        if decoded is None:
            raise ValueError("attention.queries is decoded: pass decoded=[B, N] to forward, or set queries=all")
        masked = decoded
    if handle.kernel is not None:
        if handle.kernel.supports(key, config.sparse.combine, config.sparse.page_size):
            return handle.kernel.training_attention(query, key, value, config, starts, masked, scaling), None
        if config.backend == "triton":
            raise ValueError(
                "attention.backend is triton: its training kernel needs combine=max and pages of 8 or 16 tokens, of at "
                "most 4 KB; set backend=auto"
            )
    return attention(query, key, value, config, starts, masked, scaling).transpose(1, 2), None


def find_kernel(backend: str, device: torch.device) -> ModuleType | None:
    """Import the module of the training kernel, or return None for plain PyTorch.

    Args:
        backend: of the configuration: auto, torch or triton.
        device: of the model. Triton may be missing where it is not needed.

    Raises:
        ValueError: triton is asked for where there is no CUDA device.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "torch" or (backend == "auto" and (interpreted or device.type != "cuda")):
        return None
    if device.type != "cuda" and not interpreted:
        raise ValueError(f"attention.backend is triton, which needs a CUDA device: the model is on {device}")
    return importlib.import_module("unique_asr.kernels.soft_mask_attention")


def make_starts_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """Make the `starts` of every query from a mask; the signature is that of transformers' mask functions.

    A document begins wherever a token may not see the one before it; a padded token is a document of its own.

    Returns:
        int32 [B, 1, 1, N], the first token that each query may see; None for one document a row.
    """
    if mask_function is causal_mask_function and attention_mask is None:
        return None
    device = device if attention_mask is None else attention_mask.device
    token = torch.arange(kv_length, device=device)
    row = torch.arange(batch_size, device=device)[:, None]
    before = (token - 1).clamp(min=0)
    begins = ~torch.as_tensor(mask_function(row, 0, token[None], before[None]), device=device)
    begins = begins.expand(batch_size, kv_length) | (token == 0)
    if attention_mask is not None:
        real = attention_mask[:, :kv_length].bool()
        begins = begins | ~(real & real[:, before])
    starts = torch.where(begins, token, 0).cummax(dim=1).values
    return starts.int()[:, None, None]


AttentionInterface.register(NAME, training_attention_forward)
AttentionMaskInterface.register(NAME, make_starts_mask)


class TrainingAttention:
    """A model whose text decoder trains through the page selection; `with` or `restore()` puts everything back.

    `config` may be replaced between a backward pass and the next forward pass.
    """

    def __init__(self, model: PreTrainedModel, config: TrainingAttentionConfig):
        self.model, self.config = model, config
        self.kernel = find_kernel(config.backend, model.device)
        self._modules = [module for module in find_text_decoder(model).modules() if hasattr(module, "layer_idx")]
        self._former: str | None = None
        self.apply()

    def apply(self) -> None:
        """Switch the attention on; it may be called again after `restore`."""
        if self._former is None:
            self._former = set_attention(self.model, NAME)
            for module in self._modules:
                module.training_attention = self

    def restore(self) -> None:
        """Put the former attention back; calling it again does nothing."""
        if self._former is None:
            return
        set_attention(self.model, self._former)
        self._former = None
        for module in self._modules:
            del module.training_attention

    def __enter__(self) -> TrainingAttention:
        return self

    def __exit__(self, *exception) -> None:
        self.restore()


def training_attention(
    model: PreTrainedModel, config: TrainingAttentionConfig | None = None, **values: Any
) -> TrainingAttention:
    """Let the text decoder of `model` train through the page selection, from this call on or within a `with` block.

    With queries=decoded, pass `decoded` (bool [B, N]) to the model's forward.

    Args:
        model: a causal language model, or a speech LLM, of transformers.
        config: None: made from `values`.
        values: fields of `TrainingAttentionConfig` and of `SparseAttentionConfig`, if there is no `config`.

    Raises:
        ValueError: a setting is not allowed, or the attention of the model cannot be switched.
    """
    return TrainingAttention(model, config or TrainingAttentionConfig.from_dict(values))
