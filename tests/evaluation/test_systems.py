"""The systems and the command, with a speech LLM of random weights: its nonsense has to be counted right."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unique_asr import models
from unique_asr.attention import SparseAttentionConfig
from unique_asr.data import join, read_manifest
from unique_asr.decoding.batch import BatchEngine
from unique_asr.evaluation.cli import attention_settings, main
from unique_asr.evaluation.decodings import Decodings, recording_key
from unique_asr.evaluation.encoder import Encoder
from unique_asr.evaluation.harness import evaluate
from unique_asr.evaluation.methods import RivalConfig, StreamingLLM
from unique_asr.evaluation.systems import (
    BatchedSpeechLLM,
    GreedyCTC,
    ParallelSpeechLLM,
    PretrainedLLM,
    SpeechLLM,
)

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
    def result(system, budget, **options):
        attention = SparseAttentionConfig(budget=budget)
        return evaluate(system("it", Encoder(*speech_llm), attention, **options), recordings)

    batched, single = result(BatchedSpeechLLM, None, batch=2), result(SpeechLLM, None)
    for together, alone in zip(batched.hypotheses, single.hypotheses, strict=True):
        assert together.text == alone.text
        assert (together.stop_reason, together.passes) == (alone.stop_reason, alone.passes)
        assert together.coverage == pytest.approx(alone.coverage, abs=0.05)
    assert batched.total("sparse_steps") == 0
    assert result(BatchedSpeechLLM, 64, batch=2).total("sparse_steps") > 0


def test_a_recording_begins_where_another_has_ended(speech_llm, monkeypatch):
    recordings = join(read_manifest(MANIFEST), seconds=4)[:5]
    beside, heard, step = [], [], BatchEngine.step
    monkeypatch.setattr(BatchEngine, "step", lambda engine: (beside.append(len(engine.sequences)), step(engine))[1])
    encoder = Encoder(*speech_llm, keep=False)
    together = encoder.encode_together
    monkeypatch.setattr(encoder, "encode_together", lambda group: (heard.append(len(group)), together(group))[1])
    system = BatchedSpeechLLM("it", encoder, BUDGET, batch=2)
    result = evaluate(system, recordings)
    assert all(each.passes for each in result.hypotheses)
    assert beside == sorted(beside, reverse=True)  # two, until nobody is left to begin
    assert heard == [2, 2, 1]
    assert not encoder._encoded


@pytest.mark.parametrize("together", [False, True])
def test_models_that_hear_the_same_share_a_folder(speech_llm, recordings, tmp_path, monkeypatch, together):
    """Other weights of the LLM's layers are no reason to encode again; other weights of the projector are."""
    model, processor = speech_llm
    encoded = []
    encode_windows = type(model).encode_windows

    def counted(self, features):
        encoded.append(len(features["input_features"]))
        return encode_windows(self, features)

    monkeypatch.setattr(type(model), "encode_windows", counted)

    def results():
        encoder = Encoder(model, processor, folder=tmp_path)
        if together:
            encoder.encode_together(recordings)
        return [encoder(recording) for recording in recordings]

    first, windows = results(), sum(encoded)
    weight = model.language_model.model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr(weight, "data", weight.data + 1)
    again = results()
    assert sum(encoded) == windows > 0
    for (ours, seconds), (theirs, before) in zip(again, first, strict=True):
        assert seconds == before
        assert ours.duration == theirs.duration
        assert all(
            torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("embeds", "frames", "ctc", "best")
        )
    weight = model.projector.down.weight
    monkeypatch.setattr(weight, "data", weight.data + 1)
    results()
    assert sum(encoded) == 2 * windows


def test_attention_settings_are_a_grid():
    settings = attention_settings({"budget": [None, 128, 512], "score": ["unique", "mean"], "page_size": 8})
    assert set(settings) == {"dense", "unique-128", "mean-128", "unique-512", "mean-512"}
    assert settings["dense"].budget is None
    assert settings["mean-128"] == SparseAttentionConfig(budget=128, score="mean")
    assert list(attention_settings({"budget": 512, "score": "unique", "page_size": [8, 16]})) == [
        "unique-512-page_size8",
        "unique-512-page_size16",
    ]


def test_passes_side_by_side(speech_llm, recordings):
    encoder = Encoder(*speech_llm)
    options = {"max_pass_seconds": 2.0}
    results = [
        evaluate(
            ParallelSpeechLLM("it", encoder, SparseAttentionConfig(budget=None), passes=passes, **options), recordings
        )
        for passes in (2, 5)
    ]
    for few, many in zip(*(result.hypotheses for result in results), strict=True):
        assert (few.text, few.passes, few.coverage) == (many.text, many.passes, many.coverage)
        assert few.passes > 2
        assert few.decode_seconds > 0
    assert evaluate(ParallelSpeechLLM("it", encoder, BUDGET, **options), recordings).total("steps") > 0


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
    assert sum(row["sparsity"]["sparse_steps"] for row in rows) > 0


