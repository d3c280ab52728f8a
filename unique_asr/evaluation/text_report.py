"""The results of a run on texts, and the files that show them: results.json, results.csv, and report.md with a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unique_asr.evaluation.plots import draw
from unique_asr.evaluation.report import write_csv

# From the mean of the values of a measure to the number that is shown.
SHOWN: dict[str, Callable[[float], float]] = {
    "ruler": lambda share: 100 * share,
    "counting": lambda nats: nats,
    "perplexity": math.exp,
}


@dataclass
class TextResult:
    """One method on one task at one length.

    Args:
        system: name of the method.
        budget: tokens that a sparse step reads; None for dense attention.
        measure: `ruler` (the share of the answers that were found), `counting` (nats a token by which the right answer
            is likelier than a wrong one) or `perplexity` (nats a token).
        task: of RULER, or `perplexity`.
        length: tokens of the context.
        values: of each sample.
        share_of_pages_read: pages that the steps read, as a share of those that dense attention would have read.
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
        """Mean of the values."""
        return float(np.mean(self.values))

    @property
    def shown(self) -> float:
        """The score in percent, nats, or perplexity."""
        return SHOWN[self.measure](self.mean)

    def estimate_interval(self, level: float = 0.95, samples: int = 1000) -> tuple[float, float]:
        """Estimate the interval of `shown`: percentiles over samples that are drawn again with replacement."""
        means = np.random.default_rng(0).choice(self.values, (samples, len(self.values))).mean(axis=1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return SHOWN[self.measure](float(low)), SHOWN[self.measure](float(high))

    def to_dict(self) -> dict[str, Any]:
        """List the measures by name, for results.json and results.csv."""
        low, high = self.estimate_interval()
        row = {key: value for key, value in asdict(self).items() if key != "values"}
        return row | {"samples": len(self.values), "value": self.shown, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.estimate_interval()
        return f"{self.shown:.2f} [{low:.2f}, {high:.2f}]"


def write_text_results(folder: Path, results: Sequence[TextResult], settings: dict[str, Any]) -> None:
    """Write every file; called again after each result. settings: the configuration of the command."""
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
        sections += [f"## {length} tokens\n", render_text_table([each for each in results if each.length == length])]
    if len({result.budget for result in results if result.budget}) > 1:
        sections.append(
            draw_text_plot(folder, results, {"ruler": "mean score %", "counting": "mean, nats"}.get(measure, measure))
        )
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")


def render_text_table(results: Sequence[TextResult]) -> str:
    """Write the table of methods and tasks at one length, with their mean and its difference to dense."""
    tasks = list(dict.fromkeys(result.task for result in results))
    by_system = _group_by_system(results)
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
            shown.append("{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*compare_to_dense(own, dense), n=digits))
        else:
            shown.append("")
        shown.append(f"{100 * np.mean([each.share_of_pages_read for each in own.values()]):.1f}")
        lines.append(f"| {system} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def compare_to_dense(
    own: dict[str, TextResult], dense: dict[str, TextResult], samples: int = 1000
) -> tuple[float, float, float]:
    """Compare a method with dense attention on the same samples, which are drawn again in pairs.

    Args:
        own, dense: results by task.
        samples: number of draws.

    Returns:
        The difference of the means over the tasks, and both ends of its 95 % interval: percentage points for `ruler`,
        nats for `counting`, percent of dense's for `perplexity`.
    """
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


def draw_text_plot(folder: Path, results: Sequence[TextResult], measure: str) -> str:
    """Draw the mean over the tasks against the budget, a panel for each length; returns Markdown that shows it."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    budgets = sorted({result.budget for result in results if result.budget})
    for length in sorted({result.length for result in results}):
        lines = panels.setdefault(f"{length} tokens", {})
        for system, own in _group_by_system([each for each in results if each.length == length]).items():
            value = float(np.mean([result.shown for result in own.values()]))
            budget = next(iter(own.values())).budget
            name = system.replace(f"-{budget}", "")
            lines.setdefault(name, []).extend((each, value) for each in ([budget] if budget else budgets))
    return draw(folder, f"{results[0].measure}_by_budget", "budget, tokens", panels, measure)


def _group_by_system(results: Sequence[TextResult]) -> dict[str, dict[str, TextResult]]:
    """Group the results of one length by system and task."""
    found: dict[str, dict[str, TextResult]] = {}
    for result in results:
        found.setdefault(result.system, {})[result.task] = result
    return found
