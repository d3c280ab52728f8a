"""The results of a run as files: results.json, results.csv, report.md with plots, and rows for the leaderboard.

Plots need matplotlib, which is optional; without it the report says so and has its tables.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .harness import Result
from .scoring import relative_difference

COLUMNS = (
    "system", "set", "budget", "recordings", "wer", "low", "high", "to_dense", "to_dense_low", "to_dense_high",
    "substitutions", "deletions", "insertions", "raw_wer", "cer", "entity_error_rate", "entities", "words",
    "longest_repeated_run", "coverage", "words_misplaced", "start_error", "rtfx", "tokens_per_second", "peak_memory",
    "share_of_pages_read", "sparse_steps", "steps", "passes", "stop_reasons",
)  # fmt: skip


def dense_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The result of dense attention on the same recordings, unless that is what it is."""
    for other in results:
        if other.system == "dense" and other.set == result.set and other is not result:
            return other
    return None


def flat(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    """One row of the table, with the difference to dense relative to dense's word error rate."""
    row = result.to_dict()
    low, high = row["interval"] or (None, None)
    timing = result.timing
    row |= {
        "low": low,
        "high": high,
        "words_misplaced": timing.misplaced / timing.words if timing.words else None,
        "start_error": timing.to_dict()["start_error"],
        "stop_reasons": " ".join(f"{reason}:{count}" for reason, count in row["stop_reasons"].items()),
    }
    dense = dense_of(result, results)
    if dense is not None and sum(error.edits for error in dense.errors):
        difference = relative_difference(result.errors, dense.errors)
        row |= dict(zip(("to_dense", "to_dense_low", "to_dense_high"), difference, strict=True))
        if len(result.recordings) < 2:
            row["to_dense_low"] = row["to_dense_high"] = None
    return {column: row.get(column) for column in COLUMNS}


def write_results(folder: Path, results: Sequence[Result], settings: dict[str, Any]) -> None:
    """Every file; called again after each system, so that a killed run leaves what it has."""
    rows = [flat(result, results) for result in results]
    table = {"settings": settings, "results": [result.to_dict() | row for result, row in zip(results, rows)]}
    (folder / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    write_csv(folder / "results.csv", rows, COLUMNS)
    sections = [
        "# Word error rates\n",
        f"{settings['data']['manifest']}, {settings['model']['name_or_path']}; greedy, Whisper's English normaliser, "
        "intervals: 95 % of bootstrap samples over recordings, in pairs for the difference to dense.\n",
        markdown_table(rows),
    ]
    (folder / "report.md").write_text("\n".join([*sections, *plots(folder, rows)]), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The columns that people look at; the others are in the CSV file."""

    def span(row: dict[str, Any], low: str, high: str, sign: str = "") -> str:
        return "" if row[low] is None else f" [{100 * row[low]:{sign}.1f}, {100 * row[high]:{sign}.1f}]"

    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "system": lambda row: f"{row['system']} {row['set']}".strip(),
        "WER %": lambda row: f"{100 * row['wer']:.2f}" + span(row, "low", "high"),
        "to dense %": lambda row: (
            "" if row["to_dense"] is None
            else f"{100 * row['to_dense']:+.1f}" + span(row, "to_dense_low", "to_dense_high", "+")
        ),
        "S / D / I %": lambda row: " / ".join(
            f"{100 * row[kind]:.1f}" for kind in ("substitutions", "deletions", "insertions")
        ),
        "raw WER %": lambda row: f"{100 * row['raw_wer']:.2f}",
        "CER %": lambda row: f"{100 * row['cer']:.2f}",
        "entities missed %": lambda row: number(row["entity_error_rate"], 100, 1),
        "longest repeat": lambda row: str(row["longest_repeated_run"]),
        "coverage %": lambda row: f"{100 * row['coverage']:.1f}",
        "start error s": lambda row: number(row["start_error"], 1, 2),
        "pages read %": lambda row: f"{100 * row['share_of_pages_read']:.1f}" if row["steps"] else "",
        "RTFx": lambda row: f"{row['rtfx']:.1f}",
        "tokens/s": lambda row: number(row["tokens_per_second"], 1, 1),
        "peak GB": lambda row: number(row["peak_memory"], 1e-9, 2),
        "stopped": lambda row: row["stop_reasons"],
    }  # fmt: skip
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    lines += ["| " + " | ".join(cell(row) for cell in cells.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def plots(folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown of the plots, drawn into PNG files: against the budget, the length and the method."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return ["No plots: they need matplotlib (pip install matplotlib).\n"]

    def draw(name: str, label: str, lines: dict[str, list[tuple[Any, float]]], log: bool = False) -> str:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for title, points in lines.items():
            x, y = zip(*points)
            axes.plot(x, y, "o-", label=title)
        if log:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=label, ylabel="WER %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.tick_params(axis="x", rotation=0 if log else 30)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=150)
        pyplot.close(figure)
        return f"![WER against {label}]({name}.png)\n"

    by_budget, by_length, by_method = defaultdict(list), defaultdict(list), defaultdict(list)
    for row in rows:
        wer, name = 100 * row["wer"], f"{row['system']} {row['set']}".strip()
        by_method[row["set"] or "all"].append((row["system"], wer))
        if row["set"].endswith(" min"):
            by_length[row["system"]].append((float(row["set"].removesuffix(" min")), wer))
        if row["budget"] is not None:
            by_budget[name.replace(f"-{row['budget']}", "")].append((row["budget"], wer))
    budgets = sorted({budget for points in by_budget.values() for budget, _ in points})
    drawn = [draw("wer_by_method", "method", by_method)]
    if len(budgets) > 1:
        for row in rows:
            if row["budget"] is None and row["system"] == "dense":
                by_budget[f"dense {row['set']}".strip()] = [(budget, 100 * row["wer"]) for budget in budgets]
        drawn.append(draw("wer_by_budget", "budget, tokens", by_budget, log=True))
    if any(len(points) > 1 for points in by_length.values()):
        drawn.append(draw("wer_by_length", "length, minutes", by_length, log=True))
    return drawn
