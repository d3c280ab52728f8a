"""UNIQUE attention in transformers: the attention function, its mask, and the switch for a model.

The attention function equals `sdpa` but for one case: one query token a row over a `PagedCache` that holds more than
the budget. It finds the cache layer on the keys that `PagedLayer.update` returned.

Two backends run that case: plain PyTorch (`reference.py`), and the Triton kernels where the cache is on CUDA.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from unique_asr.attention import reference
from unique_asr.attention.backend import kernels
from unique_asr.attention.cache import ACTIVE, PagedCache, PagedLayer
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.counters import SparsityCounters

NAME = "unique"  # of the attention implementation; it must not contain sdpa, flex_attention or flash_attention
MASK_ELEMENTS = 1 << 24  # elements of a causal mask built at once: a chunked prefill goes by slices of queries
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")  # what models call the norm of a head's queries
BATCHED_TOKENS = 4096  # of padded rows that are prefilled together: a mask costs less than launches for each row


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
    """query [B, H, Tq, D], key and value [B, K, N, D] -> [B, Tq, H, D]."""
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} has sink logits or soft-capping, which {NAME!r} does not support")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: PagedLayer | None = getattr(key, "paged_layer", None)
    if layer is not None and layer.step is not None:
        if torch.compiler.is_compiling():
            return static_attention_operator(query, key, value, layer.index, scaling), None
        return static_attention(layer, query, key, value, scaling), None
    if layer is not None and layer.sparse_layer:
        valid, starts = key_padding(attention_mask)
        if query.shape[2] > 1:
            layer.update_statistics(valid, starts)
        elif layer.sparse_at(layer.length):
            layer.count_step(layer.length)
            return sparse_step(layer, query, scaling, valid, starts).flatten(1, 2).unsqueeze(1), None
    if layer is not None and query.shape[2] == 1:
        layer.count_step(layer.length)
    return dense_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def unique_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """None for plain causal attention, [B, 1, 1, N] for causal attention with padding; otherwise as `sdpa`.

    The causal part is never built for the whole prefill: `dense_attention` adds it. A mask of padding that is all on
    the left carries the number of padded tokens of each row as `starts`, on the host too as `padding`.
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


def key_padding(attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of the mask that the last query sees: [B, N], False for padded tokens, and `starts` if it carries them."""
    if attention_mask is None:
        return None, None
    row = attention_mask[:, 0, -1]
    return row if row.dtype == torch.bool else row == 0, getattr(attention_mask, "starts", None)


def dense_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    """`sdpa`, with the causal mask of a chunk of queries over a longer cache never built as a whole."""
    queries, tokens = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    if not causal or (mask is not None and mask.shape[2] == queries):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    padding = getattr(mask, "padding", None)
    if padding is None or tokens <= BATCHED_TOKENS or not flash_takes(query, key, value):
        return causal_attention(module, query, key, value, mask, **kwargs), None
    output = query.new_zeros(len(query), queries, query.shape[1], value.shape[-1])
    for row, start in enumerate(padding):
        first = max(0, start - (tokens - queries))  # queries before it are padding: their zeros are masked everywhere
        if first < queries:
            tensors = query[row, None, :, first:], key[row, None, :, start:], value[row, None, :, start:]
            output[row, first:] = causal_attention(module, *tensors, None, **kwargs)
    return output, None


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
) -> Tensor:
    """The queries are those of the last tokens: [B, H, Tq, D] over [B, K, N, D] -> [B, Tq, H, D].

    FlashAttention aligns them so by itself; elsewhere the mask is built for some of the queries at a time.
    """
    queries, tokens = query.shape[2], key.shape[2]
    if mask is None and queries in (1, tokens):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]
    if mask is None and flash_takes(query, key, value):
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


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention runs on these: CUDA, 16 bits, and head dims up to 256."""
    return query.is_cuda and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))


