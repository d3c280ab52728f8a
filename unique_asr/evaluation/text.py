"""Text: RULER's tasks and perplexity with any causal language model, same methods and budgets as for speech.

Prefill is dense; what is measured is reading the context while writing the answer, or while reading on token by token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..attention import PagedCache, SparseAttentionConfig
from ..attention.huggingface import NAME, set_attention
from ..decoding import GreedyDecoder
from ..models import resolve_device, resolve_dtype
from .decodings import Rows
from .methods import RivalConfig, Sliding, rivals_active
from .report import write_csv
from .ruler import Item, Sources, make_item, sentences

PREFILL_CHUNK = 2048  # tokens


@dataclass
class TextResult:
    """One method on one task at one length: a value a sample, the score of RULER or the loss of a stretch in nats."""

    system: str
    budget: int | None
    task: str
    length: int
    values: list[float] = field(default_factory=list)
    share_of_pages_read: float = 1.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def shown(self) -> float:
        """Perplexity, or the score in percent."""
        return math.exp(self.mean) if self.task == "perplexity" else 100 * self.mean

    def interval(self, level: float = 0.95, samples: int = 1000) -> tuple[float, float]:
        """Of `shown`: percentiles over samples drawn again with replacement."""
        means = np.random.default_rng(0).choice(self.values, (samples, len(self.values))).mean(axis=1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        if self.task == "perplexity":
            return math.exp(low), math.exp(high)
        return 100 * float(low), 100 * float(high)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval()
        row = {key: value for key, value in asdict(self).items() if key != "values"}
        return row | {"samples": len(self.values), "value": self.shown, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.shown:.2f} [{low:.2f}, {high:.2f}]"


def evaluate_text(config: DictConfig, methods: dict[str, SparseAttentionConfig | Sliding]) -> None:
    """Runs task=ruler or task=perplexity: a line for each method, task and length; files as for speech."""
    settings, options = OmegaConf.to_container(config), config.text
    if options.model is None:
        raise ValueError(f"text.model is missing: evaluate.py task={config.task} text.model=FOLDER")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    methods = {name: method for name, method in methods.items() if not isinstance(method, Sliding)}
    model, tokenizer = load_language_model(options.model, config.device, config.dtype)
    work = RulerRun(model, tokenizer, options) if config.task == "ruler" else PerplexityRun(model, tokenizer, options)
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: list[TextResult] = []
    for name, attention in methods.items():
        about = {"model": options.model, "dtype": config.dtype, "attention": asdict(attention), "file": options.file}
        if isinstance(attention, RivalConfig):
            about["method"] = attention.method.name
        rows = Rows(folder / "decodings", about | {"task": config.task, "qa": options.qa}, config.resume)
        for task, length, samples in work.sets():
            result = TextResult(name, attention.budget, task, length)
            read = total = 0
            for key, sample in samples:
                value = rows.get(key)
                if value is None:
                    with torch.no_grad(), rivals_active():
                        value = work.run(sample, attention)
                    rows.put(key, value)
                result.values.append(value["value"])
                read, total = read + value["pages_read"], total + value["pages_total"]
            result.share_of_pages_read = read / max(total, 1)
            results.append(result)
            print(
                f"{name:<18} {task:<14} {length:>6} {result} | pages read {result.share_of_pages_read:.1%}", flush=True
            )
            write_text_results(folder, results, settings)


class RulerRun:
    """RULER's tasks for one model."""

    def __init__(self, model: Any, tokenizer: Any, options: DictConfig) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        text = Path(options.file).read_text(encoding="utf-8") if options.file else ""
        questions = Path(options.qa).read_text(encoding="utf-8").splitlines() if options.qa else []
        self.sources = Sources(sentences(text), tuple(json.loads(line) for line in questions if line.strip()))
        self.tasks = [task for task in options.tasks if task != "qa" or questions]
        ids = getattr(model.generation_config, "eos_token_id", None)
        self.stop_ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
        self._items: dict[tuple[str, int], list[Item]] = {}
        self._last: tuple[SparseAttentionConfig, GreedyDecoder] | None = None

    def sets(self) -> Iterator[tuple[str, int, list[tuple[str, Item]]]]:
        """Task, length, and the samples with their keys."""
        for length in self.options.lengths:
            for task in self.tasks:
                if (task, length) not in self._items:
                    seeds = range(self.options.seed, self.options.seed + self.options.samples)
                    made = [make_item(task, length, self.count, seed, self.sources) for seed in seeds]
                    self._items[task, length] = made
                items = self._items[task, length]
                yield task, length, [(f"{task} {length} {self.options.seed + n}", item) for n, item in enumerate(items)]

    def count(self, text: str) -> int:
        return len(self.tokenizer(self._chat(text, ""), add_special_tokens=False).input_ids)

    def _chat(self, prompt: str, begin: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt + begin
        messages = [{"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return asked + begin.lstrip()

    def run(self, item: Item, attention: SparseAttentionConfig) -> dict[str, Any]:
        text = self._chat(item.prompt, item.begin)
        special = self.tokenizer.chat_template is None
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids.to(self.model.device)
        decoder = self._decoder(attention)
        decoder.capacity = max(decoder.capacity, ids.shape[1] + item.answer_tokens + 1)
        before = decoder.statistics.pages_read, decoder.statistics.pages_total
        decoder.prefill(self.model.get_input_embeddings()(ids))
        output = self.tokenizer.decode(list(decoder.tokens(item.answer_tokens, self.stop_ids)))
        return {
            "value": item.score(output),
            "output": output,
            "answers": item.answers,
            "pages_read": decoder.statistics.pages_read - before[0],
            "pages_total": decoder.statistics.pages_total - before[1],
        }

    def _decoder(self, attention: SparseAttentionConfig) -> GreedyDecoder:
        """The last one, if it is for the same method: its memory and CUDA graphs are kept."""
        if self._last is None or self._last[0] is not attention:
            static = False if isinstance(attention, RivalConfig) else None
            self._last = attention, GreedyDecoder(self.model, attention, 0, PREFILL_CHUNK, static)
        self._last[1].reset()
        return self._last[1]


class PerplexityRun:
    """Stretches of a text, evenly spaced over it; the last tokens of each are read one by one."""

    def __init__(self, model: Any, tokenizer: Any, options: DictConfig) -> None:
        if options.file is None:
            raise ValueError("text.file is missing: task=perplexity reads a text, text.file=FILE")
        self.model, self.options = model, options
        self.ids = tokenizer(Path(options.file).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]

    def sets(self) -> Iterator[tuple[str, int, list[tuple[str, Tensor]]]]:
        for length in self.options.lengths:
            spare = len(self.ids) - length
            if spare < 0 or length <= self.options.score_tokens:
                raise ValueError(
                    f"text.lengths has {length} tokens: give more than text.score_tokens, {self.options.score_tokens}, "
                    f"and at most the {len(self.ids)} of {self.options.file}"
                )
            count = min(self.options.samples, 1 + spare // self.options.score_tokens)
            starts = [index * spare // max(count - 1, 1) for index in range(count)]
            key = f"perplexity {length} {self.options.score_tokens}"
            yield "perplexity", length, [(f"{key} {start}", self.ids[start : start + length]) for start in starts]

    def run(self, ids: Tensor, attention: SparseAttentionConfig) -> dict[str, Any]:
        """Mean loss, in nats, of the last tokens, each read with its own decode step."""
        ids = ids[None].to(self.model.device)
        length, first = ids.shape[1], ids.shape[1] - self.options.score_tokens
        set_attention(self.model, NAME)
        cache = PagedCache(self.model.config, attention, length)
        losses = []
        for start in range(0, first, PREFILL_CHUNK):
            chunk = ids[:, start : min(first, start + PREFILL_CHUNK)]
            logits = self.model(chunk, past_key_values=cache, logits_to_keep=1).logits
        for index in range(first, length):
            losses.append(-logits[0, -1].float().log_softmax(dim=-1)[ids[0, index]])
            if index + 1 < length:
                logits = self.model(ids[:, index : index + 1], past_key_values=cache).logits
        counters = cache.statistics
        return {
            "value": torch.stack(losses).mean().item(),
            "pages_read": counters.pages_read,
            "pages_total": counters.pages_total,
        }


def load_language_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder, the hub or a .gguf file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    chosen = resolve_device(device)
    path, place, options = Path(name), name, {}
    if path.suffix == ".gguf":
        place, options = str(path.parent), {"gguf_file": path.name}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=resolve_dtype(dtype, chosen), **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"text.model={name}: cannot be loaded as a causal language model ({reason})") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.to(chosen).eval(), tokenizer


def write_text_results(folder: Path, results: Sequence[TextResult], settings: dict[str, Any]) -> None:
    rows = [result.to_dict() for result in results]
    table = json.dumps({"settings": settings, "results": rows}, indent=2)
    (folder / "results.json").write_text(table + "\n", encoding="utf-8")
    write_csv(folder / "results.csv", rows, list(rows[0]))
    columns = list(dict.fromkeys(f"{result.task} {result.length}" for result in results))
    cells = {(result.system, f"{result.task} {result.length}"): f"{result.shown:.2f}" for result in results}
    what = "perplexity, lower is better" if results[0].task == "perplexity" else "score in percent"
    lines = [f"# {settings['text']['model']}: {what}\n", "| method | " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for system in dict.fromkeys(result.system for result in results):
        lines += [f"| {system} | " + " | ".join(cells.get((system, column), "") for column in columns) + " |"]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
