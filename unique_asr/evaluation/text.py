"""Text: RULER's tasks and perplexity with any causal language model, same methods and budgets as for speech.

Prefill is dense; what is measured is reading the context while writing the answer, or while reading on token by token.
Models too small to answer RULER's counting tasks may know the answer all the same: task=counting lets them read the
right answer and a wrong one, and measures how much likelier the right one is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..attention import PagedCache, SparseAttentionConfig
from ..attention.huggingface import NAME, set_attention
from ..batch import interleave
from ..batch_decoding import BatchDecoder
from ..longform import PENDING
from ..models import resolve_device, resolve_dtype
from .decodings import Rows, digest, identity
from .methods import RivalConfig, Sliding, rivals_active
from .report import draw, write_csv
from .ruler import Item, Sources, listed, make_item, sentences

PREFILL_CHUNK = 2048  # tokens
SHOWN: dict[str, Callable[[float], float]] = {
    "ruler": lambda share: 100 * share,
    "counting": lambda nats: nats,
    "perplexity": math.exp,
}


@dataclass
class TextResult:
    """One method on one task at one length: a value a sample.

    measure: "ruler" (the share of the answers that were found), "counting" (nats a token by which the right answer is
    likelier than a wrong one) or "perplexity" (nats a token).
    """

    system: str
    budget: int | None
    measure: str
    task: str
    length: int
    values: list[float] = field(default_factory=list)
    share_of_pages_read: float = 1.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def shown(self) -> float:
        """The score in percent, nats, or perplexity."""
        return SHOWN[self.measure](self.mean)

    def interval(self, level: float = 0.95, samples: int = 1000) -> tuple[float, float]:
        """Of `shown`: percentiles over samples drawn again with replacement."""
        means = np.random.default_rng(0).choice(self.values, (samples, len(self.values))).mean(axis=1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return SHOWN[self.measure](float(low)), SHOWN[self.measure](float(high))

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval()
        row = {key: value for key, value in asdict(self).items() if key != "values"}
        return row | {"samples": len(self.values), "value": self.shown, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.shown:.2f} [{low:.2f}, {high:.2f}]"


def evaluate_text(
    config: DictConfig, methods: dict[str, SparseAttentionConfig | Sliding], results: list[TextResult]
) -> None:
    """Runs task=ruler, counting or perplexity: a line for each method, task and length; files as for speech.

    Adds to `results`, which are those of the folder, and writes all of them.
    """
    settings, options = OmegaConf.to_container(config), config.text
    if options.model is None:
        raise ValueError(f"text.model is missing: evaluate.py task={config.task} text.model=FOLDER")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    methods = {name: method for name, method in methods.items() if not isinstance(method, Sliding)}
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    language_model = LanguageModel(options.model, config.device, config.dtype)
    work = RUNS[config.task](language_model, options)
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: None if options[name] is None else digest(options[name]) for name in ("file", "qa")}
    about = files | {"task": config.task, "model": identity(options.model), "dtype": str(dtype), "batch": config.batch}
    for name, attention in methods.items():
        own = {"attention": asdict(attention), "class": type(attention).__name__}
        if isinstance(attention, RivalConfig):
            own["method"] = attention.method.name
        rows = Rows(folder / "decodings", about | own, config.resume)
        for task, length, samples in work.sets():
            missing = [key for key in samples if rows.get(key) is None]
            if missing and not config.decode:
                done = f"{len(samples) - len(missing)} of {len(samples)} samples done"
                print(f"{name} {task} {length}: left out, {done}", file=sys.stderr)
                continue
            for first in range(0, len(missing), config.batch):
                keys = missing[first : first + config.batch]
                with torch.no_grad(), rivals_active():
                    for key, value in zip(keys, work.run([samples[key]() for key in keys], attention), strict=True):
                        rows.put(key, value)
            values = [rows.get(key) for key in samples]
            read, total = (sum(value[counter] for value in values) for counter in ("pages_read", "pages_total"))
            scores = [value["value"] for value in values]
            result = TextResult(name, attention.budget, config.task, task, length, scores)
            result.share_of_pages_read = read / max(total, 1)
            place = (result.system, task, length)
            results[:] = [each for each in results if (each.system, each.task, each.length) != place] + [result]
            print(
                f"{name:<18} {task:<14} {length:>6} {result} | pages read {result.share_of_pages_read:.1%}", flush=True
            )
            write_text_results(folder, results, settings)
    if not results:
        raise ValueError(f"{folder}: nothing was decoded yet with these settings; leave out decode=false")


class LanguageModel:
    """A causal language model and its tokenizer; the model is loaded when there is something to decode."""

    def __init__(self, name: str, device: str, dtype: str) -> None:
        self.name, self.device, self.dtype = name, device, dtype

    @cached_property
    def tokenizer(self) -> Any:
        return load_pretrained("AutoTokenizer", self.name)

    @cached_property
    def model(self) -> Any:
        device = resolve_device(self.device)
        model = load_pretrained("AutoModelForCausalLM", self.name, dtype=resolve_dtype(self.dtype, device))
        return model.to(device).eval()


class RulerRun:
    """RULER's tasks for one model."""

    def __init__(self, language_model: LanguageModel, options: DictConfig) -> None:
        self.language_model, self.tokenizer, self.options = language_model, language_model.tokenizer, options
        text = Path(options.file).read_text(encoding="utf-8") if options.file else ""
        questions = Path(options.qa).read_text(encoding="utf-8").splitlines() if options.qa else []
        self.sources = Sources(sentences(text), tuple(json.loads(line) for line in questions if line.strip()))
        self.tasks = [task for task in options.tasks if task != "qa" or questions]
        self._items: dict[tuple[str, int, int], Item] = {}  # every method gets the same
        self._last: tuple[SparseAttentionConfig, BatchDecoder] | None = None

    def sets(self) -> Iterator[tuple[str, int, dict[str, Callable[[], Item]]]]:
        """Task, length, and by their keys what makes the samples."""
        options = self.options
        for length in options.lengths:
            for task in self.tasks:
                seeds = range(options.seed, options.seed + options.samples)
                yield (
                    task,
                    length,
                    {f"{task} {length} {seed}": partial(self._item, task, length, seed) for seed in seeds},
                )

    def _item(self, task: str, length: int, seed: int) -> Item:
        place = task, length, seed
        if place not in self._items:
            self._items[place] = make_item(task, length, self.count, seed, self.sources)
        return self._items[place]

    def count(self, text: str) -> int:
        return len(self.tokenizer(self._chat(text, ""), add_special_tokens=False).input_ids)

    def _chat(self, prompt: str, begin: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt + begin
        messages = [{"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return asked + begin.lstrip()

    def _ids(self, item: Item) -> Tensor:
        """[1, N]: what the model is asked, up to where its answer begins."""
        text, special = self._chat(item.prompt, item.begin), self.tokenizer.chat_template is None
        return self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids

    def run(self, items: Sequence[Item], attention: SparseAttentionConfig) -> list[dict[str, Any]]:
        """Answers side by side."""
        decoder = self._decoder(attention)
        answers = dict(interleave((self._answer(item, decoder) for item in items), len(items), decoder.step))
        return [answers[index] for index in range(len(items))]

    def _answer(self, item: Item, decoder: BatchDecoder) -> Generator[None, None, dict[str, Any]]:
        """Yields where the batch has to make a step."""
        model = self.language_model.model
        ids = self._ids(item).to(model.device)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        row, tokens = decoder.row(), []
        try:
            row.prefill(model.get_input_embeddings()(ids))
            for token in row.tokens(item.answer_tokens, ends):
                if token == PENDING:
                    yield
                else:
                    tokens.append(token)
        finally:
            decoder.remove(row)
        output = self.tokenizer.decode(tokens)
        return {
            "value": item.score(output),
            "output": output,
            "answers": item.answers,
            "pages_read": row.statistics.pages_read,
            "pages_total": row.statistics.pages_total,
        }

    def _decoder(self, attention: SparseAttentionConfig) -> BatchDecoder:
        """The last one, if it is for the same method: its memory and CUDA graphs are kept."""
        if self._last is None or self._last[0] is not attention:
            static = False if isinstance(attention, RivalConfig) else None
            self._last = attention, BatchDecoder(self.language_model.model, attention, PREFILL_CHUNK, static)
        return self._last[1]


class CountingRun(RulerRun):
    """RULER's counting tasks for models that cannot write the answer down: they read it, and a wrong one beside it."""

    def __init__(self, language_model: LanguageModel, options: DictConfig) -> None:
        super().__init__(language_model, options)
        self.tasks = [task for task in self.tasks if task in ("common_words", "frequent_words")]
        if not self.tasks:
            raise ValueError("text.tasks has no task with words to count: give common_words or frequent_words")

    def run(self, items: Sequence[Item], attention: SparseAttentionConfig) -> list[dict[str, Any]]:
        """Mean loss of an answer's tokens, each read with its own decode step: the wrong one's less the right one's."""
        model = self.language_model.model
        prompts = [self._ids(item)[0] for item in items for _ in range(2)]
        answers = [
            self.tokenizer(f" {listed(item.task, words)}", add_special_tokens=False, return_tensors="pt").input_ids[0]
            for item in items
            for words in (item.answers, item.others)
        ]
        longest, steps = max(map(len, prompts)), max(map(len, answers))
        ids = torch.zeros(len(prompts), longest + steps, dtype=torch.long)
        starts = torch.tensor([longest - len(prompt) for prompt in prompts])
        for row, start, prompt, answer in zip(ids, starts, prompts, answers, strict=True):
            row[start:longest], row[longest : longest + len(answer)] = prompt, answer
        ids, place = ids.to(model.device), (torch.arange(longest + steps) - starts[:, None]).to(model.device)
        read = torch.arange(steps) < torch.tensor([len(answer) for answer in answers])[:, None]
        set_attention(model, NAME)
        cache = PagedCache(model.config, attention, longest + steps)

        def logits(start: int, end: int) -> Tensor:
            return model(
                ids[:, start:end],
                attention_mask=(place[:, :end] >= 0).long(),
                position_ids=place[:, start:end].clamp(min=0),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]

        spans = [(start, min(longest, start + PREFILL_CHUNK)) for start in range(0, longest, PREFILL_CHUNK)]
        losses = []
        for start, end in (*spans, *((token, token + 1) for token in range(longest, longest + steps - 1))):
            likely = logits(start, end).float().log_softmax(dim=-1)
            if end >= longest:
                losses.append(-likely.gather(1, ids[:, end : end + 1]))
        losses = torch.cat(losses, dim=1).cpu().where(read, 0).sum(dim=1) / read.sum(dim=1)
        right, wrong = losses.unflatten(0, (-1, 2)).unbind(dim=1)
        counted = {key: value // len(ids) for key, value in vars(cache.statistics).items() if key.startswith("pages")}
        return [
            {"value": float(more - less), "right": float(less), "wrong": float(more), **counted}
            for less, more in zip(right, wrong, strict=True)
        ]


class PerplexityRun:
    """Stretches of a text, evenly spaced over it; the last tokens of each are read one by one."""

    def __init__(self, language_model: LanguageModel, options: DictConfig) -> None:
        if options.file is None:
            raise ValueError("text.file is missing: task=perplexity reads a text, text.file=FILE")
        self.language_model, self.options = language_model, options
        self.ids = language_model.tokenizer(
            Path(options.file).read_text(encoding="utf-8"), return_tensors="pt"
        ).input_ids[0]

    def sets(self) -> Iterator[tuple[str, int, dict[str, Callable[[], Tensor]]]]:
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
            yield "perplexity", length, {f"{key} {start}": partial(self._stretch, start, length) for start in starts}

    def _stretch(self, start: int, length: int) -> Tensor:
        return self.ids[start : start + length]

    def run(self, stretches: Sequence[Tensor], attention: SparseAttentionConfig) -> list[dict[str, Any]]:
        """Mean loss, in nats, of the last tokens of each, read side by side and each with its own decode step."""
        model = self.language_model.model
        ids = torch.stack(list(stretches)).to(model.device)
        length, first = ids.shape[1], ids.shape[1] - self.options.score_tokens
        set_attention(model, NAME)
        cache = PagedCache(model.config, attention, length)
        losses = []
        for start in range(0, first, PREFILL_CHUNK):
            chunk = ids[:, start : min(first, start + PREFILL_CHUNK)]
            logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
        for index in range(first, length):
            likely = logits[:, -1].float().log_softmax(dim=-1)
            losses.append(-likely.gather(1, ids[:, index : index + 1]))
            if index + 1 < length:
                logits = model(ids[:, index : index + 1], past_key_values=cache).logits
        counters, rows = cache.statistics, len(ids)
        read = {"pages_read": counters.pages_read // rows, "pages_total": counters.pages_total // rows}
        return [{"value": value, **read} for value in torch.cat(losses, dim=1).mean(dim=1).tolist()]


RUNS = {"ruler": RulerRun, "counting": CountingRun, "perplexity": PerplexityRun}


def load_pretrained(kind: str, name: str, **options: Any) -> Any:
    """`kind` of transformers, such as AutoTokenizer, from a folder, the hub or a .gguf file."""
    import transformers
    from transformers.utils import logging

    path, place = Path(name), name
    if path.suffix == ".gguf":
        place, options = str(path.parent), options | {"gguf_file": path.name}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"text.model={name}: cannot be loaded as a causal language model ({reason})") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def write_text_results(folder: Path, results: Sequence[TextResult], settings: dict[str, Any]) -> None:
    rows = [result.to_dict() for result in results]
    table = json.dumps({"settings": settings, "results": rows}, indent=2)
    (folder / "results.json").write_text(table + "\n", encoding="utf-8")
    write_csv(folder / "results.csv", rows, list(rows[0]))
    measure, options = results[0].measure, settings["text"]
    samples = " or ".join(map(str, sorted({len(result.values) for result in results})))
    what = {
        "ruler": f"RULER: score in percent, {samples} samples of a task; differences to dense, of the mean, in points.",
        "counting": f"RULER's counting tasks, {samples} samples each: nats a token by which the right answer is "
        "likelier than as many other words of the text, both read after a dense prefill; 0 is chance.",
        "perplexity": f"Perplexity of {Path(options['file'] or '').name}: the last {options['score_tokens']} tokens of "
        f"{samples} stretches, read one by one after a dense prefill; differences to dense are in percent.",
    }[measure]
    what += " Intervals are 95 % of bootstrap samples, in pairs for differences.\n"
    sections = [f"# {measure.capitalize()}, {Path(options['model']).name}\n", what]
    lengths = sorted({result.length for result in results})
    for length in lengths:
        sections += [f"## {length} tokens\n", text_table([each for each in results if each.length == length])]
    if len({result.budget for result in results if result.budget}) > 1:
        sections.append(
            text_plot(folder, results, {"ruler": "mean score %", "counting": "mean, nats"}.get(measure, measure))
        )
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")


def text_table(results: Sequence[TextResult]) -> str:
    """Methods and tasks at one length, their mean, and its difference to dense."""
    tasks = list(dict.fromkeys(result.task for result in results))
    by_system = _by_system(results)
    columns = [*tasks, *(["mean"] if len(tasks) > 1 else []), "to dense", "pages read %"]
    lines = ["| method | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for system, own in by_system.items():
        shown = [f"{own[task].shown:.2f}" if task in own else "" for task in tasks]
        whole = len(own) == len(tasks)
        if len(tasks) > 1:
            shown.append(f"{np.mean([own[task].shown for task in tasks]):.2f}" if whole else "")
        dense = by_system.get("dense", {})
        if system != "dense" and whole and len(dense) == len(tasks):
            digits = 3 if results[0].measure == "counting" else 1
            shown.append("{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*difference(own, dense), n=digits))
        else:
            shown.append("")
        shown.append(f"{100 * np.mean([each.share_of_pages_read for each in own.values()]):.1f}")
        lines.append(f"| {system} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def difference(
    own: dict[str, TextResult], dense: dict[str, TextResult], samples: int = 1000
) -> tuple[float, float, float]:
    """(value, low, high), 95 %, of the mean over the tasks, on the same samples; perplexity in percent of dense's."""
    generator, drawn, exact = np.random.default_rng(0), [], []
    for task, result in own.items():
        values = np.array(result.values) - np.array(dense[task].values)
        drawn.append(generator.choice(values, (samples, len(values))).mean(axis=1))
        exact.append(values.mean())
        measure = result.measure
    shown = SHOWN[measure] if measure != "perplexity" else lambda nats: 100 * math.expm1(nats)
    return tuple(
        shown(float(value)) for value in (np.mean(exact), *np.quantile(np.mean(drawn, axis=0), [0.025, 0.975]))
    )


def text_plot(folder: Path, results: Sequence[TextResult], measure: str) -> str:
    """Markdown of the plot against the budget, a panel a length."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    budgets = sorted({result.budget for result in results if result.budget})
    for length in sorted({result.length for result in results}):
        lines = panels.setdefault(f"{length} tokens", {})
        for system, own in _by_system([each for each in results if each.length == length]).items():
            value = float(np.mean([result.shown for result in own.values()]))
            budget = next(iter(own.values())).budget
            name = system.replace(f"-{budget}", "")
            lines.setdefault(name, []).extend((each, value) for each in ([budget] if budget else budgets))
    return draw(folder, f"{results[0].measure}_by_budget", "budget, tokens", panels, measure)


def _by_system(results: Sequence[TextResult]) -> dict[str, dict[str, TextResult]]:
    """Results of one length by system and task."""
    found: dict[str, dict[str, TextResult]] = {}
    for result in results:
        found.setdefault(result.system, {})[result.task] = result
    return found
