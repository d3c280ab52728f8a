"""Tables of runs of scripts/finetune.py that differ in the attention they train with: mean and spread over seeds.

    python benchmarks/tools/compare_runs.py outputs/sparsity outputs/sparsity_text --into benchmarks/sparsity.md

A run is a folder with config.yaml and, in folders of its own, what scripts/evaluate.py found: RUN/*/results.json and
the rows of each system beside it, of which intervals are made (conf/experiment/sparsity.yaml has the commands). With
--into, the tables replace what the file has between the lines <!-- tables --> and <!-- end of tables -->; else they are
printed.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

BASE = {"tau": 0.5, "queries": "decoded", "hard_last": 0.0}  # settings of the experiment; ablations vary them
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
SAMPLES = 2000  # draws of the bootstrap


@dataclass
class Measurement:
    """One system on one set."""

    value: float  # word error rate in percent, or perplexity
    passes: int | None = None  # over all recordings
    pages: float = 1.0  # share of the pages read
    errors: dict[str, int] = field(default_factory=dict)  # by recording; none for perplexities
    words: dict[str, int] = field(default_factory=dict)  # of the references, by recording


@dataclass
class EvaluatedRun:
    """A training run and what was measured of its model."""

    arm: str
    seed: int
    measured: dict[tuple[str, int | None], Measurement]  # by set and budget; None: dense attention
    budget: int = 0  # tokens that it was trained with
    loss: float | None = None  # mean of the last quarter of the steps, in nats


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--into", type=Path)
    arguments = parser.parse_args()
    tables = "\n".join(section for folder in arguments.folders for section in render_sections(read_runs(folder)))
    if not arguments.into:
        print(tables)
        return
    text = arguments.into.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        parser.error(f"{arguments.into}: has no lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    arguments.into.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}", encoding="utf-8")


def read_runs(folder: Path) -> list[EvaluatedRun]:
    """Read the runs of a folder that were evaluated, in the order of their arms. Exits if there is none."""
    runs = []
    for path in sorted(folder.glob("*/config.yaml")):
        config, measured = OmegaConf.load(path), {}
        for results in sorted(path.parent.glob("*/results.json")):
            for row in json.loads(results.read_text(encoding="utf-8"))["results"]:
                name = row["set"] if "set" in row else f"{row['task']} {row['length']}"
                measured[name, row["budget"]] = read_result(results.parent, row)
        if measured:
            loss = read_last_loss(path.with_name("metrics.jsonl"))
            runs.append(EvaluatedRun(name_arm(config), int(config.seed), measured, int(config.training.budget), loss))
    if not runs:
        raise SystemExit(f"{folder}: no run with config.yaml and */results.json")
    order = {"start": 0, "dense": 1, "hard": 2, "soft": 3}
    return sorted(runs, key=lambda run: (order.get(run.arm, 4), run.arm, run.seed))


def name_arm(config: OmegaConf) -> str:
    """Name the arm of a run: `start` if nothing was learned, else its mode, with what differs from `BASE` if soft."""
    if not any(rate for stage in config.stages for rate in stage.train.values()):
        return "start"
    training = config.training
    differing = [f"{name} {training[name]}" for name, usual in BASE.items() if training[name] != usual]
    return ", ".join([training.mode, *differing]) if training.mode == "soft" else training.mode


def read_last_loss(path: Path) -> float | None:
    """Read the mean loss of the last quarter of the steps, whose batches are the same in runs of one seed."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    return float(np.mean(losses[-max(len(losses) // 4, 1) :])) if losses else None


def read_result(folder: Path, row: dict) -> Measurement:
    """Read a row of results.json, with the errors of each recording if the file of its rows is whole."""
    if "task" in row:
        return Measurement(row["value"], pages=row["share_of_pages_read"])
    stem = f"{row['system']}@{row['set'].replace(' ', '')}" if row["set"] else row["system"]
    path = folder / f"{stem}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if len(lines) < row["recordings"]:  # the mean is known, its recordings are not
        return Measurement(100 * row["wer"], row["passes"], row["share_of_pages_read"])
    words = {line["audio_filepath"]: count_words(line["text"]) for line in lines}
    errors = {line["audio_filepath"]: round(line["wer"] * words[line["audio_filepath"]]) for line in lines}
    return Measurement(100 * row["wer"], row["passes"], row["share_of_pages_read"], errors, words)


_counts: dict[str, int] = {}


def count_words(text: str) -> int:
    """Count the words of a reference as word error rates do."""
    from unique_asr.evaluation.scoring import load_english_normalizer

    if text not in _counts:
        _counts[text] = max(len(load_english_normalizer()(text).split()), 1)
    return _counts[text]


