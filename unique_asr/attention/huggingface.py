"""UNIQUE attention in transformers: the attention function, its mask, and the switch for a model.

The attention function equals `sdpa` but for one case: one query token a row over a `PagedCache` that holds more than
the budget. It finds the cache layer on the keys that `PagedLayer.update` returned, and leaves the step to `steps.py`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

from unique_asr.attention.cache import PagedCache
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.counters import SparsityCounters
from unique_asr.attention.dense import attend_densely
from unique_asr.attention.generation_cache import CacheMaker, CachePreparation, MethodHook, PrefixConversion
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.attention.steps import read_prompt, run_eager_step, run_static_step, run_static_step_operator
from unique_asr.attention.supported import check_cached, check_call, check_decoder

NAME = "unique"  # of the attention implementation; it must not contain sdpa, flex_attention or flash_attention
WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")  # where DDP, torch.compile and FSDP keep the model
LOANS = threading.Lock()
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")  # what models call the norm of a head's queries


def unique_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend, sparsely where a decode step over a paged cache is sparse; the signature is that of transformers.

    Args:
        module: the attention module of the model.
        query: [B, H, T, D], post-RoPE.
        key: [B, K, N, D]; value: [B, K, N, D]; as `PagedLayer.update` returned them, or any others.
        attention_mask: what `make_padding_mask` gives.
        dropout: of dense attention.
        scaling: of the attention logits; None: 1 / sqrt(D).

    Returns:
        [B, T, H, D], and None in the place of the weights.

    Raises:
        ValueError: the attention is one that `supported.py` refuses.
    """
    check_call(module, attention_mask, NAME, kwargs)
    check_cached(module, query, key, value, attention_mask, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: PagedLayer | None = getattr(key, "paged_layer", None)
    if layer is not None and layer.step is not None:
        if torch.compiler.is_compiling():
            return run_static_step_operator(query, key, value, layer.index, scaling), None
        return run_static_step(layer, query, key, value, scaling), None
    if layer is not None:
        padding = read_padding(attention_mask) if layer.is_sparse else (None, None)
        if query.shape[2] == 1:
            layer.count_step()
            output = run_eager_step(layer, query, scaling, *padding)
            if output is not None:
                return output.flatten(1, 2).unsqueeze(1), None
        elif layer.is_sparse:
            read_prompt(layer, query, scaling, *padding)
    return attend_densely(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def make_padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """Make the mask of padding; the signature is that of transformers' mask functions.

    The causal part is never built for the whole prefill: `dense.attend_densely` adds it.

    Returns:
        None for plain causal attention. [B, 1, 1, N], False for padding, for causal attention with padding; if all
        padding is on the left, the mask carries its length in each row as the attribute `starts` (int64 [B]), and on
        the host as `padding` (a list). For any other mask function, the mask of `sdpa`.
    """
    if mask_function is not causal_mask_function or kv_offset:
        arguments = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function}
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **arguments, **kwargs)
    if attention_mask is None or attention_mask[:, :kv_length].all():
        return None
    tokens = attention_mask[:, :kv_length].bool()
    mask = attention_mask[:, None, None, :kv_length]
    starts = tokens.int().argmax(dim=1)
    if torch.equal(tokens, torch.arange(tokens.shape[1], device=tokens.device) >= starts.unsqueeze(1)):
        mask.starts, mask.padding = starts, starts.tolist() if q_length > 1 else None
    return mask


