"""What is measured on texts, and how it is shown: tables, plots, files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unique_asr.evaluation.report import draw, write_csv

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
