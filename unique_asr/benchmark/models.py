"""Passes of pretrained speech LLMs at real shapes: memory against its estimate, prefill, and milliseconds a step.

The LLM has random weights and the cache random keys and values, which take the time of any others; the encoder is left
out. A step is measured at the context in the middle of the answer. Dense attention is the step that serves as our own,
and FlashAttention over exactly the tokens written: the speed-up is over the faster of the two.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from unique_asr.attention import PagedCache, SparseAttentionConfig
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.huggingface import NAME, set_attention
from unique_asr.benchmark.decode import WARM_UP, measure
from unique_asr.benchmark.flash import FLASH
from unique_asr.benchmark.timing import attempt, describe
from unique_asr.decoding.memory import Memory, read_shape
from unique_asr.models.pretrained import KNOWN_MODELS, KnownModel
from unique_asr.models.pretrained.pass_memory import estimate_pass_memory, estimate_prompt_tokens

# The name of a known model, and its LLM: from the configurations of the checkpoints named in the catalogue.
LLMS: dict[str, tuple[str, PreTrainedConfig]] = {
    "moss": ("moss_transcribe_diarize", Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=True,
    )),
    "voxtral-mini": ("voxtral", LlamaConfig(
        vocab_size=131072, hidden_size=3072, intermediate_size=8192, num_hidden_layers=30, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
    )),
    "vibevoice": ("vibevoice_asr", Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072,
    )),
}  # fmt: skip
MARGIN = 1.08  # of the estimate, that must be free
COMPILED_FORMS = 64  # of a step: each batch size has its own, with either attention


@dataclass(frozen=True)
class ModelTiming:
    """The times and the memory of one case; times are medians of steps."""

    model: str
    minutes: float  # of audio
    batch: int
    attention: str  # what differs from the settings of all
    prompt: int  # positions
    answer: int  # tokens
    context: int  # at the measured steps
    prefill: float | None  # s, of one sequence
    dense: float | None  # ms a step
    flash: float | None  # ms a step
    sparse: float  # ms a step
    estimated: float  # GB
    peak: float | None  # GB

    COLUMNS = ("model", "minutes", "batch", "attention", "prompt", "context", "prefill s", "dense ms", "flash ms",
               "sparse ms", "x dense", "answer", "dense s", "sparse s", "GB estimated", "GB peak", "error")  # fmt: skip

    @property
    def fastest_dense(self) -> float | None:
        """Milliseconds of a dense step, by the faster of the two."""
        return min((each for each in (self.dense, self.flash) if each is not None), default=None)

    @property
    def speedup(self) -> float | None:
        """Time of the fastest dense step over that of a sparse one."""
        return self.fastest_dense / self.sparse if self.fastest_dense else None

    def format_row(self) -> str:
        """Return a line of a Markdown table."""

        def format_number(value: float | None, digits: int = 2, unit: str = "") -> str:
            return "" if value is None else f"{value:.{digits}f}{unit}"

        def format_seconds(milliseconds: float | None) -> str:
            return "" if milliseconds is None else f"{milliseconds * self.answer / 1000:.1f}"

        error = None if self.peak is None else 100 * (self.estimated / self.peak - 1)
        cells = [
            self.model, f"{self.minutes:g}", str(self.batch), self.attention, str(self.prompt), str(self.context),
            *map(format_number, (self.prefill, self.dense, self.flash, self.sparse, self.speedup)),
            str(self.answer), format_seconds(self.fastest_dense), format_seconds(self.sparse),
            format_number(self.estimated), format_number(self.peak), format_number(error, 0, " %"),
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class BenchmarkSettings:
    """What all cases of a run share."""

    configurations: dict[str, SparseAttentionConfig]  # by what differs from the settings of all
    answer_tokens_an_hour: float
    prefill_chunk: int
    steps: int
    mode: str  # captured or compiled


def benchmark(
    names: Sequence[str],
    minutes: Sequence[float],
    batches: Sequence[int],
    configurations: Sequence[dict[str, Any]],
    answer_tokens_an_hour: float,
    prefill_chunk: int,
    steps: int,
    mode: str,
    max_seconds: float,
    output: str | None,
    attention: SparseAttentionConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> list[ModelTiming]:
    """Measure every model, length and batch size; print a row for each as soon as it is measured.

    Args:
        names: of `LLMS`.
        minutes: of audio.
        batches: sequences side by side.
        configurations: fields that replace those of `attention`, each measured against the same dense steps.
        answer_tokens_an_hour: tokens that the LLM writes for an hour of audio.
        prefill_chunk: tokens of a chunk of the prefill.
        steps: decode steps that are timed.
        mode: captured or compiled.
        max_seconds: after which no other case is begun.
        output: a JSON file that gets all rows, after each row; None: no file.

    Raises:
        ValueError: a name or the mode is not known.
    """
    if not set(names) <= set(LLMS):
        raise ValueError(f"models.names are {', '.join(names)}: choose of {', '.join(LLMS)}")
    if mode not in ("captured", "compiled"):
        raise ValueError(f"models.mode is {mode!r}: choose captured or compiled")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
    begin, results = time.monotonic(), []
    named = {format_label(each): replace(attention, **each) for each in configurations}
    settings = BenchmarkSettings(named, answer_tokens_an_hour, prefill_chunk, steps, mode)
    print(f"| {' | '.join(ModelTiming.COLUMNS)} |\n|{'---|' * len(ModelTiming.COLUMNS)}", flush=True)
    for name in names:
        known_model, model = KNOWN_MODELS[LLMS[name][0]], None
        for length in minutes:
            for batch in batches:
                if time.monotonic() - begin > max_seconds:
                    print(f"  left out: {name}, {length} minutes, batch {batch}: models.max_seconds={max_seconds}")
                    continue
                model = model or make_random_model(name, device, dtype)
                for result in measure_case(name, model, known_model, length, batch, settings):
                    print(result.format_row(), flush=True)
                    results.append(result)
                    if output is not None:
                        save(Path(output), results, settings, device)
        del model
        release(device)
    return results


def format_label(fields: dict[str, Any]) -> str:
    """Return the fields that differ from the settings of all, as text."""
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "as given"


def save(path: Path, results: Sequence[ModelTiming], settings: BenchmarkSettings, device: torch.device) -> None:
    """Write the device, the settings and all rows to a JSON file."""
    rows = [asdict(result) | {"speedup": result.speedup} for result in results]
    configurations = {name: config.to_dict() for name, config in settings.configurations.items()}
    shared = vars(settings) | {"configurations": configurations}
    whole = {"device": describe(device), "settings": shared, "results": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def measure_free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU; None on a CPU, whose tests are small."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Free the memory that nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_random_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make the LLM with random weights, switched to UNIQUE attention."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LLMS[name][1], dtype=dtype).eval()
    set_attention(model, NAME)
    return model


def measure_case(
    name: str, model: PreTrainedModel, known_model: KnownModel, minutes: float, batch: int, settings: BenchmarkSettings
) -> Iterator[ModelTiming]:
    """Measure one case: dense steps by either attention, then each configuration; what fails is left out.

    The batch is smaller than `batch` where memory has no room for it.
    """
    seconds, device = 60 * minutes, model.device
    prompt, answer = (
        estimate_prompt_tokens(known_model, seconds),
        round(settings.answer_tokens_an_hour * seconds / 3600),
    )
    context = prompt + answer // 2

    def memory(attention: SparseAttentionConfig) -> Memory:
        how = attention, model.dtype, settings.prefill_chunk, prompt + answer, batch, device.type
        return estimate_pass_memory(known_model, seconds, read_shape(model), *how)

    release(device)
    free = measure_free_memory(device)
    largest = list(settings.configurations.values())
    while free is not None and batch > 1 and MARGIN * max(memory(each).pass_bytes for each in largest) > free:
        batch -= 1  # the row says how many were left

    times = {}
    for kind, attention in (("dense", NAME), ("flash", FLASH)):
        milliseconds = attempt(partial(measure_dense, model, batch, context, settings, attention))
        times[kind] = milliseconds
        release(device)
    for differing, attention in settings.configurations.items():
        audio = int(known_model.tokens_a_second * seconds)
        measured = attempt(partial(measure_sparse, model, batch, prompt, answer, audio, attention, settings))
        release(device)
        if measured is not None:
            prefill_seconds, sparse, peak = measured
            yield ModelTiming(
                name, minutes, batch, differing, prompt, answer, context, prefill_seconds, **times, sparse=sparse,
                estimated=memory(attention).total / 1e9, peak=peak,
            )  # fmt: skip


@torch.no_grad()
def measure_sparse(
    model: PreTrainedModel,
    batch: int,
    prompt: int,
    answer: int,
    audio: int,
    attention: SparseAttentionConfig,
    settings: BenchmarkSettings,
) -> tuple[float | None, float, float | None]:
    """Return the seconds of the prefill, the milliseconds of a sparse step, and the peak of memory in GB.

    Args:
        prompt: positions of the prompt, of which `audio` are those of audio.
        answer: tokens of the answer; steps are timed in its middle.
    """
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    cache = PagedCache(model.config, attention, capacity=prompt + answer)
    prefill_seconds = prefill(model, cache, batch, prompt, audio, settings)
    fill(cache, prompt + answer // 2)
    milliseconds = 1000 * measure(model, cache, batch, settings.mode, settings.steps)
    return prefill_seconds, milliseconds, torch.cuda.max_memory_allocated() / 1e9 if cuda else None


def prefill(
    model: PreTrainedModel, cache: PagedCache, batch: int, prompt: int, audio: int, settings: BenchmarkSettings
) -> float | None:
    """Read a prompt with `audio` positions as a transcriber does.

    Of a batch only the last chunk is read, after random keys and values: the one that takes the most memory.

    Returns:
        Seconds, for one sequence; None for a batch.
    """
    weight = model.get_input_embeddings().weight
    features = torch.randn(batch * audio, weight.shape[1], dtype=weight.dtype, device=weight.device)
    embeds = torch.randn(batch, prompt, weight.shape[1], dtype=weight.dtype, device=weight.device) / 50
    size = math.ceil(prompt / math.ceil(prompt / settings.prefill_chunk))

    def read(start: int) -> None:
        chunk = embeds[:, start : start + size]
        positions = torch.arange(start, start + chunk.shape[1], device=weight.device).unsqueeze(0)
        output = model(inputs_embeds=chunk, position_ids=positions, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        output.logits[:, -1].argmax(dim=-1).tolist()  # waits for the device

    read(0)  # allocates, and warms up
    cache.reset()
    first = 0 if batch == 1 else prompt - size
    fill(cache, first)
    begin = time.perf_counter()
    for start in range(first, prompt, size):
        read(start)
    del features
    return time.perf_counter() - begin if batch == 1 else None


def fill(cache: PagedCache, tokens: int) -> None:
    """Write random keys and values behind what the cache holds, in place, up to `tokens`."""
    for layer in cache.paged_layers:
        for buffer in (layer.keys, layer.values):
            buffer[:, :, layer.length : tokens].normal_()
        layer.length = tokens
    if cache.attention.budget is not None:
        cache.update_statistics()


@torch.no_grad()
def measure_dense(
    model: PreTrainedModel, batch: int, context: int, settings: BenchmarkSettings, attention: str
) -> float:
    """Return the milliseconds of a dense step, in a cache with no more room than the steps take.

    Args:
        context: tokens in the cache.
        attention: the name of the attention implementation.
    """
    config = SparseAttentionConfig(budget=None, backend=next(iter(settings.configurations.values())).backend)
    cache = PagedCache(model.config, config, capacity=context + WARM_UP + settings.steps)
    tokens = torch.zeros(batch, 2, dtype=torch.long, device=model.device)
    model(input_ids=tokens, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)  # allocates
    fill(cache, context)
    set_attention(model, attention)
    try:
        return 1000 * measure(model, cache, batch, settings.mode, settings.steps)
    finally:
        set_attention(model, NAME)
