"""Tables over seeds from what evaluation left, made-up runs of known errors."""

import json
import sys

import compare_runs
import pytest
from omegaconf import OmegaConf

WORDS = 50  # of each of four recordings


@pytest.fixture
def make_run(tmp_path):
    """A run whose recordings have so many errors each, by budget."""

    def make(errors, mode="soft", seed=0, rate=1e-4, folder="sparsity", losses=(), **training):
        training = {"mode": mode, "tau": 0.5, "queries": "decoded", "hard_last": 0.0, "budget": 256, **training}
        run = tmp_path / folder / f"{mode}-{seed}-{rate}-{training['tau']}"
        (run / "wer").mkdir(parents=True)
        config = {"training": training, "seed": seed, "stages": [{"train": {"language_model": rate}}]}
        OmegaConf.save(OmegaConf.create(config), run / "config.yaml")
        (run / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
        rows = []
        for budget, each in errors.items():
            system = f"unique-{budget}" if budget else "dense"
            rows.append(
                {
                    "system": system, "set": "10 min", "budget": budget, "wer": sum(each) / WORDS / len(each),
                    "passes": 6, "share_of_pages_read": 0.25 if budget else 1.0, "recordings": len(each),
                }
            )  # fmt: skip
            lines = [
                {"audio_filepath": f"r{n}", "text": " ".join(["word"] * WORDS), "wer": count / WORDS}
                for n, count in enumerate(each)
            ]
            (run / "wer" / f"{system}@10min.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "wer" / "results.json").write_text(json.dumps({"settings": {}, "results": rows}))

    return make


def test_means_and_spreads_over_seeds(make_run, tmp_path):
    make_run({None: [4, 4, 4, 4], 256: [6, 6, 6, 6]}, "dense", seed=0)
    make_run({None: [5, 5, 5, 5], 256: [5, 5, 5, 5]}, "dense", seed=1)
    make_run({None: [4, 4, 4, 4], 256: [3, 3, 3, 3]}, "soft", seed=0)
    make_run({None: [4, 4, 4, 4], 256: [4, 4, 4, 4]}, "soft", seed=1)
    make_run({256: [9, 9, 9, 9]}, "soft", seed=0, tau=0.25)
    make_run({256: [9, 9, 9, 9]}, "dense", seed=0, rate=0.0)
    text = "\n".join(compare_runs.render_sections(compare_runs.read_runs(tmp_path / "sparsity")))
    assert "| trained with | seeds | dense | 256 (25% of the pages) |" in text
    assert "| start | 1 |  | 18.00 |" in text
    assert "| dense | 2 | 9.00 ± 1.41 | 11.00 ± 1.41 |" in text
    assert "| soft | 2 | 8.00 ± 0.00 | 7.00 ± 1.41 |" in text
    assert "| soft, tau 0.25 | 1 |  | 18.00 |" in text
    assert "Passes for 4 recordings" in text
    # The errors of every recording are the same, and so is every draw of recordings.
    assert "| soft at 256 - dense at dense | -2.00, -2.00 | -2.00 | [-2.00, -2.00] |" in text
    assert "| soft at 256 - dense at 256 | -6.00, -2.00 | -4.00 | [-4.00, -4.00] |" in text


def test_losses_are_of_the_last_quarter(make_run, tmp_path):
    make_run({256: [1]}, "soft", seed=0, losses=[9, 9, 9, 9, 9, 9, 1, 2])
    make_run({256: [1]}, "soft", seed=1, losses=[2.5])
    make_run({256: [1]}, "hard")  # has none
    text = "\n".join(compare_runs.render_sections(compare_runs.read_runs(tmp_path / "sparsity")))
    assert "| soft | 2 | 2.0000 ± 0.7071 |" in text
    assert "| hard | 0" not in text
    assert "| hard | 1 | 2.00 |" in text


def test_ablations_are_compared_at_their_budget(make_run, tmp_path):
    make_run({None: [4, 4], 256: [6, 6]}, "dense")
    make_run({128: [9, 7], 256: [5, 5]}, "hard")
    make_run({128: [9, 9], 256: [3, 3]}, "soft", tau=0.1)
    text = "\n".join(compare_runs.render_sections(compare_runs.read_runs(tmp_path / "sparsity")))
    assert "| soft, tau 0.1 at 256 - hard at 256 | -4.00 | -4.00 | [-4.00, -4.00] |" in text
    assert "| soft, tau 0.1 at 256 - dense at dense | -2.00 | -2.00 | [-2.00, -2.00] |" in text
    assert "| soft, tau 0.1 at 128 - hard at 128 | +2.00 | +2.00 | [+0.00, +4.00] |" in text
    assert "soft, tau 0.1 at 128 - dense" not in text


def test_intervals_are_over_recordings(make_run, tmp_path):
    make_run({256: [0, 0, 0, 40]}, "soft")
    make_run({256: [10, 10, 10, 10]}, "hard")
    (line,) = [
        line
        for line in "\n".join(compare_runs.render_sections(compare_runs.read_runs(tmp_path / "sparsity"))).splitlines()
        if line.startswith("| soft at 256 - hard at 256")
    ]
    assert "| +0.00 | +0.00 | [-20.00, +40.00] |" in line


def test_perplexities(tmp_path, make_run):
    make_run({None: [1]}, folder="text")
    (run,) = (tmp_path / "text").iterdir()
    row = {"system": "unique-128", "budget": 128, "task": "perplexity", "length": 8192, "value": 12.345,
           "share_of_pages_read": 0.02}  # fmt: skip
    (run / "wer" / "results.json").write_text(json.dumps({"results": [row]}))
    text = "\n".join(compare_runs.render_sections(compare_runs.read_runs(tmp_path / "text")))
    assert text.startswith("**Perplexity 8192 tokens**")
    assert "| soft | 1 | 12.35 |" in text
    assert "Passes" not in text


def test_means_need_no_rows_and_intervals_do(make_run, tmp_path):
    make_run({None: [4, 4, 4, 4], 256: [6, 6, 6, 6]}, "dense")
    make_run({None: [4, 4, 4, 4], 256: [3, 3, 3, 3]}, "soft")
    make_run({256: [4, 4, 4, 4]}, "soft", seed=1)
    rows = next(tmp_path.glob("sparsity/soft-0-*/wer/unique-256@10min.jsonl"))
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))  # broken off
    text = "\n".join(compare_runs.render_sections(compare_runs.read_runs(tmp_path / "sparsity")))
    assert "| soft | 2 | 8.00 (1) | 7.00 ± 1.41 |" in text
    assert "| soft at 256 - dense at 256 | -6.00 | -6.00 |  |" in text


def test_tables_go_into_a_file(make_run, tmp_path, monkeypatch, capsys):
    make_run({None: [1, 2]})
    path = tmp_path / "sparsity.md"
    path.write_text("# Title\n<!-- tables -->\nold\n<!-- end of tables -->\nrest\n")
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "sparsity"), "--into", str(path)])
    for _ in range(2):
        compare_runs.main()
        text = path.read_text()
        assert text.startswith("# Title\n<!-- tables -->\n\n**Word error rates")
        assert text.endswith("<!-- end of tables -->\nrest\n")
        assert "old" not in text
    path.write_text("nothing")
    with pytest.raises(SystemExit):
        compare_runs.main()
    assert "has no lines" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no run with config"):
        compare_runs.read_runs(tmp_path / "none")
