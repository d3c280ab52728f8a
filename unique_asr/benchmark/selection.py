"""The share of the true attention mass that the selected pages hold, by score, statistics, page size and combine.

Measured while a model decodes densely: at each measured step, in every layer, every configuration selects pages for the
query of the step, and the softmax over the whole context says how much of each head's attention they hold.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from unique_asr.attention import PagedCache, SparseAttentionConfig, reference
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.huggingface import NAME, set_attention, unique_attention_forward
from unique_asr.attention.scores import SCORES


class Probe:
    """An attention function that attends densely and measures what configurations would select.

    Args:
        configs: what is measured.
        every: steps from one measured step to the next.
        limit: steps that are measured.
    """

    def __init__(self, configs: Sequence[SparseAttentionConfig], every: int = 1, limit: int = 32):
        self.configs = configs
        self.every, self.limit = every, limit
        self.steps = self.measured = 0
        # By configuration (by page size: the oracle) and layer.
        self.mass_shares: dict[SparseAttentionConfig | int, dict[int, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._statistics: dict[tuple, tuple[Tensor, ...]] = {}
        self._sequence: object = None
        self._first: int | None = None  # the index of the first layer
        self.dim = 0  # of a head

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, None]:
        layer = getattr(key, "paged_layer", None)
        if layer is not None and query.shape[2] == 1:
            self._first = layer.index if self._first is None else self._first
            self.steps += layer.index == self._first
            if (self.steps - 1) % self.every == 0 and self.measured < self.limit * module.config.num_hidden_layers:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                if key.shape[2] > max(config.budget for config in self.configs):
                    self.measured += 1
                    self.measure(module.layer_idx, reference.group_queries(query, key.shape[1]), key, scaling)
        elif layer is not None:
            self._statistics.clear()  # another sequence, perhaps
        return unique_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def measure(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """Measure one step of one layer: query [B, K, G, D], keys [B, K, N, D]; `scaling` of the attention logits."""
        self.dim = keys.shape[-1]
        logits = torch.matmul(query.float(), keys.float().transpose(-1, -2)) * scaling
        mass = logits.softmax(dim=-1).mean(dim=2)  # [B, K, N], of the group
        for size in {config.page_size for config in self.configs}:
            pages = nn.functional.pad(mass, (0, -mass.shape[-1] % size)).unflatten(-1, (-1, size)).sum(dim=-1)
            newest = pages.shape[-1] - 1
            for config in self.configs:
                if config.page_size == size:
                    best = self.select(layer, query, keys, scaling, config, newest)
                    held = pages[..., :-1].gather(-1, best).sum(dim=-1) + pages[..., -1]
                    self.mass_shares[config][layer].append(held.mean().item())
            oracle = (
                pages[..., :-1].topk(max(c.budget for c in self.configs) // size - 1).values.sum(-1) + pages[..., -1]
            )
            self.mass_shares[size][layer].append(oracle.mean().item())

    def select(
        self, layer: int, query: Tensor, keys: Tensor, scaling: float, config: SparseAttentionConfig, newest: int
    ) -> Tensor:
        """Select the complete pages that a decode step reads: int64 [B, K, k - 1]."""
        scores = self.score_pages(layer, query, keys, config, config.page_size, newest)
        bias = reference.page_bias(torch.ones(1, newest, dtype=torch.bool, device=keys.device), config, newest)
        scores = reference.combine_biased(scores, config.combine, scaling, bias)
        supers = newest // config.pages_per_super
        if config.pages_per_super > 1 and supers > config.super_count:
            super_bias = reference.super_page_bias(bias, config.pages_per_super, supers)[..., :supers]
            super_scores = self.score_pages(layer, query, keys, config, config.super_page_size, supers)
            super_scores = reference.combine_biased(super_scores, config.combine, scaling, super_bias)
            best = reference.top_pages(super_scores, config.super_count)
            scores = reference.keep_super_pages(scores, best, config.pages_per_super, supers)
        return reference.top_pages(scores, config.pages - 1)

    def score_pages(
        self, layer: int, query: Tensor, keys: Tensor, config: SparseAttentionConfig, size: int, pages: int
    ) -> Tensor:
        """Score the first `pages` pages of `size` tokens: float32 [B, K, G, P]. Statistics are kept between steps."""
        score, key = SCORES[config.score], (layer, config.score, size, config.statistics_dtype)
        kept = self._statistics.get(key)
        start = 0 if kept is None or kept[0].shape[2] > pages else kept[0].shape[2]
        if start < pages:
            new = reference.page_statistics(keys[:, :, start * size : pages * size], size, score)
            new = score.encode(new, config.statistics_dtype)
            kept = new if start == 0 else tuple(torch.cat(pair, dim=2) for pair in zip(kept, new))
            self._statistics[key] = kept
        return score.scores(query, kept, config.scale)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Measure models with UNIQUE attention within the block."""
        AttentionInterface.register(NAME, self)
        try:
            yield
        finally:
            AttentionInterface.register(NAME, unique_attention_forward)

    def report(self) -> None:
        """Print the table: shares of the mass in percent, the mean over layers and the worst layer."""
        if not self.mass_shares:
            print("nothing measured: no decode step had a context longer than the budget")
            return
        layers = len(next(iter(self.mass_shares.values())))
        print(f"{self.measured // layers} steps of {layers} layers; share of the true attention mass, percent")
        print(f"{'score':14s} {'statistics':10s} {'page':>4s} {'super':>8s} {'combine':8s} {'budget':>6s} "
              f"{'mean':>6s} {'worst layer':>11s} {'memory':>7s}")  # fmt: skip
        for config, by_layer in self.mass_shares.items():
            means = {layer: 100 * sum(values) / len(values) for layer, values in by_layer.items()}
            mean, worst = sum(means.values()) / len(means), min(means, key=means.get)
            if isinstance(config, int):
                head = f"{'oracle':14s} {'':10s} {config:4d} {'':8s} {'':8s} {'':6s}"
                memory = ""
            else:
                supers = f"{config.super_count} x {config.super_page_size}" if config.super_page_size else ""
                head = (f"{config.score:14s} {config.statistics_dtype:10s} {config.page_size:4d} "
                        f"{supers:>8} {config.combine or 'max':8s} {config.budget:6d}")  # fmt: skip
                memory = f"{100 * compute_memory_share(config, self.dim):6.2f}%"
            print(f"{head} {mean:6.2f} {means[worst]:6.2f} ({worst:2d}) {memory}", flush=True)