def render_sections(runs: Sequence[EvaluatedRun]) -> Iterable[str]:
    """Write all tables in Markdown: losses, then for each set error rates, passes and differences."""
    arms: dict[str, list[EvaluatedRun]] = defaultdict(list)
    for run in runs:
        arms[run.arm].append(run)
    yield from render_losses(arms)
    for name in sorted({name for run in runs for name, _ in run.measured}, key=_read_minutes, reverse=True):
        found = {budget for run in runs for each, budget in run.measured if each == name}
        budgets = sorted(found, key=lambda budget: -(budget or 1 << 30))
        speech = any(m.words for run in runs for (each, _), m in run.measured.items() if each == name)
        what = f"Word error rates in %, {name}" if speech else f"{name[0].upper()}{name[1:]} tokens"
        yield f"**{what}**: mean ± standard deviation over seeds (of so many, where not all were evaluated)\n"
        yield render_table("trained with", arms, name, budgets, lambda m: m.value)
        if speech:
            count = max(len(m.words) for run in runs for (each, _), m in run.measured.items() if each == name)
            yield f"Passes for {count} recordings, mean over seeds:\n"
            yield render_table("trained with", arms, name, budgets, lambda m: m.passes, digits=0)
            yield from render_comparisons(arms, name, budgets)


def render_losses(arms: dict[str, list[EvaluatedRun]]) -> Iterable[str]:
    """Write the table of training losses, if any run has one."""
    found = {arm: [run.loss for run in runs if run.loss is not None] for arm, runs in arms.items() if arm != "start"}
    lines = [f"| {arm} | {len(each)} | {format_mean(each, 4)} |" for arm, each in found.items() if each]
    if lines:
        yield "**Training loss** in nats, the last quarter of the steps\n"
        yield "\n".join(["| trained with | seeds | loss |", "|---|---|---|", *lines]) + "\n"


def render_table(
    head: str,
    arms: dict[str, list[EvaluatedRun]],
    name: str,
    budgets: list,
    of: Callable[[Measurement], float],
    digits: int = 2,
) -> str:
    """Write a table of arms and budgets on the set `name`; of: the number that is shown."""

    def measured(runs: Iterable[EvaluatedRun], budget: int | None) -> list[Measurement]:
        return [run.measured[name, budget] for run in runs if (name, budget) in run.measured]

    every = [run for runs in arms.values() for run in runs]
    pages = {budget: np.mean([each.pages for each in measured(every, budget)]) for budget in budgets}
    heads = ["dense" if budget is None else f"{budget} ({pages[budget]:.0%} of the pages)" for budget in budgets]
    lines = [f"| {head} | seeds | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 2)]
    for arm, runs in arms.items():
        values = [[of(each) for each in measured(runs, budget)] for budget in budgets]
        seeds = max(map(len, values))
        if seeds:
            cells = [format_mean(each, digits) + f" ({len(each)})" * (0 < len(each) < seeds) for each in values]
            lines.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_mean(values: Sequence[float], digits: int) -> str:
    """Write a mean and its standard deviation; nothing for no values."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and digits else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def render_comparisons(arms: dict[str, list[EvaluatedRun]], name: str, budgets: list) -> Iterable[str]:
    """Write the table of differences in points, by seed in pairs, with intervals over recordings."""
    pairs = [(("soft", budget), ("hard", budget)) for budget in budgets]
    pairs += [(("soft", budget), ("dense", budget)) for budget in budgets]
    pairs += [(("soft", budget), ("dense", None)) for budget in budgets if budget is not None]
    for arm, (run, *_) in arms.items():  # ablations
        if arm not in ("start", "dense", "hard", "soft") and run.budget in budgets:
            pairs += [((arm, budget), ("hard", budget)) for budget in budgets if budget is not None]
            pairs += [((arm, run.budget), ("dense", None))]
    lines = ["| difference | by seed | mean | 95 % over recordings |", "|---|---|---|---|"]
    for ours, theirs in pairs:
        found = [
            (run.measured[name, ours[1]], other.measured[name, theirs[1]])
            for run in arms.get(ours[0], [])
            for other in arms.get(theirs[0], [])
            if run.seed == other.seed and (name, ours[1]) in run.measured and (name, theirs[1]) in other.measured
        ]
        if found:
            by_seed = [mine.value - other.value for mine, other in found]
            whole = all(measured.words for pair in found for measured in pair)
            shown = "[{:+.2f}, {:+.2f}]".format(*estimate_interval(found)) if whole else ""
            title = " - ".join(f"{arm} at {budget or 'dense'}" for arm, budget in (ours, theirs))
            lines.append(
                f"| {title} | {', '.join(f'{each:+.2f}' for each in by_seed)} | {np.mean(by_seed):+.2f} | {shown} |"
            )
    if len(lines) > 2:
        yield "Differences in points of word error rate, negative where the first is better:\n"
        yield "\n".join(lines) + "\n"


def estimate_interval(pairs: Sequence[tuple[Measurement, Measurement]]) -> tuple[float, float]:
    """Estimate the 95 % interval of a difference in points.

    Recordings are drawn again in pairs, with their errors summed over seeds.
    """
    names = sorted(set.intersection(*(set(measured.words) for pair in pairs for measured in pair)))
    ours, theirs = (np.sum([[pair[side].errors[n] for n in names] for pair in pairs], 0) for side in (0, 1))
    words = np.sum([[pair[0].words[n] for n in names] for pair in pairs], 0)
    draws = np.random.default_rng(0).integers(len(names), size=(SAMPLES, len(names)))
    differences = 100 * (ours - theirs)[draws].sum(1) / words[draws].sum(1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def _read_minutes(name: str) -> float:
    number = re.search(r"[\d.]+", name)
    return float(number.group()) if number else 0.0


if __name__ == "__main__":
    main()
