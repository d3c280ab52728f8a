"""Text tasks with a tiny language model of random weights, from a folder as a user has it."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unique_asr.evaluation.cli import main
from unique_asr.evaluation.ruler import make_sample

TEXT = "The mill stood by the river. Nobody came there after the war. It was a quiet and forgotten place. " * 40


@pytest.fixture(scope="module")
def folder(byte_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(TEXT)
    return path


def run(folder, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([f"text.model={folder}", f"text.file={folder / 'text.txt'}", *arguments])
    return stop.value.code


def test_perplexity_is_that_of_one_forward_pass(folder, tmp_path, capsys):
    options = ["task=perplexity", "text.lengths=[160]", "text.score_tokens=12", "text.samples=2"]
    methods = ["methods=[dense,unique,streaming_llm,h2o,sliding]", "attention.budget=[64,256]"]
    assert run(folder, *options, *methods, f"output.dir={tmp_path}") == 0
    results = {row["system"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert list(results) == [
        "dense",
        "unique-64",
        "unique-256",
        "streaming_llm-64",
        "streaming_llm-256",
        "h2o-64",
        "h2o-256",
    ]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    losses = []
    for start in (0, len(ids) - 160):
        stretch = ids[start : start + 160]
        with torch.no_grad():
            logits = model(stretch[None]).logits[0, 147:159]
        losses.append(torch.nn.functional.cross_entropy(logits, stretch[148:]).item())
    expected = torch.tensor(losses).mean().exp().item()
    for system in ("dense", "unique-256", "streaming_llm-256", "h2o-256"):
        assert results[system]["value"] == pytest.approx(expected, rel=1e-4), "a budget that holds everything is dense"
    for system in ("unique-64", "streaming_llm-64", "h2o-64"):
        assert results[system]["value"] != pytest.approx(expected, rel=1e-4)
        assert results[system]["share_of_pages_read"] < 0.5
    assert "| unique-64 |" in (tmp_path / "report.md").read_text()


def test_ruler(folder, tmp_path, capsys):
    options = ["task=ruler", "text.lengths=[900]", "text.samples=1", "text.tasks=[tracking,frequent_words,qa]"]
    options += ["attention.budget=[null,64]", f"output.dir={tmp_path}"]
    assert run(folder, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        [system, task, "900"] for system in ("dense", "unique-64") for task in ("tracking", "frequent_words")
    ], "questions need a file"
    assert run(folder, *options) == 0
    assert capsys.readouterr().out.splitlines() == lines, "nothing is decoded again"


def test_counting_is_the_loss_of_the_answers_in_one_forward_pass(folder, tmp_path, capsys):
    options = ["task=counting", "text.lengths=[900]", "text.samples=3", "text.tasks=[single,frequent_words]", "batch=2"]
    options += ["methods=[dense,unique,infllm,h2o]", "attention.budget=[112,100000]", f"output.dir={tmp_path}"]
    assert run(folder, *options) == 0
    results = {row["system"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def ids(text):
        return tokenizer(text, return_tensors="pt").input_ids

    margins = []
    for seed in range(3):
        sample = make_sample("frequent_words", 900, lambda text: ids(text).shape[1], seed)
        prompt, losses = ids(sample.prompt + sample.begin), []
        for words in (sample.answers, sample.others):
            answer = ids(" " + ", ".join(words))
            with torch.no_grad():
                logits = model(torch.cat([prompt, answer], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, answer[0]).item())
        margins.append(losses[1] - losses[0])
    expected = sum(margins) / 3
    assert {row["task"] for row in results.values()} == {"frequent_words"}
    for system in ("dense", "unique-100000", "infllm-100000", "h2o-100000"):
        assert results[system]["value"] == pytest.approx(expected, abs=1e-4)
    for system in ("unique-112", "infllm-112", "h2o-112"):
        assert results[system]["value"] != pytest.approx(expected, abs=1e-4)
        assert results[system]["share_of_pages_read"] < 0.5
    assert "nats a token" in (tmp_path / "report.md").read_text()


def test_a_report_of_several_budgets(folder, tmp_path, capsys):
    options = ["task=ruler", "text.lengths=[900]", "text.samples=3", "text.tasks=[tracking,frequent_words]", "batch=3"]
    options += ["methods=[dense,unique]", "attention.budget=[64,2000]", f"output.dir={tmp_path}"]
    assert run(folder, *options) == 0
    report = (tmp_path / "report.md").read_text()
    assert "| method | tracking | frequent_words | mean | to dense | pages read % |" in report
    (same,) = [line for line in report.splitlines() if line.startswith("| unique-2000 ")]
    assert "+0.0 [+0.0, +0.0]" in same
    assert "matplotlib" in report or (tmp_path / "ruler_by_budget.png").is_file()
    capsys.readouterr()
    elsewhere = ["text.samples=4", "decode=false"]
    assert run(folder, *options, *elsewhere) == 1, "the fourth was not decoded"
    assert "3 of 4 samples done" in capsys.readouterr().err
    assert run(folder, *options, "decode=false") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=perplexity", "text.lengths=[100000]"], "text.lengths has 100000 tokens"),
        (["task=perplexity", "text.file=null"], "text.file is missing"),
        (["task=ruler", "batch=0"], "batch=0: give a whole number of samples"),
        (["task=ruler", "text.tasks=[needle]"], "text.tasks names 'needle'"),
        (["task=counting", "text.tasks=[single]"], "give common_words or frequent_words"),
        (["task=ruler", "text.model=none.gguf"], "text.model=none.gguf: no such file"),
    ],
)
def test_errors_are_one_line(folder, arguments, message, capsys, tmp_path):
    assert run(folder, *arguments, f"output.dir={tmp_path}") == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
