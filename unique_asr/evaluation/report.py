"""The results of a run as files: results.json, results.csv, report.md with plots, and rows for the leaderboard.

Plots need matplotlib, which is optional; without it the report says so and has its tables.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unique_asr.evaluation.harness import Result
from unique_asr.evaluation.scoring import relative_difference

COLUMNS = (
    "system", "set", "budget", "recordings", "wer", "low", "high", "to_dense", "to_dense_low", "to_dense_high",
    "to_unique", "to_unique_low", "to_unique_high", "substitutions", "deletions", "insertions", "raw_wer", "cer",
    "entity_error_rate", "entities", "words", "longest_repeated_run", "coverage", "words_misplaced", "start_error",
    "rtfx", "tokens_per_second", "peak_memory", "share_of_pages_read", "sparse_steps", "steps", "tokens", "passes",
    "broken_passes", "single_passes", "stop_reasons",
)  # fmt: skip


def dense_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The result of dense attention on the same recordings, unless that is what it is."""
    return _other("dense", result, results)


def unique_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The result of UNIQUE with the same budget on the same recordings, unless that is what it is."""
    return None if result.budget is None else _other(f"unique-{result.budget}", result, results)


def _other(system: str, result: Result, results: Sequence[Result]) -> Result | None:
    for other in results:
        if other.system == system and other.set == result.set and other is not result:
            return other
    return None


def flat(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    """One row of the table, with the differences to dense and to UNIQUE, relative to their word error rates."""
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
    for name, other in (("to_dense", dense_of(result, results)), ("to_unique", unique_of(result, results))):
        if other is not None and sum(error.edits for error in other.errors):
            difference = relative_difference(result.errors, other.errors)
            if len(result.recordings) < 2:
                difference = difference[0], None, None
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), difference, strict=True))
    return {column: row.get(column) for column in COLUMNS}


def write_results(folder: Path, results: Sequence[Result], settings: dict[str, Any]) -> None:
    """Every file; called again after each system, so that a killed run leaves what it has."""
    rows = [flat(result, results) for result in results]
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
    sections = ["# Word error rates\n", introduction, recordings_table(results)]
    tables = grids(rows)
    shown = [row for row in rows if not (tables and is_dense(row))]
    sections += [*tables, *plots(folder, rows), "## All measures\n", markdown_table(shown)]
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")


def recordings_table(results: Sequence[Result]) -> str:
    """What each set holds."""
    lines = ["| recordings | number | hours | minutes of the shortest and the longest |", "|---|---|---|---|"]
    for name, result in {result.set: result for result in results}.items():
        minutes = [recording.duration / 60 for recording in result.recordings]
        span = f"{min(minutes):.1f}, {max(minutes):.1f}"
        lines.append(f"| {name or 'all'} | {len(minutes)} | {sum(minutes) / 60:.2f} | {span} |")
    return "\n".join(lines) + "\n"


def grids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of methods and lengths for each budget; none if a run has one budget and one length."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    if not budgets or len(sets) * len(budgets) == 1:
        return []
    sections = []
    for budget in budgets:
        chosen = [row for row in rows if row["budget"] in (budget, None)]
        sections += [f"## {budget} tokens\n", "WER in %, and its difference to dense in %.\n"]
        sections.append(grid(chosen, sets, "to_dense", budget))
        others = [row for row in chosen if row["budget"] is not None]
        if any(row["to_unique"] is not None and not is_dense(row) for row in others):
            sections += ["The same, and the difference to UNIQUE in %: more than 0 is worse than UNIQUE.\n"]
            sections.append(grid(others, sets, "to_unique", budget))
    return sections


def grid(rows: Sequence[dict[str, Any]], sets: Sequence[str], difference: str, budget: int) -> str:
    """Methods and sets; what no step of was sparse is dense."""
    cells = {(row["system"], row["set"]): row for row in rows}

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        if is_dense(row):
            return "= dense"
        text = f"{100 * row['wer']:.2f}"
        if row[difference] is not None:
            text += f" ({100 * row[difference]:+.1f}{span(row, f'{difference}_low', f'{difference}_high', '+')})"
        return text

    lines = ["| method | " + " | ".join(name or "all" for name in sets) + " |", "|" + "---|" * (len(sets) + 1)]
    for system in dict.fromkeys(row["system"] for row in rows):
        shown = [cell(cells.get((system, name))) for name in sets]
        lines.append(f"| {system.replace(f'-{budget}', '')} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def is_dense(row: dict[str, Any]) -> bool:
    """Whether the budget held the context of every step."""
    return row["budget"] is not None and not row["sparse_steps"]


def span(row: dict[str, Any], low: str, high: str, sign: str = "") -> str:
    return "" if row[low] is None else f" [{100 * row[low]:{sign}.1f}, {100 * row[high]:{sign}.1f}]"


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The columns that people look at; the others are in the CSV file."""

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
        "passes, single, broken": lambda row: f"{row['passes']}, {row['single_passes']}, {row['broken_passes']}",
        "tokens": lambda row: str(row["tokens"]),
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


def leading_number(panel: tuple[str, Any]) -> float:
    """Of a title: 2 minutes come before 10."""
    number = re.match(r"[\d.]+", panel[0])
    return float(number.group()) if number else 0.0


def draw(
    folder: Path,
    name: str,
    label: str,
    panels: dict[str, dict[str, list[tuple[Any, float]]]],
    measure: str,
    join: bool = True,
) -> str:
    """Markdown of a PNG file: a panel a title, lines of points by name in it; join=False: points alone, x are names."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "No plots: they need matplotlib (pip install matplotlib).\n"

    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.5 + 4 * len(panels), 4), sharey=True, squeeze=False)
    values = [y for lines in panels.values() for points in lines.values() for _, y in points]
    names = sorted({line for lines in panels.values() for line in lines} - {"dense"})
    colors = {"dense": "black"} | {line: f"C{index % 10}" for index, line in enumerate(names)}
    for axis, (title, lines) in zip(axes[0], sorted(panels.items(), key=leading_number), strict=True):
        for line, points in sorted(lines.items()):
            x, y = zip(*sorted(points), strict=True) if join else zip(*points, strict=True)
            style = ("o--" if line == "dense" else "o-") if join else "o"
            axis.plot(x, y, style, color=colors[line], label=line or None)
        if join:
            axis.set_xscale("log", base=2)
            places = sorted({x for points in lines.values() for x, _ in points})
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.minorticks_off()
        if max(values) > 5 * min(values) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3, which="both")
        axis.tick_params(axis="x", rotation=0 if join else 60)
        if any(lines):
            axis.legend(fontsize="x-small")
    axes[0, 0].set_ylabel(measure)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)
    return f"![{measure} against {label}]({name}.png)\n"