def test_every_method_runs_behind_one_switch(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    methods = ["dense", "unique", "h2o", "streaming_llm", "infllm", "murmur", "sliding"]
    options = ["data.join_seconds=5", "data.limit=1", f"methods=[{','.join(methods)}]", "attention.budget=[112]"]
    assert run(*options, "rivals.sliding={seconds:6,overlap:1}", f"output.dir={tmp_path}") == 0
    names = [method if method in ("dense", "sliding") else f"{method}-112" for method in methods]
    results = {result["system"]: result for result in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert list(results) == names
    assert results["dense"]["sparse_steps"] == results["sliding"]["sparse_steps"] == 0
    for name in names[1:-1]:
        assert results[name]["sparse_steps"] > 0
        assert results[name]["budget"] == 112
    assert all((tmp_path / f"{name}.jsonl").is_file() for name in names)
    assert all(results[name]["tokens_per_second"] > 0 for name in names)


def test_every_method_decodes_batches(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    methods = "methods=[unique,h2o,streaming_llm,infllm,murmur,sliding,dense]"
    options = ["data.join_seconds=5", "data.limit=3", methods, "attention.budget=[112]", "batch=3"]
    assert run(*options, "rivals.sliding={seconds:6,overlap:1}", f"output.dir={tmp_path}") == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results[0]["system"] == "dense", "the others are compared with it"
    for result in results[1:]:
        assert bool(result["sparse_steps"]) == (result["system"] != "sliding")
    assert len(results) == 7


def test_a_budget_that_holds_the_passes_needs_no_decoding(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    asked = []
    decode = SpeechLLM.transcribe

    def counted(system, recordings):
        asked.append((system.name, len(recordings)))
        yield from decode(system, recordings)

    monkeypatch.setattr(SpeechLLM, "transcribe", counted)
    options = ["data.join_seconds=5", "data.limit=2", "methods=[dense,unique,h2o,murmur,sliding]"]
    assert run(*options, "attention.budget=[112,100000]", "rivals.sliding.seconds=20", f"output.dir={tmp_path}") == 0
    assert asked == [("dense", 2), ("unique-112", 1), ("h2o-112", 1), ("murmur-112", 1), ("sliding", 2)]
    rows = {row["system"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    for name in ("unique-100000", "h2o-100000", "murmur-100000"):
        assert (rows[name]["wer"], rows[name]["passes"]) == (rows["dense"]["wer"], rows["dense"]["passes"])
        assert (rows[name]["sparse_steps"], rows[name]["share_of_pages_read"]) == (0, 1)
        assert rows[name]["budget"] == 100000
    # Passes that are cut elsewhere write something else.
    again = ["methods=[dense,murmur]", "attention.budget=[100000]", "rivals.murmur_chunk_seconds=3"]
    assert run(*options, *again, f"output.dir={tmp_path}") == 0
    assert asked[-1] == ("murmur-100000", 2)


def test_recordings_of_all_lengths_in_the_same_batches(speech_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    asked = []
    decode = BatchedSpeechLLM.transcribe

    def noted(system, recordings):
        asked.append([round(recording.duration) for recording in recordings])
        yield from decode(system, recordings)

    monkeypatch.setattr(BatchedSpeechLLM, "transcribe", noted)
    options = ["data.join_minutes=[0.05,0.1]", "data.limit=2", "batch=4", "attention=dense"]
    for together in ("true", "false"):
        assert run(*options, f"together={together}", f"output.dir={tmp_path / together}") == 0
    whole, short, long = asked
    assert whole == sorted(short + long, reverse=True)
    assert short
    assert long
    for set_of in ("dense@0.05min.jsonl", "dense@0.1min.jsonl"):
        rows = [
            [json.loads(row)["pred_text"] for row in (tmp_path / together / set_of).open()]
            for together in ("true", "false")
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("together", ["true", "false"])
def test_methods_and_budgets_at_a_time(speech_llm, tmp_path, monkeypatch, together):
    """In threads, after dense, from which those take what they would write too; each encoded once; all of it scored."""
    model = speech_llm[0]
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    threads, decode, encoded, encode_windows = {}, BatchedSpeechLLM.transcribe, [], model.encode_windows

    def noted(system, recordings):
        threads.setdefault(system.name, []).append((threading.get_ident(), len(recordings)))
        yield from decode(system, recordings)

    monkeypatch.setattr(BatchedSpeechLLM, "transcribe", noted)
    monkeypatch.setattr(model, "encode_windows", lambda features: (encoded.append(1), encode_windows(features))[1])
    methods = ["dense", "unique", "h2o", "streaming_llm"]
    options = [f"methods=[{','.join(methods)}]", "attention.budget=[64,8192]", "data.join_minutes=[0.05,0.1]"]
    options += ["data.limit=2", "batch=4", f"together={together}"]
    tables, windows = [], []
    for concurrent in (1, 3):
        folder = tmp_path / str(concurrent)
        assert run(*options, f"concurrent={concurrent}", f"output.dir={folder}") == 0
        tables.append({path.name: [json.loads(row)["pred_text"] for row in path.open()] for path in folder.glob("*@*")})
        windows.append(len(encoded))
    assert tables[0] == tables[1]
    assert len(tables[0]) == 14
    assert windows[1] == 2 * windows[0]
    assert {name for name, turns in threads.items() if any(count for _, count in turns)} == {
        "dense", "unique-64", "h2o-64", "streaming_llm-64"
    }  # fmt: skip
    main_thread = threading.get_ident()
    others = {thread for name, turns in threads.items() if name != "dense" for thread, _ in turns} - {main_thread}
    assert 1 < len(others) <= 3
    assert {thread for thread, _ in threads["dense"]} == {main_thread}


def test_a_method_that_fails_does_not_stop_those_beside_it(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    decode = SpeechLLM.transcribe

    def fails(system, recordings):
        if system.name == "h2o-64":
            raise ValueError("no more memory")
        return decode(system, recordings)

    monkeypatch.setattr(SpeechLLM, "transcribe", fails)
    options = ["methods=[dense,unique,h2o,quest]", "attention.budget=[64]", "data.limit=1", f"output.dir={tmp_path}"]
    assert run(*options, "concurrent=2") == 1
    assert capsys.readouterr().err == "error: no more memory\n"
    assert run(*options, "methods=[dense,unique,quest]", "decode=false") == 0


def test_what_was_decoded_is_scored_without_the_model(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    copied = tmp_path / "elsewhere"
    shutil.copytree(MANIFEST.parent, copied)
    options = ["data.join_minutes=[0.05,0.1]", "data.limit=2", f"output.dir={tmp_path}"]
    assert run(*options, "methods=[dense]") == 0
    assert run(*options, "methods=[unique]", "attention.budget=64", "data.join_minutes=[0.1]") == 0
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model is loaded"))
    capsys.readouterr()
    elsewhere = f"data.manifest={copied / MANIFEST.name}"
    assert run(*options, "methods=[dense,unique]", "attention.budget=64", "decode=false", elsewhere) == 0
    output = capsys.readouterr()
    assert [line.split(" WER")[0].strip() for line in output.out.splitlines()[2:]] == [
        "dense 0.05 min", "dense 0.1 min", "unique-64 0.1 min"
    ]  # fmt: skip
    assert "unique-64 0.05 min: left out, 1 of 2 recordings decoded" in output.err, "the other needs no sparse step"
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 3
    assert run(*options, "decode=false", "attention=unique", "attention.budget=32") == 1
    assert "nothing was decoded yet" in capsys.readouterr().err


def test_of_runs_side_by_side_one_encodes(speech_llm, recordings, tmp_path, monkeypatch):
    model, processor = speech_llm
    encode_windows, begun = model.encode_windows, []

    def slow(features):
        begun.append(len(features["input_features"]))
        time.sleep(0.2)
        return encode_windows(features)

    monkeypatch.setattr(model, "encode_windows", slow)
    encoders = [Encoder(model, processor, folder=tmp_path) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda encoder: encoder.encode_together(recordings), encoders))
    windows = sum(begun)
    Encoder(model, processor).encode_together(recordings)
    assert sum(begun) == 2 * windows > 0
    for encoder in encoders:
        assert len(encoder._encoded) == len(recordings)


def test_encoded_recordings_are_kept_for_other_runs(speech_llm, recordings, tmp_path, monkeypatch):
    expected = Encoder(*speech_llm)(recordings[0])[0]
    Encoder(*speech_llm, folder=tmp_path).encode_together(recordings)
    monkeypatch.setattr(type(speech_llm[0]), "encode", lambda *_: pytest.fail("encoded again"))
    found, seconds = Encoder(*speech_llm, folder=tmp_path)(recordings[0])
    assert seconds > 0
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value)
    (file,) = tmp_path.glob(f"*/{recording_key(recordings[0])}.pt")
    size = file.stat().st_size
    assert size < 2 * sum(value.nbytes for value in vars(expected).values() if isinstance(value, torch.Tensor)) + 10000


def test_the_jobs_of_a_multirun_are_one_table(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    monkeypatch.chdir(tmp_path)
    options = ["data.join_seconds=5", "data.limit=2", "attention=dense,unique"]
    with pytest.raises(SystemExit) as stop:
        main(["-m", f"data.manifest={MANIFEST}", *options, "output.dir=out"])
    assert stop.value.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is littered"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["system"] for row in rows] == ["dense", "unique-512"]
    assert rows[1]["to_dense"] is not None
    assert capsys.readouterr().out.rstrip().endswith("to dense")


def test_a_pretrained_model_with_an_adapter(recordings, monkeypatch):
    import speech_models

    pair = speech_models.make("moss_transcribe_diarize")
    span = replace(recordings[0].spans[0], end=recordings[0].spans[0].start + 1.0)
    short = replace(recordings[0], spans=(span,))
    rival = RivalConfig(budget=64, score="mean", method=StreamingLLM())
    for name, attention in (
        ("dense", SparseAttentionConfig(budget=None)),
        ("unique", BUDGET),
        ("streaming_llm", rival),
    ):
        result = evaluate(PretrainedLLM(name, pair, attention), [short])
        assert result.total("steps") > 0
        assert bool(result.total("sparse_steps")) == (name != "dense")
        assert result.hypotheses[0].passes > 0


def test_lengths_files_and_a_second_run_that_decodes_nothing(speech_llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype: speech_llm)
    options = ["data.join_minutes=[0.05,0.1]", "data.limit=2", "attention.budget=[null,64]", f"output.dir={tmp_path}"]
    assert run(*options) == 0
    lines = capsys.readouterr().out.splitlines()
    results = (tmp_path / "results.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in results[1:]] == [
        ["dense", "0.05 min"], ["dense", "0.1 min"], ["unique-64", "0.05 min"], ["unique-64", "0.1 min"]
    ]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "unique-64@0.1min.jsonl").read_text().splitlines()]
    assert {"audio_filepath", "duration", "time", "text", "pred_text"} <= set(rows[0])
    report = (tmp_path / "report.md").read_text()
    assert "| unique-64 0.1 min |" in report
    assert "matplotlib" in report or (tmp_path / "wer_by_length.png").is_file()

    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("decoded again"))
    assert run(*options) == 0
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(pytest.fail.Exception):
        run(*options, "decoding.prefill_chunk=64")
    with pytest.raises(pytest.fail.Exception):
        run(*options, "parallel_passes=2")
    with pytest.raises(pytest.fail.Exception):
        run(*options, "resume=false")


def test_a_run_goes_on_where_it_was_cut_off(speech_llm, recordings, tmp_path):
    system = GreedyCTC(Encoder(*speech_llm))
    whole = evaluate(system, recordings, decodings=Decodings(tmp_path, {"system": "ctc"}))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])  # the last line is incomplete
    asked = []

    class Counted:
        name = "ctc"

        def transcribe(self, recordings):
            asked.extend(recordings)
            return system.transcribe(recordings)

    again = evaluate(Counted(), recordings, decodings=Decodings(tmp_path, {"system": "ctc"}))
    assert asked == recordings[1:]
    assert [h.text for h in again.hypotheses] == [h.text for h in whole.hypotheses]
    other = Decodings(tmp_path, {"system": "ctc", "dtype": "bfloat16"})
    assert other.get(recordings[0]) is None, "other settings, other decodings"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.manifest=none.jsonl"], "none.jsonl: no such manifest"),
        (["data.source=none"], "its sources are"),
        (["data.manifest=???"], "data.manifest is missing"),
        (["methods=[unique,best]"], "methods names 'best'"),
        (["methods=[infllm]", "attention.budget=64"], "InfLLM with blocks of 16 needs"),
        (["data.join_minutes=1", "data.join_seconds=5"], "give one of them"),
        (["task=text"], "choose one of speech, ruler, counting, perplexity"),
        (["task=ruler"], "text.model is missing"),
        (["batch=none"], "batch=none: give a whole number of recordings"),
        (["parallel_passes=0"], "parallel_passes=0: give a whole number of passes"),
        (["batch=2", "parallel_passes=2"], "set one to 1"),
        (["concurrent=32"], "concurrent=32: give at most 31"),
        (["concurrent=many"], "concurrent=many: give a whole number of methods and budgets"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path):
    assert run(f"output.dir={tmp_path}", *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