def read_padding(attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return which tokens the last query may see, bool [B, N], and `starts` if the mask carries them; None for none."""
    if attention_mask is None:
        return None, None
    row = attention_mask[:, 0, -1]
    return row if row.dtype == torch.bool else row == 0, getattr(attention_mask, "starts", None)


AttentionInterface.register(NAME, unique_attention_forward)
AttentionMaskInterface.register(NAME, make_padding_mask)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model itself, without DistributedDataParallel or torch.compile around it.

    Raises:
        ValueError: it is no model of transformers, nor around one.
    """
    given = model
    if not isinstance(model, nn.Module):
        raise ValueError(f"{describe(given)} cannot read by pages: give a model of transformers")
    while not isinstance(model, PreTrainedModel):
        inner = next((model._modules[name] for name in WRAPPED if name in model._modules), None)
        if inner is None:
            break
        model = inner
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise ValueError(f"{describe(given)} cannot read by pages: give a model of transformers")
    return model


def describe(value: object) -> str:
    """Return the name of a class, or of the class of anything else, for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def find_text_decoder(model: nn.Module) -> PreTrainedModel:
    """Return the outermost module with the configuration of the text decoder: the model itself, or a speech LLM's LLM.

    Raises:
        ValueError: the model has none.
    """
    model = unwrap(model)
    config = model.config.get_text_config(decoder=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return module
    raise ValueError(f"{type(model).__name__} has no text decoder that {NAME!r} attention could be switched on for")


def set_attention(model: PreTrainedModel, name: str) -> str:
    """Switch the text decoder's attention implementation, and leave encoders alone.

    Returns:
        The name of the former implementation.

    Raises:
        ValueError: the model does not let its attention be switched, or has cross-attention.
    """
    decoder = find_text_decoder(model)
    check_decoder(decoder, name)
    former = decoder.config._attn_implementation
    encoders = {
        key: config._attn_implementation
        for key in decoder.config.sub_configs
        if (config := getattr(decoder.config, key, None)) is not None
    }
    decoder.set_attn_implementation({"": name} | encoders if encoders else name)
    if decoder.config._attn_implementation != name:
        raise ValueError(f"{type(decoder).__name__} does not let its attention be switched: it cannot run sparsely")
    return former


@dataclass(eq=False)
class AttentionSwitch:
    """One of the switches of a text decoder, which keeps them in `_attention_switches`, the oldest first."""

    name: str  # of the attention implementation
    former: str  # what it was before


def switch_attention(model: nn.Module, name: str) -> AttentionSwitch:
    """Do what `set_attention` does, to be taken back by `restore_attention`: in any order with other switches."""
    switch = AttentionSwitch(name, set_attention(model, name))
    vars(find_text_decoder(model)).setdefault("_attention_switches", []).append(switch)
    return switch


def restore_attention(model: nn.Module, switch: AttentionSwitch) -> None:
    """Take a switch back. What was before it follows where it is the newest; else the next newer one remembers that."""
    decoder = find_text_decoder(model)
    switches = vars(decoder)["_attention_switches"]
    index = switches.index(switch)
    if switch is switches[-1]:
        set_attention(model, switch.former)
    else:
        switches[index + 1].former = switch.former
    del switches[index]
    if not switches:
        del decoder._attention_switches


class AttentionLoan:
    """The attention of a text decoder while a block lasts, for engines that own a cache; then the model is as it was.

        loan = AttentionLoan(model, NAME)
        with loan:                                  # in microseconds
            model(..., **{CACHE_ARGUMENT: cache})

    Several engines, and threads, may be in such a block of one model: the last one to leave it puts the former back.

    Raises:
        ValueError: as `set_attention`, when it is made.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._decoder, self.name = find_text_decoder(model), name
        former = set_attention(model, name)
        configs = (getattr(module, "config", None) for module in self._decoder.modules())
        own = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
        self._configs = [config for config in own.values() if config._attn_implementation == name]
        set_attention(model, former)

    def __enter__(self) -> None:
        with LOANS:
            formers = [config._attn_implementation for config in self._configs]
            count, formers = vars(self._decoder).get("_attention_loan", (0, formers))
            self._decoder._attention_loan = count + 1, formers
            for config in self._configs:
                assign_attention(config, self.name)

    def __exit__(self, *exception) -> None:
        with LOANS:
            count, formers = self._decoder._attention_loan
            self._decoder._attention_loan = count - 1, formers
            if count == 1:
                del self._decoder._attention_loan
                for config, former in zip(self._configs, formers, strict=True):
                    assign_attention(config, former)


def assign_attention(config: PreTrainedConfig, name: str) -> None:
    """Write the name of the attention implementation to a configuration, and leave those inside it as they are."""
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    inner = {key: value._attn_implementation for key, value in inner.items() if value is not None}
    config._attn_implementation = {"": name} | inner if inner else name


def resolve_combine(config: SparseAttentionConfig, model: PreTrainedModel) -> SparseAttentionConfig:
    """Choose `combine` if the configuration leaves it open: share for heads that normalise their queries, else max.

    The paper has max. The scales that such heads learn leave queries of very different lengths, and the spread of a
    page is weighted by the length: `max` would follow the longest of a group alone (Gemma 3, benchmarks/text.md). Other
    scores have no such term. A model that was trained through the selection keeps what it learned with
    (`config.sparse_attention`).
    """
    if config.combine is not None:
        return config
    if learned := (getattr(unwrap(model).config, "sparse_attention", None) or {}).get("combine"):
        return replace(config, combine=learned)
    normalised = config.score == "unique" and any(
        isinstance(getattr(module, name, None), nn.Module)
        for module in find_text_decoder(model).modules()
        for name in QUERY_NORMS
    )
    return replace(config, combine="share" if normalised else "max")


class SwitchedModel:
    """A model whose text decoder has another attention; leaving the `with` block, or `restore()`, puts everything back.

    Switches of one model end in any order: as long as one is on, the newest decides. A copy (`copy.deepcopy`, pickle)
    of the model is switched as well, for itself; `copy.deepcopy((model, switched))` also gives the switch of the copy.
    """

    name: ClassVar[str]  # of the attention implementation

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._switch: AttentionSwitch | None = None
        self._entered = 0  # `with` blocks under way
        self.apply()

    def apply(self) -> None:
        """Switch the attention on; it may be called again after `restore`."""
        if self._switch is None:
            self._switch = switch_attention(self.model, self.name)
            self._attach()

    def restore(self) -> None:
        """Put the former attention and all else back; calling it again does nothing."""
        if self._switch is not None:
            restore_attention(self.model, self._switch)
            self._switch = None
            self._detach()

    def _attach(self) -> None:
        """Let the model's modules find this object, as its attention is on."""

    def _detach(self) -> None:
        """Undo `_attach`."""

    def __enter__(self) -> Self:
        self.apply()
        self._entered += 1
        return self

    def __exit__(self, *exception) -> None:
        self._entered -= 1
        if not self._entered:
            self.restore()


class SparseAttention(SwitchedModel):
    """A model switched to UNIQUE attention.

    Attributes:
        config: with `combine` resolved.
        counters: of all decode steps of its caches.
    """

    name = NAME

    def __init__(self, model: nn.Module, config: SparseAttentionConfig):
        unwrap(model)  # raises if it is none
        self.config = resolve_combine(config, model)
        self.counters = SparsityCounters()
        self._maker = CacheMaker(self.config, self.counters)
        self._maker.make(find_text_decoder(model).config)  # raises before anything is switched if it has no pages
        self._hooks: list[MethodHook] = []
        super().__init__(model)

    def _attach(self) -> None:
        for module in self.model.modules():
            if isinstance(module, GenerationMixin):
                self._hooks.append(CachePreparation.add(module, self._maker))
            elif hasattr(type(module), PrefixConversion.method):
                self._hooks.append(PrefixConversion.add(module, self._maker))

    def _detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove(self._maker)

    def make_cache(self, capacity: int = 0) -> PagedCache:
        """Make a cache for this model that adds to these counters; `capacity` in tokens as for `PagedCache`."""
        return self._maker.make(find_text_decoder(self.model).config, capacity)


def sparse_attention(
    model: PreTrainedModel, config: SparseAttentionConfig | None = None, **overrides
) -> SparseAttention:
    """Let the text decoder of `model` read its KV cache by pages, from this call on or within a `with` block.

        sparse_attention(model, budget=512)
        model.generate(**inputs)

        with sparse_attention(model, budget=512, page_size=8) as sparse:
            model.generate(**inputs)
        print(sparse.counters)

    Encoders keep their attention.

    Args:
        model: a causal language model, or a speech LLM, of transformers; with PEFT, DistributedDataParallel or
            torch.compile around it, or not.
        config: None: the defaults.
        overrides: fields of `SparseAttentionConfig` in place of those of `config`.

    Raises:
        ValueError: a setting is not allowed, or the attention of the model cannot be switched.
    """
    if config is not None and not isinstance(config, SparseAttentionConfig):
        raise ValueError(f"config is {describe(config)}: give a SparseAttentionConfig, or fields such as budget=512")
    return SparseAttention(model, replace(config or SparseAttentionConfig(), **overrides))
