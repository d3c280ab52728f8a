"""The benchmarks run from end to end on tiny inputs; where they time a graph on a GPU, the calls run once."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.huggingface import NAME, set_attention
from unique_asr.benchmark import cli, decode, kernel, models, selection
from unique_asr.benchmark.selection import Probe, benchmark_text
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.models.pretrained import KNOWN_MODELS

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    def run_once(calls, replays=0):
        for call in calls:
            call()
        return 1e-3

    monkeypatch.setattr(kernel, "time_graph", run_once)
    monkeypatch.setattr(kernel, "measure_copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e9, 1e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the benchmark itself")
def test_kernel(no_gpu, capsys):
    configurations = [
        {"budget": 64, "backend": "triton"},
        {"budget": 64, "backend": "triton", "super_page_size": 64, "super_pages": 3, "statistics_dtype": "int8"},
        {"budget": 512, "backend": "triton"},  # reads all: left out
    ]
    kernel.benchmark(
        [[1, 256]], configurations, CPU, torch.float32, 4, 2, 32, flashinfer=["cuda_cores"], top_pages=[[2, 64, 8]]
    )
    output = capsys.readouterr().out
    assert output.count("\n  failed:") == 1  # FlashInfer
    assert output.count("100.0% of heads equal to PyTorch's step") == 2
    assert "FlashInfer is missing" in output
    assert (
        output.count("one launch")
        == output.count("whole step")
        == output.count("attention  ")
        == output.count("append")
        == 2
    )
    assert output.count("x dense; statistics") == 2
    assert "equal: True" in output


def test_decode(monkeypatch, capsys, llama):
    monkeypatch.setitem(decode.SHAPES, "tiny", llama.config)
    attention = SparseAttentionConfig(budget=64)
    decode.benchmark("tiny", [[2, 256]], attention, CPU, torch.float32, ["eager", "static"], steps=2)
    output = capsys.readouterr().out
    assert output.count("ms a step") == 4
    assert output.count("x dense") == 2
    assert "14 of 14 steps sparse" in output


def test_selection(llama, capsys, tmp_path, monkeypatch, byte_tokenizer):
    llama.config.vocab_size = 300
    tokenizer = byte_tokenizer()
    model = type(llama)._from_config(llama.config)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("A sentence of words, and then another. " * 30)
    table = {"score": ["unique", "quest"], "statistics_dtype": ["keys", "int8"], "super_page_size": [None, 64]}
    configs = selection.make_configurations(table, SparseAttentionConfig(budget=128))
    assert len(configs) == 8
    probe = Probe(configs, every=3, limit=2)
    benchmark_text(str(tmp_path), str(text), 300, 6, probe, CPU, torch.float32)
    probe.report()
    output = capsys.readouterr().out
    assert "2 steps of 3 layers" in output
    assert output.count("unique") == 4
    assert "  6.35%" not in output
    for config in configs:
        assert all(0 < value < 1 for values in probe.mass_shares[config].values() for value in values)
        mean = torch.tensor(list(probe.mass_shares[config].values())).mean()
        assert mean <= torch.tensor(list(probe.mass_shares[8].values())).mean() + 1e-6  # the oracle


def test_selection_of_a_needle():
    """One key that the query wants, far back: its page is found, and holds nearly all of the mass."""
    torch.manual_seed(0)
    keys = 0.1 * torch.randn(1, 1, 300, 16)
    query = torch.randn(1, 1, 2, 16)
    keys[:, :, 100] = 4 * query[:, :, 0]
    probe = Probe([SparseAttentionConfig(budget=64, combine=combine) for combine in ("max", "share")])
    probe.measure(0, query[:, :, :1], keys, 1.0)
    assert all(probe.mass_shares[config][0][0] > 0.99 for config in probe.configs)


@pytest.mark.parametrize(
    ("config", "dim", "share"),
    [
        ({}, 128, 258 / 4096),
        ({"statistics_dtype": "fp8"}, 128, 132 / 4096),
        ({"super_page_size": 64}, 128, 9 / 8 * 258 / 4096),
    ],
)
def test_memory_share(config, dim, share):
    assert selection.compute_memory_share(SparseAttentionConfig(**config), dim) == pytest.approx(share)


def test_the_command(capsys):
    arguments = ["device=cpu", "task=selection"]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 1
    assert "needs selection.text=FILE" in capsys.readouterr().err


def test_models(monkeypatch, capsys, llama, tmp_path):
    monkeypatch.setitem(models.LLMS, "tiny", ("voxtral", llama.config))
    attention, output = SparseAttentionConfig(budget=64), tmp_path / "out" / "models.json"
    settings = {
        "configurations": [{}, {"super_page_size": 32, "statistics_dtype": "int8"}],
        "answer_tokens_an_hour": 15000,
        "prefill_chunk": 200,
        "steps": 2,
        "mode": "captured",
        "output": str(output),
    }
    arguments = {"attention": attention, "device": CPU, "dtype": torch.float32} | settings
    models.benchmark(["tiny"], [0.5], [1, 2], max_seconds=60, **arguments)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    saved = json.loads(output.read_text())["results"]
    assert len(table) == len(saved) == 4
    assert [case["batch"] for case in saved] == [1, 1, 2, 2]
    assert [case["attention"] for case in saved[:2]] == ["as given", "super_page_size=32, statistics_dtype=int8"]
    for case in saved:
        assert (case["prompt"], case["context"]) == (375 + 256, 375 + 256 + 62)  # 12.5 positions a second
        assert case["speedup"] == pytest.approx(min(case["dense"], case["flash"]) / case["sparse"])
    assert models.benchmark(["tiny"], [0.5], [1], max_seconds=-1, **arguments) == []
    assert "left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="choose of moss"):
        models.benchmark(["none"], [0.5], [1], max_seconds=1, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
def test_the_dense_baseline_over_the_tokens_written_is_dense_attention(monkeypatch, llama, compile):
    """Compiled by the backend of PyTorch's that only traces: the operators of the graph run as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    written = []
    for attention in (NAME, models.FLASH):
        decoder = GreedyDecoder(llama, SparseAttentionConfig(budget=None), capacity=300, static=True, compile=compile)
        torch.manual_seed(1)
        decoder.prefill(torch.randn(1, 100, llama.config.hidden_size))
        set_attention(llama, attention)
        written.append(list(decoder.tokens(20)))
    assert len(set(written[0])) > 5
    assert written[0] == written[1]


def test_models_take_what_fits(monkeypatch, llama):
    monkeypatch.setitem(models.LLMS, "tiny", ("voxtral", llama.config))
    model = models.make_random_model("tiny", CPU, torch.float32)
    settings = models.BenchmarkSettings({"as given": SparseAttentionConfig(budget=64)}, 15000, 200, 1, "captured")

    def measured(batch):
        (result,) = models.measure_case("tiny", model, KNOWN_MODELS["voxtral"], 0.5, batch, settings)
        return result

    one = measured(1)
    assert (one.batch, measured(4).batch) == (1, 4)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(models, "measure_free_memory", lambda device: 2.5 * (1e9 * one.estimated - weights))
    assert measured(4).batch == 2
