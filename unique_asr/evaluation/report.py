"""The results of a run on speech as files: results.json, results.csv, and report.md with plots.

Plots need matplotlib, which is optional; without it the report says so and has its tables.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unique_asr.evaluation.plots import draw
from unique_asr.evaluation.results import SystemResult
from unique_asr.evaluation.scoring import compare_rates

COLUMNS = (
    "system", "set", "budget", "recordings", "wer", "low", "high", "to_dense", "to_dense_low", "to_dense_high",
    "to_unique", "to_unique_low", "to_unique_high", "substitutions", "deletions", "insertions", "raw_wer", "cer",
    "entity_error_rate", "entities", "words", "longest_repeated_run", "coverage", "words_misplaced", "start_error",
    "rtfx", "tokens_per_second", "peak_memory", "share_of_pages_read", "sparse_steps", "steps", "tokens", "passes",
    "broken_passes", "single_passes", "stop_reasons",
)  # fmt: skip


def find_dense(result: SystemResult, results: Sequence[SystemResult]) -> SystemResult | None:
    """Find the result of dense attention on the same set; None if there is none, or `result` is it."""
    return _find("dense", result, results)


def find_unique(result: SystemResult, results: Sequence[SystemResult]) -> SystemResult | None:
    """Find the result of UNIQUE with the same budget on the same set; None if there is none, or `result` is it."""
    return None if result.budget is None else _find(f"unique-{result.budget}", result, results)


def _find(system: str, result: SystemResult, results: Sequence[SystemResult]) -> SystemResult | None:
    for other in results:
        if other.system == system and other.set == result.set and other is not result:
            return other
    return None


def make_row(result: SystemResult, results: Sequence[SystemResult]) -> dict[str, Any]:
    """Make one row of the table: the measures, and the differences to dense and to UNIQUE, relative to their WER."""
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
    for name, other in (("to_dense", find_dense(result, results)), ("to_unique", find_unique(result, results))):
        if other is not None and sum(error.edits for error in other.errors):
            difference = compare_rates(result.errors, other.errors)
            if len(result.recordings) < 2:
                difference = difference[0], None, None
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), difference, strict=True))
    return {column: row.get(column) for column in COLUMNS}


def write_results(folder: Path, results: Sequence[SystemResult], settings: dict[str, Any]) -> None:
    """Write every file; called again after each system, so that a killed run leaves what it has.

    Args:
        folder: where the files go; it exists.
        results: of every system on every set.
        settings: the configuration of the command.
    """
    rows = [make_row(result, results) for result in results]
    table = {"settings": settings, "results": [result.to_dict() | row for result, row in zip(results, rows)]}
    (folder / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    write_csv(folder / "results.csv", rows, COLUMNS)
    seconds = settings["decoding"]["max_pass_seconds"]
    introduction = (
        f"{Path(settings['data']['manifest']).name}, model {settings['model']['name_or_path']}, greedy, passes of at "
        f"most {'what the model was trained for' if seconds is None else f'{seconds:g} s'}, {settings['batch']} "
        "recordings at a time. Corpus word error rates after Whisper's English normaliser; intervals are 95 % of "
        "bootstrap samples over recordings, in pairs for differences, which are relative.\n"
    )
    sections = ["# Word error rates\n", introduction, render_recordings(results)]
    tables = render_grids(rows)
    shown = [row for row in rows if not (tables and is_dense(row))]
    sections += [*tables, *draw_plots(folder, rows), "## All measures\n", render_measures(shown)]
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")


def render_recordings(results: Sequence[SystemResult]) -> str:
    """Write the table of what each set holds, in Markdown."""
    lines = ["| recordings | number | hours | minutes of the shortest and the longest |", "|---|---|---|---|"]
    for name, result in {result.set: result for result in results}.items():
        minutes = [recording.duration / 60 for recording in result.recordings]
        span = f"{min(minutes):.1f}, {max(minutes):.1f}"
        lines.append(f"| {name or 'all'} | {len(minutes)} | {sum(minutes) / 60:.2f} | {span} |")
    return "\n".join(lines) + "\n"


def render_grids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write a table of methods and sets for each budget; none if a run has one budget and one set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    if not budgets or len(sets) * len(budgets) == 1:
        return []
    sections = []
    for budget in budgets:
        chosen = [row for row in rows if row["budget"] in (budget, None)]
        sections += [f"## {budget} tokens\n", "WER in %, and its difference to dense in %.\n"]
        sections.append(render_grid(chosen, sets, "to_dense", budget))
        others = [row for row in chosen if row["budget"] is not None]
        if any(row["to_unique"] is not None and not is_dense(row) for row in others):
            sections += ["The same, and the difference to UNIQUE in %: more than 0 is worse than UNIQUE.\n"]
            sections.append(render_grid(others, sets, "to_unique", budget))
    return sections


def render_grid(rows: Sequence[dict[str, Any]], sets: Sequence[str], difference: str, budget: int) -> str:
    """Write one table of methods and sets. What had no sparse step is shown as dense.

    Args:
        rows: of `make_row`, of one budget.
        sets: names of the columns.
        difference: the column whose difference stands beside the WER, `to_dense` or `to_unique`.
        budget: in tokens.
    """
    cells = {(row["system"], row["set"]): row for row in rows}

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        if is_dense(row):
            return "= dense"
        text = f"{100 * row['wer']:.2f}"
        if row[difference] is not None:
            text += f" ({100 * row[difference]:+.1f}{format_span(row, f'{difference}_low', f'{difference}_high', '+')})"
        return text

    lines = ["| method | " + " | ".join(name or "all" for name in sets) + " |", "|" + "---|" * (len(sets) + 1)]
    for system in dict.fromkeys(row["system"] for row in rows):
        shown = [cell(cells.get((system, name))) for name in sets]
        lines.append(f"| {system.replace(f'-{budget}', '')} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def is_dense(row: dict[str, Any]) -> bool:
    """Tell whether the budget held the context of every step."""
    return row["budget"] is not None and not row["sparse_steps"]


def format_span(row: dict[str, Any], low: str, high: str, sign: str = "") -> str:
    """Write the interval of a row in percent, or nothing; sign: `+` shows the sign of positive numbers too."""
    return "" if row[low] is None else f" [{100 * row[low]:{sign}.1f}, {100 * row[high]:{sign}.1f}]"


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write the columns of rows as a CSV file with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def render_measures(rows: Sequence[dict[str, Any]]) -> str:
    """Write the table of the measures that people look at; the others are in the CSV file."""

    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "system": lambda row: f"{row['system']} {row['set']}".strip(),
        "WER %": lambda row: f"{100 * row['wer']:.2f}" + format_span(row, "low", "high"),
        "to dense %": lambda row: (
            "" if row["to_dense"] is None
            else f"{100 * row['to_dense']:+.1f}" + format_span(row, "to_dense_low", "to_dense_high", "+")
        ),
        "S / D / I %": lambda row: " / ".join(
            f"{100 * row[kind]:.1f}" for kind in ("substitutions", "deletions", "insertions")
        ),
        "raw WER %": lambda row: f"{100 * row['raw_wer']:.2f}",
        "CER %": lambda row: f"{100 * row['cer']:.2f}",
        "entities missed %": lambda row: format_number(row["entity_error_rate"], 100, 1),
        "longest repeat": lambda row: str(row["longest_repeated_run"]),
        "coverage %": lambda row: f"{100 * row['coverage']:.1f}",
        "start error s": lambda row: format_number(row["start_error"], 1, 2),
        "pages read %": lambda row: f"{100 * row['share_of_pages_read']:.1f}" if row["steps"] else "",
        "passes, single, broken": lambda row: f"{row['passes']}, {row['single_passes']}, {row['broken_passes']}",
        "tokens": lambda row: str(row["tokens"]),
        "RTFx": lambda row: f"{row['rtfx']:.1f}",
        "tokens/s": lambda row: format_number(row["tokens_per_second"], 1, 1),
        "peak GB": lambda row: format_number(row["peak_memory"], 1e-9, 2),
        "stopped": lambda row: row["stop_reasons"],
    }  # fmt: skip
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    lines += ["| " + " | ".join(cell(row) for cell in cells.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def format_number(value: float | None, factor: float, digits: int) -> str:
    """Write a number times a factor, or nothing for None."""
    return "" if value is None else f"{factor * value:.{digits}f}"


def draw_plots(folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw WER against method, budget and length into PNG files; returns the Markdown that shows them."""
    by_budget, by_length, by_method = (defaultdict(lambda: defaultdict(list)) for _ in range(3))
    for row in rows:
        name, budget, place = row["system"].replace(f"-{row['budget']}", ""), row["budget"], row["set"] or "all"
        wer = 100 * row["wer"]
        by_method[place]["" if budget is None else f"{budget} tokens"].append((name, wer))
        if budget is not None:
            by_budget[place][name].append((budget, wer))
        if row["set"].endswith(" min"):
            by_length["dense" if budget is None else f"{budget} tokens"][name].append(
                (float(row["set"].removesuffix(" min")), wer)
            )
    budgets = sorted({budget for lines in by_budget.values() for points in lines.values() for budget, _ in points})
    for place, lines in by_budget.items():
        for row in rows:
            if row["system"] == "dense" and (row["set"] or "all") == place:
                lines["dense"] = [(budget, 100 * row["wer"]) for budget in budgets]
    unbudgeted = by_length.pop("dense", {})
    for lines in by_length.values():
        lines |= unbudgeted
    by_length = by_length or {"": unbudgeted}
    drawn = [draw(folder, "wer_by_method", "method", by_method, "WER %", join=False)]
    if len(budgets) > 1:
        drawn.append(draw(folder, "wer_by_budget", "budget, tokens", by_budget, "WER %"))
    if any(len(points) > 1 for lines in by_length.values() for points in lines.values()):
        drawn.append(draw(folder, "wer_by_length", "length, minutes", by_length, "WER %"))
    return list(dict.fromkeys(drawn))
