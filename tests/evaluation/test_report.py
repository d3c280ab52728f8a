"""The files of a run, from results made by hand."""

import csv
import json
import sys

import pytest

from unique_asr.data import Recording, Span, Utterance
from unique_asr.evaluation.report import find_dense, write_results
from unique_asr.evaluation.results import Hypothesis, SystemResult

SETTINGS = {
    "data": {"manifest": "eval.jsonl"},
    "model": {"name_or_path": "default"},
    "decoding": {"max_pass_seconds": 700},
    "batch": 4,
}


def result(system, budget, minutes, dropped, sparse=True):
    """Ten words a recording, of which the first `dropped` ones of the second recording are left out."""
    sparsity = {"steps": 20, "sparse_steps": 10 * (sparse and budget is not None)}
    made = SystemResult(system, set=f"{minutes} min", budget=budget)
    for name, left in (("x", 0), ("y", dropped)):
        words = [f"{name}{n}" for n in range(10)]
        span = Span(f"{name}.wav", 0.0, 60.0 * minutes)
        recording = Recording(name, (span,), (Utterance(0.0, span.end, " ".join(words)),))
        made.add(
            recording, Hypothesis(" ".join(words[left:]), seconds=3.0, tokens=12, decode_seconds=2.0, sparsity=sparsity)
        )
    return made


@pytest.fixture
def results():
    return [
        result("dense", None, 1, 1),
        result("unique-256", 256, 1, 2),
        result("unique-512", 512, 1, 1),
        result("dense", None, 10, 2),
        result("unique-256", 256, 10, 4),
        result("unique-512", 512, 10, 3),
        result("h2o-256", 256, 10, 6),
        result("h2o-512", 512, 1, 1, sparse=False),
    ]


def test_the_dense_result_of_the_same_recordings(results):
    assert find_dense(results[1], results) is results[0]
    assert find_dense(results[4], results) is results[3]
    assert find_dense(results[0], results) is None


def test_json_csv_and_markdown(results, tmp_path):
    write_results(tmp_path, results, SETTINGS)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == [each.system for each in results]
    assert float(rows[4]["wer"]) == 0.2
    assert float(rows[4]["to_dense"]) == pytest.approx(1.0)
    assert float(rows[2]["to_dense"]) == float(rows[2]["to_dense_high"]) == 0
    assert rows[0]["to_dense"] == ""
    assert float(rows[0]["tokens_per_second"]) == 6
    assert float(rows[0]["rtfx"]) == 20
    table = json.loads((tmp_path / "results.json").read_text())
    assert table["results"][4]["deletions"] == pytest.approx(0.2)
    report = (tmp_path / "report.md").read_text()
    assert "| unique-256 10 min | 20.00 [" in report
    assert "+100.0" in report


def test_a_table_for_each_budget(results, tmp_path):
    write_results(tmp_path, results, SETTINGS)
    report = (tmp_path / "report.md").read_text()
    assert "passes of at most 700 s" in report
    assert "| 10 min | 2 | 0.33 | 10.0, 10.0 |" in report
    small = report.partition("## 256 tokens")[2].partition("## 512 tokens")[0].splitlines()
    rows = {line.split(" |")[0]: line.split(" | ")[1:] for line in small if line.startswith("| ")}
    assert small.count("| method | 1 min | 10 min |") == 2
    assert "| dense | 5.00 | 10.00 |" in small
    assert "| h2o |  | 30.00 (+200.0 [" in "\n".join(small), "to dense"
    assert rows["| h2o"][1].startswith("30.00 (+50.0 ["), "to UNIQUE, in the table after that"
    large = report.partition("## 512 tokens")[2]
    assert "| h2o | = dense |  |" in large, "no step was sparse"


def test_without_matplotlib_the_report_says_so(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_results(tmp_path, results, SETTINGS)
    assert "pip install matplotlib" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    write_results(tmp_path, results, SETTINGS)
    names = {"wer_by_method.png", "wer_by_budget.png", "wer_by_length.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    report = (tmp_path / "report.md").read_text()
    assert all(f"({name})" in report for name in names)