def compute_memory_share(config: SparseAttentionConfig, head_dim: int) -> float:
    """Return the bytes of the statistics over those of the keys and values, for keys in 16 bits."""
    stored = SCORES[config.score].buffer_layout(head_dim, torch.bfloat16, config.statistics_dtype)
    tokens = [config.page_size] + ([config.super_page_size] if config.super_page_size else [])
    return sum(width * dtype.itemsize for width, dtype in stored) * sum(1 / size for size in tokens) / (4 * head_dim)


def make_configurations(table: dict[str, list], base: SparseAttentionConfig) -> list[SparseAttentionConfig]:
    """Return every combination of the listed fields; super-pages no larger than a page are left out.

    Args:
        table: fields of `SparseAttentionConfig`, each with the values to try.
        base: the other fields.
    """
    configs = []
    for values in itertools.product(*table.values()):
        fields = dict(zip(table, values))
        if (fields.get("super_page_size") or 1 << 30) > fields.get("page_size", base.page_size):
            configs.append(SparseAttentionConfig(**(base.to_dict() | fields)))
    return configs


@torch.no_grad()
def benchmark_text(
    model: str, text: str, context: int, steps: int, probe: Probe, device: torch.device, dtype: torch.dtype
) -> None:
    """Let a causal language model read `context` tokens of a text file, then the next `steps` one at a time.

    Raises:
        ValueError: the text is too short.
    """
    from unique_asr.generation import load_text_model

    language_model, tokenizer = load_text_model(model, str(device), str(dtype).removeprefix("torch."))
    ids = tokenizer(Path(text).read_text(encoding="utf-8")[: 12 * context], return_tensors="pt").input_ids.to(device)
    if ids.shape[1] < context + steps:
        raise ValueError(f"{text} has {ids.shape[1]} tokens: give a longer text, or a smaller selection.context")
    set_attention(language_model, NAME)
    cache = PagedCache(language_model.config, SparseAttentionConfig(budget=None, backend="torch"), context + steps)
    with probe.active():
        for start in range(0, context, 1024):
            language_model(ids[:, start : min(context, start + 1024)], **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        for index in range(context, context + steps):
            language_model(ids[:, index : index + 1], **{CACHE_ARGUMENT: cache})


def benchmark_speech(model: str, audio: Sequence[str], minutes: float, probe: Probe, device: str, dtype: str) -> None:
    """Let a speech LLM transcribe files in one pass, joined and repeated to a recording of `minutes`."""
    import numpy as np

    from unique_asr.audio import load_audio
    from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

    transcriber = SpeechLLMTranscriber(
        model, attention=SparseAttentionConfig(budget=None, backend="torch"), device=device, dtype=dtype,
        max_pass_seconds=60 * minutes,
    )  # fmt: skip
    samples = np.concatenate([load_audio(path) for path in audio])
    samples = np.resize(samples, int(60 * minutes * 16000))
    with probe.active():
        segments, info = transcriber.transcribe(samples)
        for _ in segments:
            pass
    print(f"{model}: {info.duration:.0f} s of audio")
