"""Training through the page selection in transformers: the attention function, its mask, and the switch for a model.

    with training_attention(model, TrainingAttentionConfig(mode="soft", tau=0.05, budget=256)):
        model(input_ids, labels=labels).loss.backward()

The method is in `soft_mask.py`. Nothing of the model or the loop around it is taken for granted: weights may be in
float32 under autocast (`Trainer(bf16=True)`, accelerate), and the model may be wrapped (DDP, PEFT, `torch.compile`) or
moved to another device after the switch.
"""

from __future__ import annotations

import inspect
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from unique_asr.attention.cache import PagedCache
from unique_asr.attention.huggingface import SwitchedModel, describe, find_text_decoder, unwrap
from unique_asr.attention.soft_mask import TrainingAttentionConfig, attention
from unique_asr.attention.supported import check_call, is_causal

NAME = "unique_training"  # of the attention implementation
LOCAL = ("sliding_attention", "chunked_attention")  # types of layers that keep their own attention


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
        decoded: bool [B, N], the queries of tokens that inference decodes; `TrainingAttention` derives it from the
            labels where the model's `forward` is not given it.

    Returns:
        [B, N, H, D], and None in the place of the weights.

    Raises:
        ValueError: the model or the call has what this attention does not support, `decoded` is missing, or
            backend=triton does not fit the configuration.
    """
    check_call(module, attention_mask, NAME, kwargs)
    if not is_causal(module, kwargs):
        raise ValueError(f"{type(module).__name__} is not causal: it cannot be read by pages")
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}: {NAME!r} attention has none; set it to 0")
    tokens = query.shape[2]
    if tokens != key.shape[2]:
        raise ValueError(f"{NAME!r} attention reads whole sequences: restore() the model before it generates")
    handle: TrainingAttention = module.training_attentions[-1]  # the newest
    config, window = handle.config, kwargs.get("sliding_window")
    query, key, value = unify_dtypes(query, key, value)
    is_dense = not handle.is_sparse(module.layer_idx, window)
    if window is not None and window < tokens:
        if attention_mask is None or attention_mask.shape[2] != tokens:
            attention_mask = make_window_mask(read_starts(attention_mask), window, tokens, query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    starts = read_starts(attention_mask)
    if starts is None and (not config.masks or is_dense):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    masked = None
    if is_dense:
        masked = torch.zeros(1, tokens, dtype=torch.bool, device=query.device)
    elif config.masks and config.queries == "decoded":
        masked = read_decoded(decoded, query)
    kernel = find_kernel(config.backend, query.device)
    if kernel is not None and not kernel.supports(key, config.sparse.combine, config.sparse.page_size):
        if config.backend == "triton":
            raise ValueError(
                "attention.backend is triton: its training kernel needs combine=max and pages of 8 or 16 tokens, of at "
                "most 4 KB; set backend=auto"
            )
        kernel = None
    with torch.autocast(query.device.type, enabled=False):  # the scores of pages are at least in float32
        if kernel is not None:
            return kernel.training_attention(query, key, value, config, starts, masked, scaling), None
        return attention(query, key, value, config, starts, masked, scaling).transpose(1, 2).contiguous(), None


def read_starts(attention_mask: Tensor | None) -> Tensor | None:
    """Return `starts` [B, N] of what `make_starts_mask` gives.

    Raises:
        ValueError: it is another 4-D mask.
    """
    if attention_mask is None:
        return None
    integers = not (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool)
    if not integers or attention_mask.shape[1] != 1 or attention_mask.shape[2] != 1:
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} of shape {list(attention_mask.shape)}, which {NAME!r} attention "
            "does not support: give 1 for tokens and 0 for padding [B, N], and position_ids that begin at 0 in each "
            "document of a row"
        )
    return attention_mask[:, 0, 0]


def make_window_mask(starts: Tensor | None, window: int, tokens: int, device: torch.device) -> Tensor:
    """Make the mask of a layer with a sliding window, which stays dense: bool [B or 1, 1, N, N].

    Args:
        starts: [B, N], the first token that each query may see; None: one document a row.
        window: tokens that a query may see, itself included.
        tokens: N.
    """
    token = torch.arange(tokens, device=device)
    seen = (token <= token[:, None]) & (token > token[:, None] - window)
    if starts is None:
        return seen[None, None]
    return (seen & (token >= starts[..., None]))[:, None]


def read_decoded(decoded: Tensor | None, query: Tensor) -> Tensor:
    """Return `decoded`, bool [B or 1, N].

    Raises:
        ValueError: there is none, or not one value a token.
    """
    if decoded is None:
        raise ValueError(
            "attention.queries is decoded: pass labels=[B, N] or decoded=[B, N] to forward, or set queries=all "
            "for a model that does not hand them to its attention"
        )
    if decoded.shape[-1] != query.shape[2]:
        raise ValueError(
            f"decoded (or labels) has {decoded.shape[-1]} values a row for {query.shape[2]} tokens: pass decoded=[B, N]"
        )
    return decoded


def unify_dtypes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three in one dtype: that of autocast, as `sdpa` has it there, else that of the values.

    Rotary embeddings of float32 weights under autocast give float32 queries and keys beside bfloat16 values.
    """
    device, dtype = query.device.type, value.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def find_kernel(backend: str, device: torch.device) -> ModuleType | None:
    """Import the module of the training kernel, or return None for plain PyTorch.

    Args:
        backend: of the configuration: auto, torch or triton.
        device: of the queries. Triton may be missing where it is not needed.

    Raises:
        ValueError: triton is asked for where there is no CUDA device.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "torch" or (backend == "auto" and (interpreted or device.type != "cuda")):
        return None
    if device.type != "cuda" and not interpreted:
        raise ValueError(f"attention.backend is triton, which needs a CUDA device: the model is on {device}")
    from unique_asr.kernels import soft_mask_attention  # unlike import_module, a statement can be compiled

    return soft_mask_attention


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
        int32 [B, 1, 1, N], the first token that each query may see; None for one document a row. Where queries see
        other tokens than those from a first one to themselves (a sliding window, a prefix), the mask of `sdpa`; a
        compiled model takes it that they do not, as it cannot look.

    Raises:
        ValueError: padding lies between tokens.
    """
    if mask_function is causal_mask_function and attention_mask is None:
        return None
    device = device if attention_mask is None else attention_mask.device
    token = torch.arange(kv_length, device=device)
    row = torch.arange(batch_size, device=device)[:, None]

    def sees(query: Tensor, key: Tensor) -> Tensor:
        """Whether token `query` [B or 1, N] of each row may see token `key` [B or 1, N]: bool [B, N]."""
        seen = torch.as_tensor(mask_function(row, 0, query, key), device=device)
        return seen.expand(batch_size, kv_length)

    before, after = (token - 1).clamp(min=0), (token + 1).clamp(max=kv_length - 1)
    begins = ~sees(token[None], before[None]) | (token == 0)
    real = None
    if attention_mask is not None:
        real = attention_mask[:, :kv_length].bool()
        begins = begins | ~(real & real[:, before])
    starts = torch.where(begins, token, 0).cummax(dim=1).values
    if not torch.compiler.is_compiling():
        later = sees(token[None], after[None]) & (token < kv_length - 1)
        if mask_function is not causal_mask_function and (later | ~sees(token[None], starts)).any():
            arguments = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
            return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **arguments, **kwargs)
        if real is not None and (real & ~real[:, before] & (real.cumsum(1) > 1)).any():
            raise ValueError("attention_mask has padding between tokens of a row: put it at its beginning or end")
    return starts.int()[:, None, None]


