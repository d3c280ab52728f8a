"""The systems and the command, with a speech LLM of random weights: its nonsense has to be counted right."""

import json
from pathlib import Path

import pytest

from unique_asr import models
from unique_asr.attention import SparseAttentionConfig
from unique_asr.data import join, read_manifest
from unique_asr.evaluation.cli import attention_settings, main
from unique_asr.evaluation.harness import evaluate
from unique_asr.evaluation.systems import BatchedSpeechLLM, Encoder, GreedyCTC, SpeechLLM

MANIFEST = Path(__file__).parents[1] / "data" / "manifest.jsonl"
BUDGET = SparseAttentionConfig(budget=64)


@pytest.fixture(scope="module")
def speech_llm(tiny):
    model, processor = tiny
    model.config.audio_token_id = processor.audio_token_id
    return tiny


@pytest.fixture(scope="module")
def recordings():
    return join(read_manifest(MANIFEST), seconds=5)[:2]


def test_systems_share_the_encoded_recordings(speech_llm, recordings):
    encoder = Encoder(*speech_llm)
    results = [evaluate(system, recordings) for system in (GreedyCTC(encoder), SpeechLLM("unique-64", encoder, BUDGET))]
    assert all(len(result.hypotheses) == 2 for result in results)
    assert len(encoder._encoded) == 2
    sparse = results[1]
    assert 0 < sparse.total("sparse_steps") <= sparse.total("steps")
    assert sparse.share_of_pages_read < 1
    assert sparse.speed > 0


def test_a_batch_writes_what_single_recordings_do(speech_llm, recordings):
    def result(budget, batch):
        attention = SparseAttentionConfig(budget=budget)
        return evaluate(BatchedSpeechLLM("generate", Encoder(*speech_llm), attention, batch), recordings)

    batched, single = result(None, 2), result(None, 1)
    for together, alone in zip(batched.hypotheses, single.hypotheses, strict=True):
        assert together.text.startswith(alone.text[:40]), "in a batch the longest recording sets the token budget"
        assert {together.stop_reason, alone.stop_reason} <= {"end", "length"}
    assert batched.total("sparse_steps") == 0
    assert result(64, 2).total("sparse_steps") > 0


def test_attention_settings_are_a_grid():
    settings = attention_settings({"budget": [None, 128, 512], "score": ["unique", "mean"], "page_size": 8})
    assert set(settings) == {"dense", "unique-128", "mean-128", "unique-512", "mean-512"}
    assert settings["dense"].budget is None
    assert settings["mean-128"] == SparseAttentionConfig(budget=128, score="mean")
    assert list(attention_settings({"budget": 512, "score": "unique", "page_size": [8, 16]})) == [
        "unique-512-page_size8",
        "unique-512-page_size16",
    ]


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([f"data.manifest={MANIFEST}", *arguments])
    return stop.value.code


def test_the_command(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    limits = ["data.join_seconds=5", "data.limit=2"]
    assert run(*limits, "attention.budget=[null,64]", "ctc=true", f"output.dir={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["2", "ctc", "dense", "unique-64"]
    assert lines[-1].endswith("to dense")
    table = json.loads((tmp_path / "results.json").read_text())
    assert [result["system"] for result in table["results"]] == ["ctc", "dense", "unique-64"]
    assert table["settings"]["data"]["join_seconds"] == 5
    rows = [json.loads(line) for line in (tmp_path / "unique-64.jsonl").read_text().splitlines()]
    assert len({row["audio_filepath"] for row in rows}) == 2
    assert rows[0]["sparsity"]["sparse_steps"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.manifest=none.jsonl"], "none.jsonl: no such manifest"),
        (["data.source=none"], "its sources are"),
        (["data.manifest=???"], "data.manifest is missing"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path):
    assert run(f"output.dir={tmp_path}", *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
