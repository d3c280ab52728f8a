"""Packed weights: bounds of the rounding, exact tables, shards, whole models, and the errors of `load`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from unique_asr.models import ModelError, SpeechLLMForConditionalGeneration, load
from unique_asr.models.speech_llm.packing import (
    INDEX,
    dequantize,
    find_bits,
    load_packed,
    quantize,
    round_to_bits,
    save_packed,
    save_packed_changes,
    save_packed_model,
)

BITS = {"": 8, "language_model.model.layers": 6}


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(5, 64), (3, 2, 96), (1, 32)])
def test_error_is_half_a_step_of_each_group(bits, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 2, shape[-1])
    packed, scale = quantize(weight, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.float16)
    error = (dequantize(packed, scale, bits) - weight).abs().unflatten(-1, (-1, 32))
    largest = weight.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
    # Half a step, and the scale itself is rounded to fp16: up to 2^-11 of the value.
    assert (error <= largest * (0.5 / (2 ** (bits - 1) - 1) + 2**-11) * 1.01).all()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_every_integer_survives(bits):
    limit = 2 ** (bits - 1) - 1
    torch.manual_seed(0)
    integers = torch.randint(-limit, limit + 1, (64, 128))
    integers[:, ::32] = limit
    scale = (torch.rand(64, 4) * 0.01 + 1e-3).half()
    weight = integers * scale.float().repeat_interleave(32, -1)
    packed, found = quantize(weight, bits)
    assert torch.equal(found, scale)
    assert torch.equal(dequantize(packed, found, bits), weight)


def test_zeros_stay_zeros():
    packed, scale = quantize(torch.zeros(2, 64), 6)
    assert not dequantize(packed, scale, 6).any()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="bits must be 4, 5, 6 or 8, not 3"):
        quantize(torch.ones(1, 32), 3)


def test_shards_and_prefixes(tmp_path):
    torch.manual_seed(0)
    state = {
        "a.weight": torch.randn(64, 64),
        "a.layers.weight": torch.randn(64, 64),
        "a.bias": torch.randn(64),
        "a.odd": torch.randn(64, 33),
        "b.weight": torch.randn(64, 64),
        "b.ids": torch.arange(100_000),
    }
    save_packed(state, tmp_path, {"a": 8, "a.layers": 6}, shard_bytes=10_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert {name: entry.get("bits") for name, entry in index.items() if "bits" in entry} == {
        "a.weight": 8,
        "a.layers.weight": 6,
    }
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert set(files) == {entry["file"] for entry in index.values()}
    loaded = load_packed(tmp_path, torch.float32)
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["b.ids"], state["b.ids"])
    for name in ("a.bias", "a.odd", "b.weight"):
        assert torch.equal(loaded[name], state[name].half().float())
    errors = [(loaded[name] - state[name]).abs().max() for name in ("a.weight", "a.layers.weight")]
    assert 0 < errors[0] < errors[1] < 0.1
    half = load_packed(tmp_path, torch.bfloat16)
    assert {value.dtype for value in half.values()} == {torch.bfloat16, torch.int64}


@pytest.fixture(scope="module")
def packed(speech_llm, tmp_path_factory):
    """A packed model in a folder, and what went into it."""
    model, processor = speech_llm(merge="none")
    torch.nn.init.normal_(model.projector.residual.weight, std=0.1)
    folder = tmp_path_factory.mktemp("packed")
    save_packed_model(model, processor, folder, BITS)
    return folder, model, processor


def settings(config):
    """The values of a configuration that mean something."""
    meta = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {
        name: settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in meta
    }


def test_a_packed_model_loads_nearly_equal(packed):
    folder, model, processor = packed
    loaded, reader = load(folder, device="cpu")
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert settings(loaded.config.to_dict()) == settings(model.config.to_dict())
    assert torch.equal(loaded.ctc_tokens, model.ctc_tokens)
    assert reader.ctc_tokens == processor.ctc_tokens
    assert reader.tokenize_prompt() == processor.tokenize_prompt()
    output = loaded.get_output_embeddings().weight
    assert output is loaded.get_input_embeddings().weight

    samples = np.random.default_rng(0).normal(0, 0.1, 50_000).astype(np.float32)
    with torch.no_grad():
        expected, found = model(**processor(samples)).logits, loaded(**reader(samples)).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.05 * expected.std()
    assert not torch.equal(found, expected)


def test_a_loaded_model_packs_to_the_same_bytes(packed, tmp_path):
    folder, _, _ = packed
    save_packed_model(*load(folder, device="cpu"), tmp_path, BITS)
    again, once = load_packed(tmp_path, torch.float32), load_packed(folder, torch.float32)
    assert again.keys() == once.keys()
    for name, value in once.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=0, msg=name)


def test_changed_weights_alone_are_packed_again(packed, tmp_path):
    folder, model, _ = packed
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    save_packed_changes({name: 2 * model.state_dict()[name]}, folder, tmp_path)
    before, after = load_packed(folder, torch.float32), load_packed(tmp_path, torch.float32)
    assert before.keys() == after.keys()
    torch.testing.assert_close(after.pop(name), 2 * before.pop(name))
    assert all(torch.equal(value, before[other]) for other, value in after.items())
    assert load(tmp_path, device="cpu")[1].tokenize_prompt() == load(folder, device="cpu")[1].tokenize_prompt()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_in_half_precision(packed, dtype):
    folder, _, _ = packed
    loaded, _ = load(folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}


def test_an_ordinary_folder_loads_too(speech_llm, tmp_path):
    model, processor = speech_llm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = load(str(tmp_path), device="cpu")
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert reader.ctc_tokens == processor.ctc_tokens


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such/model", {}, "model=no/such/model: cannot be loaded .*; try model=default"),
        ("default", {"device": "gpu7"}, "device=gpu7: not a device; use auto, cpu or cuda"),
        ("default", {"dtype": "float7"}, "dtype=float7: use auto, float32, bfloat16 or float16"),
    ],
)
def test_errors_are_one_line(name, options, message):
    with pytest.raises(ModelError, match=message) as error:
        load(name, **{"device": "cpu", **options})
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu_names_the_remedy():
    with pytest.raises(ModelError, match="no CUDA GPU is available here; use device=cpu"):
        load("default", device="cuda")


@pytest.fixture
def broken(packed, tmp_path):
    """A copy of the packed model, to be broken."""
    return Path(shutil.copytree(packed[0], tmp_path / "model"))


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def tear_index(folder):
    (folder / INDEX).write_text("{")


def tear_shard(folder):
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])


def drop_weight(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["projector.up.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def drop(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "harm",
    [
        empty,
        tear_index,
        drop("model-00001-of-00001.safetensors"),
        drop("tokenizer.json"),
        tear_shard,
        drop_weight,
    ],
)
def test_a_broken_folder_is_one_line(broken, harm):
    harm(broken)
    with pytest.raises(ModelError, match=f"model={broken}: cannot be loaded .*; try model=default") as error:
        load(broken, device="cpu")
    assert "\n" not in str(error.value)


def become_whisper(folder):
    """A Whisper model has a feature extractor and a tokenizer too."""
    config = json.loads((folder / "config.json").read_text())["audio_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).unlink()


@pytest.mark.parametrize("harm", [drop("config.json"), become_whisper])
def test_no_model_is_made_of_defaults(broken, harm, monkeypatch):
    """A configuration without an LLM would be that of a default Llama, of seven billion parameters."""
    harm(broken)
    monkeypatch.setattr(
        SpeechLLMForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("it is made")
    )
    with pytest.raises(ModelError, match=f"model={broken}: cannot be loaded"):
        load(broken, device="cpu")


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_rounding_is_what_packing_keeps(bits):
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    weight[2, 32:64] = 0.0
    assert torch.equal(round_to_bits(weight, bits), dequantize(*quantize(weight, bits), bits))
    assert not torch.equal(round_to_bits(weight, bits), weight)


def test_the_longest_prefix_tells_the_bits():
    bits = {"encoder": 5, "encoder.layers.0": 8}
    assert [find_bits(name, bits) for name in ("encoder.layers.0.fc1", "encoder.conv1", "decoder")] == [8, 5, None]