def sparse_step(
    layer: PagedLayer, query: Tensor, scaling: float, valid: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """One decode step over the selected pages: [B, H, 1, D] -> [B, K, G, D].

    `valid` [B, N] is False for padding, and `starts` [B] says the same of padding that is all on the left.
    """
    config, size = layer.config, layer.config.page_size
    newest = (layer.length - 1) // size
    layer.update_statistics(valid, starts)
    if layer.triton and (valid is None or starts is not None):
        lengths = torch.full((len(query),), layer.length, dtype=torch.int32, device=query.device)
        return kernel_step(layer, query, scaling, lengths, starts)
    queries = reference.group_queries(query, layer.keys.shape[1])
    scores = layer.score.scores(queries, [statistic[:, :, :newest] for statistic in layer.statistics], config.scale)
    if valid is None and config.fan == 1:
        scores = reference.combine_group(scores, config.combine, scaling)
        scores = reference.force_pages(scores, config, newest)
    else:
        if valid is None:
            candidates = torch.ones(1, newest, dtype=torch.bool, device=query.device)
        else:
            valid = valid.expand(query.shape[0], -1)
            candidates = valid[:, : newest * size].unflatten(1, (newest, size)).any(dim=-1)
        bias = reference.page_bias(candidates, config, newest)
        scores = reference.combine_biased(scores, config.combine, scaling, bias)
        if config.fan > 1 and newest // config.fan > config.super_count:
            super_bias = reference.super_page_bias(bias, config.fan, newest // config.fan)
            scores = keep_best_super_pages(layer, queries, scaling, scores, super_bias, newest // config.fan)
    best = reference.top_pages(scores, config.pages - 1)
    layer.keep_selection(best)
    pages = torch.cat([best, best.new_full((*best.shape[:2], 1), newest)], dim=-1)

    read = config.budget - ((newest + 1) * size - layer.length)  # without the slots still empty in the newest page
    keys = reference.gather_pages(layer.keys, pages, size)[:, :, :read]
    values = reference.gather_pages(layer.values, pages, size)[:, :, :read]
    mask = None
    if valid is not None:
        tokens = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(2)[:, :, :read]
        mask = valid[:, None].expand(-1, tokens.shape[1], -1).gather(2, tokens).unsqueeze(2)
    return reference.attend(queries, keys, values, scaling, mask)


def keep_best_super_pages(
    layer: PagedLayer, queries: Tensor, scaling: float, scores: Tensor, bias: Tensor, newest: int | Tensor
) -> Tensor:
    """Page scores [B, K, P], -inf outside of the best super-pages; `bias` and `newest` are those of super-pages."""
    config = layer.config
    statistics = [statistic[:, :, : bias.shape[-1]] for statistic in layer.levels[1].statistics]
    super_scores = layer.score.scores(queries, statistics, config.scale)
    super_scores = reference.combine_biased(super_scores, config.combine, scaling, bias)
    best = reference.top_pages(super_scores, min(config.super_count, super_scores.shape[-1]))
    return reference.keep_super_pages(scores, best, config.fan, newest)


def kernel_step(
    layer: PagedLayer, query: Tensor, scaling: float, lengths: Tensor, starts: Tensor | None = None
) -> Tensor:
    """`sparse_step` in kernels: `lengths` [B] on the device counts the tokens of each row, the new one included."""
    pages = select_pages(layer, query.squeeze(2), scaling, lengths, starts)
    layer.keep_selection(pages)
    output = kernels().sparse_decode(
        query.squeeze(2), layer.keys, layer.values, pages, lengths, scaling, layer.config.page_size, starts=starts
    )
    return reference.group_queries(output, layer.keys.shape[1])


def select_pages(
    layer: PagedLayer, query: Tensor, scaling: float, lengths: Tensor, starts: Tensor | None = None
) -> Tensor:
    """The complete pages that a decode step reads, by kernels: query [B, H, D] -> int32 [B, K, k - 1]."""
    config, kernel, count = layer.config, kernels(), layer.config.pages - 1
    score = config.score, config.scale, config.page_size
    how = {
        "combine": config.combine, "sink": config.sink_pages, "recent": config.recent_pages,
        "starts": starts, "scaling": scaling,
    }  # fmt: skip
    if config.fan > 1:
        levels, counts = (layer.statistics, layer.levels[1].statistics), (count, config.super_count)
        return kernel.select_pages_in_two_levels(query, *levels, lengths, *counts, *score, config.fan, **how)
    if layer.statistics[0].shape[2] > kernel.MAX_PAGES:  # a quarter of a million tokens at pages of 8
        return reference.top_pages(kernel.page_scores(query, layer.statistics, lengths, *score, **how), count).int()
    return kernel.select_pages(query, layer.statistics, lengths, count, *score, **how)


def static_attention(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Write the token of a static step, [B, K, 1, D], and attend: [B, H, 1, D] -> [B, 1, H, D]."""
    if layer.step.sparse and layer.sparse_layer and layer.triton and fits_one_launch(layer.config, layer.capacity):
        return step_in_one_launch(layer, query, key, value, scaling).unsqueeze(1)
    layer.write_token(key, value)
    return static_step(layer, query, scaling).flatten(1, 2).unsqueeze(1)


def fits_one_launch(config: SparseAttentionConfig, capacity: int) -> bool:
    """Whether the kernel of a whole step can choose from the pages of a cache of `capacity` tokens."""
    second = (config.super_count + 1) * config.fan if config.fan > 1 else 0
    return max(capacity // (config.page_size * config.fan), second) <= kernels().STEP_PAGES


def step_in_one_launch(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`write_token` and a sparse `static_step` in one kernel: [B, H, 1, D] -> [B, H, D]."""
    config, step = layer.config, layer.step
    supers = {}
    if config.fan > 1:
        supers = {"super_statistics": layer.levels[1].statistics, "super_count": config.super_count}
    output, pages = kernels().sparse_step(
        query.squeeze(2), key, value, layer.keys, layer.values, layer.statistics, step.lengths(len(query)),
        config.pages - 1, config.score, config.scale, config.combine, config.sink_pages, config.recent_pages,
        starts=step.starts, scaling=scaling, arrivals=step.arrivals(len(query) * layer.keys.shape[1]), **supers,
    )  # fmt: skip
    layer.keep_selection(pages)
    return output


@torch.library.custom_op("unique_asr::static_attention", mutates_args=())
def static_attention_operator(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    """The same as one operator, so that a compiled model is one graph; `layer` is the index in the active cache."""
    return static_attention(ACTIVE.cache.layers[layer], query, key, value, scaling)


@static_attention_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


def static_step(layer: PagedLayer, query: Tensor, scaling: float) -> Tensor:
    """`sparse_step`, or a dense one, with the length on the device and shapes of the whole capacity; token written."""
    config, step = layer.config, layer.step
    queries = reference.group_queries(query, layer.keys.shape[1])
    if not (step.sparse and layer.sparse_layer):
        return reference.attend_biased(queries, layer.keys, layer.values, scaling, step.dense_bias)
    if layer.triton:
        return kernel_step(layer, query, scaling, step.lengths(len(query)), step.starts)
    scores = layer.score.scores(queries, layer.statistics, config.scale)
    scores = reference.combine_biased(scores, config.combine, scaling, step.page_bias)
    if config.fan > 1:
        scores = keep_best_super_pages(layer, queries, scaling, scores, step.super_page_bias, step.touched[1][0])
    best = reference.top_pages(scores, config.pages - 1)
    layer.keep_selection(best)
    pages = torch.cat([best, step.newest.expand(*best.shape[:2], 1)], dim=-1)
    keys = reference.gather_pages(layer.keys, pages, config.page_size)
    values = reference.gather_pages(layer.values, pages, config.page_size)
    return reference.attend_biased(queries, keys, values, scaling, step.selected_bias(pages))


AttentionInterface.register(NAME, unique_attention_forward)
AttentionMaskInterface.register(NAME, unique_mask)


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The outermost module whose configuration is that of the text decoder: the model itself, or a speech LLM's LLM."""
    config = model.config.get_text_config(decoder=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return module
    raise ValueError(f"{type(model).__name__} has no text decoder that {NAME!r} attention could be switched on for")


def set_attention(model: PreTrainedModel, name: str) -> str:
    """Switch the text decoder's attention implementation and leave encoders alone; returns the former one."""
    decoder = text_decoder(model)
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


def resolve_combine(config: SparseAttentionConfig, model: PreTrainedModel) -> SparseAttentionConfig:
    """With `combine` chosen if it is open: max, as in the paper, or share for heads that normalise their queries.

    The scales that such heads learn leave queries of very different lengths, and the spread of a page is weighted by
    the length: `max` would hear the longest of a group alone (Gemma 3, benchmarks/text.md). Other scores have no such
    term. A model that was trained through the selection keeps what it learned with (`config.sparse_attention`).
    """
    if config.combine is not None:
        return config
    if learned := (getattr(model.config, "sparse_attention", None) or {}).get("combine"):
        return replace(config, combine=learned)
    normalised = config.score == "unique" and any(
        isinstance(getattr(module, name, None), nn.Module)
        for module in text_decoder(model).modules()
        for name in QUERY_NORMS
    )
    return replace(config, combine="share" if normalised else "max")


class SparseAttention:
    """A model switched to UNIQUE attention; `with` or `restore()` puts everything back."""

    def __init__(self, model: PreTrainedModel, config: SparseAttentionConfig):
        self.model = model
        self.config = resolve_combine(config, model)
        self.counters = SparsityCounters()
        self._prepared: list[tuple[GenerationMixin, object]] = []  # with what each had of its own before, if nested
        self._former = set_attention(model, NAME)
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                self._give_cache(module)

    def _give_cache(self, generator: GenerationMixin) -> None:
        """Let `generate` make a `PagedCache` where it would make a cache of its own."""
        prepare = generator._prepare_cache_for_generation

        def prepare_paged_cache(generation_config, model_kwargs, *args, **kwargs):
            given = model_kwargs.get("past_key_values")
            if given is None and generation_config.use_cache is not False:
                if generation_config.cache_implementation is not None:
                    raise ValueError(
                        f"cache_implementation={generation_config.cache_implementation!r} cannot be read by pages: "
                        "leave it out, sparse attention brings its own cache"
                    )
                model_kwargs["past_key_values"] = self.cache()
            elif given is not None and not isinstance(given, PagedCache):
                raise ValueError(
                    f"{type(given).__name__} cannot be read by pages: pass a PagedCache as past_key_values, or none"
                )
            return prepare(generation_config, model_kwargs, *args, **kwargs)

        self._prepared.append((generator, vars(generator).get("_prepare_cache_for_generation")))
        generator._prepare_cache_for_generation = prepare_paged_cache

    def cache(self, capacity: int = 0) -> PagedCache:
        """A new cache for this model that adds to these counters."""
        return PagedCache(text_decoder(self.model).config, self.config, capacity, self.counters)

    def restore(self) -> None:
        """Put the former attention and caches back; calling it again does nothing."""
        if self._former is None:
            return
        set_attention(self.model, self._former)
        self._former = None
        for generator, former in self._prepared:
            del generator._prepare_cache_for_generation
            if former is not None:
                generator._prepare_cache_for_generation = former

    def __enter__(self) -> SparseAttention:
        return self

    def __exit__(self, *exception) -> None:
        self.restore()


def sparse_attention(
    model: PreTrainedModel, config: SparseAttentionConfig | None = None, **overrides
) -> SparseAttention:
    """Let the text decoder of `model` read its KV cache by pages, from this call on or within a `with` block.

        sparse_attention(model, budget=512)
        model.generate(**inputs)

        with sparse_attention(model, budget=512, page_size=8) as sparse:
            model.generate(**inputs)
        print(sparse.counters)

    `overrides` are fields of `SparseAttentionConfig`. Encoders keep their attention.
    """
    return SparseAttention(model, replace(config or SparseAttentionConfig(), **overrides))
