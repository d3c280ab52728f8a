"""Milliseconds a token of a whole model of random weights: dense and sparse, eager, captured and compiled, in one run.

The cache is filled with random keys and values, which takes the time of any others. Dense is our own step, which serves
every context up to the capacity, and on a GPU FlashAttention's too (`flash`): speed-ups are over the faster of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from unique_asr.attention import DecodeStep, PagedCache, SparseAttentionConfig
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.fused_linear import fuse_linears
from unique_asr.attention.huggingface import NAME, set_attention
from unique_asr.benchmark.flash import FLASH
from unique_asr.benchmark.timing import attempt

SHAPES = {
    "qwen3-1.7b": Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=262144, tie_word_embeddings=True,
    ),
}  # fmt: skip
MODES = ("eager", "static", "captured", "compiled")
CAPTURED = ("captured", "compiled")  # in CUDA graphs
WARM_UP = 5  # steps


def benchmark(
    shape: str,
    cases: Sequence[Sequence[int]],
    attention: SparseAttentionConfig,
    device: torch.device,
    dtype: torch.dtype,
    modes: Sequence[str],
    steps: int,
) -> None:
    """Print a line for every case, for dense and for sparse attention, in every mode.

    Args:
        shape: of `SHAPES`.
        cases: [batch, context] each; context in tokens.
        attention: of sparse steps.
        modes: of `MODES`.
        steps: decode steps that are timed.

    Raises:
        ValueError: the shape or a mode is not known.
    """
    if shape not in SHAPES:
        raise ValueError(f"decode.shape is {shape!r}: choose one of {', '.join(SHAPES)}")
    if not set(modes) <= set(MODES):
        raise ValueError(f"decode.modes are {', '.join(modes)}: choose of {', '.join(MODES)}")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype).eval()
    if "compiled" in modes:
        fuse_linears(model)  # what the first compiled step does, for all that are compared with it
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{shape}, {str(dtype).removeprefix('torch.')}, weights {size / 1e9:.2f} GB")
    for batch, context in cases:
        print(f"\nbatch {batch}, context {context}", flush=True)
        dense: dict[str, float] = {}
        systems = [("dense", NAME, SparseAttentionConfig(budget=None)), ("sparse", NAME, attention)]
        if device.type == "cuda":
            systems.insert(1, ("flash", FLASH, SparseAttentionConfig(budget=None)))
        for name, implementation, config in systems:
            set_attention(model, implementation)
            own = [mode for mode in modes if mode in CAPTURED or name != "flash"]
            times = attempt(partial(measure_modes, model, config, batch, context, own, steps)) or {}
            for mode, seconds in times.items():
                faster = f"  {dense[mode] / seconds:.2f} x dense" if name == "sparse" and mode in dense else ""
                print(f"  {name:7s} {mode:9s} {seconds * 1000:9.3f} ms a step{faster}", flush=True)
                if name != "sparse":
                    dense[mode] = min(seconds, dense.get(mode, seconds))
            if device.type == "cuda":
                torch.cuda.empty_cache()


def measure_modes(
    model: PreTrainedModel, config: SparseAttentionConfig, batch: int, context: int, modes: Sequence[str], steps: int
) -> dict[str, float]:
    """Return the seconds of a step by mode; a mode that fails is left out."""
    cache = make_filled_cache(model, config, batch, context, steps + WARM_UP)
    times = {}
    for mode in modes:
        cache.crop(context - cache.length)
        seconds = attempt(partial(measure, model, cache, batch, mode, steps))
        if seconds is not None:
            times[mode] = seconds
    print(f"  {cache.counters}", flush=True)
    return times


@torch.no_grad()
def make_filled_cache(
    model: PreTrainedModel, config: SparseAttentionConfig, batch: int, context: int, more: int
) -> PagedCache:
    """Make a cache of `context` random tokens, with room for `more`."""
    text, weight = model.config, model.get_input_embeddings().weight
    cache = PagedCache(text, config, capacity=context + more)
    dim = text.head_dim or text.hidden_size // text.num_attention_heads
    shape = batch, text.num_key_value_heads, context, dim
    for layer in range(text.num_hidden_layers):
        tokens = [torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2)]
        cache.update(*tokens, layer)
    if config.budget is not None:
        cache.update_statistics()
    return cache


@torch.no_grad()
def measure(model: PreTrainedModel, cache: PagedCache, batch: int, mode: str, steps: int) -> float:
    """Return the median of the seconds of a step, the tokens read back after each.

    Args:
        cache: with the context in it.
        batch: rows.
        mode: eager, static, captured or compiled.
        steps: that are timed, after `WARM_UP` others.
    """
    step = DecodeStep(model, cache, batch, capture=False if mode == "static" else None, compile=mode == "compiled")
    run: Callable[[], None] = step.run
    if mode == "eager":

        def run() -> None:
            positions = torch.full((batch, 1), cache.length, device=step.token.device)
            output = model(input_ids=step.token, position_ids=positions, **{CACHE_ARGUMENT: cache}, use_cache=True)
            step.choose(output.logits[:, -1])

    times = []
    for index in range(WARM_UP + steps):
        start = time.perf_counter()
        run()
        step.result.tolist()
        if index >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