AttentionInterface.register(NAME, training_attention_forward)
AttentionMaskInterface.register(NAME, make_starts_mask)


class TrainingAttention(SwitchedModel):
    """A model whose text decoder trains through the page selection.

    `config` may be replaced between a backward pass and the next forward pass.

    Attributes:
        model: without what it was wrapped in (DDP, PEFT, `torch.compile`).
    """

    name = NAME

    def __init__(self, model: nn.Module, config: TrainingAttentionConfig):
        unwrap(model)  # raises if it is no model
        model = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), model)
        self.config = config
        decoder = find_text_decoder(model)
        self._modules = [module for module in decoder.modules() if hasattr(module, "layer_idx")]
        PagedCache(decoder.config, config.sparse)  # raises if decoding would read no layer by pages
        self._layer_types = getattr(decoder.config, "layer_types", None) or []
        self._longest = getattr(decoder.config, "max_position_embeddings", None) or 0  # tokens; 0: unknown
        self._takes_decoded = any(
            parameter.kind is parameter.VAR_KEYWORD or parameter.name == "decoded"
            for parameter in inspect.signature(model.forward).parameters.values()
        )
        super().__init__(model)

    def is_sparse(self, layer: int, window: int | None = None) -> bool:
        """Whether decoding reads pages of this layer: not of the first `dense_layers`, nor where attention is local.

        Args:
            window: of a sliding window; one as long as the longest text is none.
        """
        if window is not None and not 0 < self._longest <= window:
            return False
        kind = self._layer_types[layer] if layer < len(self._layer_types) else "full_attention"
        return layer >= self.config.sparse.dense_layers and kind not in LOCAL

    def _attach(self) -> None:
        self._hook = self.model.register_forward_pre_hook(self._derive_decoded, with_kwargs=True)
        for module in self._modules:
            vars(module).setdefault("training_attentions", []).append(self)

    def _detach(self) -> None:
        self._hook.remove()
        for module in self._modules:
            module.training_attentions.remove(self)
            if not module.training_attentions:
                del module.training_attentions

    def _derive_decoded(self, model: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the model's `forward`: derive `decoded` from the labels, which a trainer passes."""
        labels = named.get("labels")
        wanted = self._takes_decoded and self.config.masks and self.config.queries == "decoded"
        if not wanted or labels is None or named.get("decoded") is not None:
            return None
        return arguments, named | {"decoded": labels != -100}


def training_attention(
    model: nn.Module, config: TrainingAttentionConfig | None = None, **values: Any
) -> TrainingAttention:
    """Let the text decoder of `model` train through the page selection, from this call on or within a `with` block.

    With queries=decoded, the mask is for the queries of tokens whose label is not -100, or pass `decoded` (bool [B, N])
    to the model's forward. Labels are those of transformers: of the tokens themselves, not shifted.

    Args:
        model: a causal language model, or a speech LLM, of transformers; it may be wrapped.
        config: None: made from `values`.
        values: fields of `TrainingAttentionConfig` and of `SparseAttentionConfig`, if there is no `config`.

    Raises:
        ValueError: a setting is not allowed, or the attention of the model cannot be switched.
    """
    if config is not None and not isinstance(config, TrainingAttentionConfig):
        raise ValueError(f"config is {describe(config)}: give a TrainingAttentionConfig, or fields such as mode='soft'")
    return TrainingAttention(model, config or TrainingAttentionConfig.from_dict(values))
