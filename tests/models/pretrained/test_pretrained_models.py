"""Every speech LLM end to end on a tiny model of its real class: from samples to the tokens of transformers itself."""

import json
import runpy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import speech_models
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model

from unique_asr.attention import SparseAttentionConfig, sparse_attention
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.decoding.memory import read_shape
from unique_asr.longform.configuration import TimestampedConfig
from unique_asr.models.pretrained import KNOWN_MODELS, find, load, load_lora
from unique_asr.models.pretrained.pass_memory import estimate_pass_memory
from unique_asr.models.sources import locate_model
from unique_asr.transcribers.batch import transcribe_side_by_side
from unique_asr.transcribers.pretrained import PretrainedTranscriber

NEW_TOKENS = 20
BUDGET = 32


@pytest.fixture(scope="module", params=list(KNOWN_MODELS))
def speech_model(request):
    name = request.param
    if not hasattr(__import__("transformers"), KNOWN_MODELS[name].model_class):
        pytest.skip("this transformers does not know it")
    return name, *speech_models.make(name)


def recording(seconds, seed=0):
    return np.random.default_rng(seed).standard_normal(int(16000 * seconds)).astype(np.float32) / 10


def seconds_of(name):
    return 1.4 if name == "qwen2_audio" else 5.3  # it takes one window


def plain(name, model, inputs, **options):
    """transformers' own generate on the whole request at once."""
    without_noise = nullcontext()
    if name == "vibevoice_asr":
        without_noise = patch.object(model.config.acoustic_tokenizer_encoder_config, "vae_std", 0.0)
    with without_noise:
        ids = model.generate(**inputs, **options, do_sample=False, max_new_tokens=NEW_TOKENS)
    return ids[:, inputs["input_ids"].shape[1] :]


def request_of(name, processor, samples):
    known_model = KNOWN_MODELS[name]
    transcriber_samples = samples
    if known_model.sample_rate != 16000:
        from torchaudio.functional import resample

        transcriber_samples = resample(torch.from_numpy(samples), 16000, known_model.sample_rate).numpy()
    return known_model.request(processor, transcriber_samples, None)


def decode(model, processor, samples, budget, chunk=17, windows=1):
    """Encoded a window at a time, prefilled in small chunks, decoded on the paged cache."""
    attention = SparseAttentionConfig(budget=budget)
    passes = TimestampedConfig(encode_windows=windows)
    transcriber = PretrainedTranscriber((model, processor), attention=attention, prefill_chunk=chunk, passes=passes)
    embeds = transcriber.embed_prompt(samples)
    decoder = transcriber.decoder
    decoder.reserve(1024)
    decoder.prefill(embeds)
    return list(decoder.tokens(NEW_TOKENS)), decoder.counters, embeds.shape[1]


def test_chunked_and_dense_is_generate_token_by_token(speech_model):
    name, model, processor = speech_model
    samples = recording(seconds_of(name))
    expected = plain(name, model, request_of(name, processor, samples))[0].tolist()
    assert len(set(expected)) > 2
    for budget in (None, 1024):
        tokens, statistics, _ = decode(model, processor, samples, budget)
        assert tokens == expected
        assert (statistics.sparse_steps, statistics.steps) == (0, NEW_TOKENS - 1)


def test_steps_with_fixed_shapes_as_a_cuda_graph_takes_them(speech_model):
    name, model, processor = speech_model
    if not KNOWN_MODELS[name].static:
        pytest.skip("its rotary embeddings depend on the length")
    samples = recording(seconds_of(name))
    for budget in (1024, BUDGET):
        expected, counted, _ = decode(model, processor, samples, budget)
        embeds = PretrainedTranscriber((model, processor), attention="dense").embed_prompt(samples)
        decoder = GreedyDecoder(model, SparseAttentionConfig(budget=budget), capacity=1024, static=True)
        decoder.prefill(embeds)
        assert list(decoder.tokens(NEW_TOKENS)) == expected
        assert decoder.counters == counted


def test_sparse_steps_are_counted(speech_model):
    name, model, processor = speech_model
    tokens, statistics, length = decode(model, processor, recording(seconds_of(name)), BUDGET)
    assert len(tokens) == NEW_TOKENS
    assert length > BUDGET
    assert statistics.sparse_steps == statistics.steps == NEW_TOKENS - 1
    assert statistics.share_of_pages_read < 1


def test_a_batch_of_two_lengths(speech_model):
    name, model, processor = speech_model
    longest = seconds_of(name)
    rows = [
        request_of(name, processor, recording(seconds, seed)) for seed, seconds in enumerate((longest, longest / 2))
    ]
    inputs = joined(rows)
    expected = plain(name, model, inputs)
    alone = torch.cat([plain(name, model, row) for row in rows])
    if name != "phi4_multimodal":  # whose encoder lets padding change the audio
        assert torch.equal(expected[0], alone[0])
    with sparse_attention(model, budget=1024) as sparse:
        assert torch.equal(plain(name, model, inputs), expected)
    assert sparse.counters.sparse_steps == 0
    with sparse_attention(model, budget=BUDGET) as sparse:
        assert plain(name, model, inputs).shape == (2, NEW_TOKENS)
    assert sparse.counters.sparse_steps == NEW_TOKENS - 1


def joined(rows):
    """Requests of different lengths as one batch: ids padded on the left, audio on the right or row after row."""
    batch = {}
    for key in rows[0]:
        values = [torch.as_tensor(row[key]) for row in rows]
        width = max(value.shape[-1] for value in values)
        if key in ("input_ids", "attention_mask"):
            fill = 256 if key == "input_ids" else 0
            values = [torch.nn.functional.pad(value, (width - value.shape[-1], 0), value=fill) for value in values]
        elif values[0].ndim == 3 and key in ("audio_input_features", "input_features"):
            time = 2 if values[0].shape[1] in (8,) else 1  # [rows, mel, frames] or [rows, frames, features]
            width = max(value.shape[time] for value in values)
            pads = [(0, width - value.shape[2]) if time == 2 else (0, 0, 0, width - value.shape[1]) for value in values]
            values = [torch.nn.functional.pad(value, pad) for value, pad in zip(values, pads)]
        elif values[0].ndim > 1:
            values = [torch.nn.functional.pad(value, (0, width - value.shape[-1])) for value in values]
        batch[key] = torch.cat(values)
    if "audio_input_features" in batch:
        lengths = torch.tensor([row["audio_input_features"].shape[1] for row in rows])
        batch["audio_attention_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


def test_saved_and_loaded_it_decodes_the_same(speech_model, tmp_path):
    name, model, processor = speech_model
    samples = recording(seconds_of(name))
    tokens, statistics, _ = decode(model, processor, samples, BUDGET)
    with sparse_attention(model, budget=BUDGET):
        model.save_pretrained(tmp_path)
    assert "unique" not in (tmp_path / "config.json").read_text()
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(tmp_path)
        loaded, processor = load(tmp_path, "cpu")
    else:
        loaded = type(model).from_pretrained(tmp_path).eval()
    assert find(loaded) is KNOWN_MODELS[name]
    again, counted, _ = decode(loaded, processor, samples, BUDGET)
    assert again == tokens
    assert counted == statistics


def test_a_transcript_of_several_passes(speech_model, monkeypatch):
    monkeypatch.setattr("unique_asr.transcribers.pretrained.limit_text_tokens", lambda known_model, seconds: NEW_TOKENS)
    _, model, processor = speech_model
    seen = []
    transcriber = PretrainedTranscriber(
        (model, processor), budget=BUDGET, max_pass_seconds=1.5, passes=TimestampedConfig(retry_seconds=1.5)
    )
    samples = recording(4.0)
    segments, info = transcriber.transcribe(samples, progress=lambda *step: seen.append(step))
    segments = list(segments)
    assert info.passes >= 3
    assert {stage for stage, *_ in seen} == {"encode", "prefill", "decode"}
    assert all(0 <= segment.start <= segment.end <= 4.0 for segment in segments)
    assert [segment.start for segment in segments] == sorted(segment.start for segment in segments)
    assert info.sparsity["steps"] > 0
    json.dumps(info.to_dict())


def test_recordings_side_by_side_are_those_of_one_by_one(speech_model, monkeypatch):
    monkeypatch.setattr("unique_asr.transcribers.pretrained.limit_text_tokens", lambda known_model, seconds: 8)
    name, model, processor = speech_model
    passes = TimestampedConfig(max_pass_seconds=1.5, retry_seconds=1.5)
    transcriber = PretrainedTranscriber((model, processor), attention="dense", passes=passes)
    audios = [recording(seconds, seed) for seed, seconds in enumerate((1.2, 2.6, 1.6))]
    expected, results = (dict(transcribe_side_by_side(transcriber, audios, size)) for size in (1, 2))
    assert (transcriber.make_engine() is None) == (name == "phi4_multimodal")
    for index, transcript in results.items():
        alone = expected[index]
        assert transcript.segments == [
            replace(segment, confidence=pytest.approx(segment.confidence, rel=1e-3)) for segment in alone.segments
        ]
        assert transcript.info.passes == alone.info.passes > (index == 1)
        assert transcript.info.warnings == alone.info.warnings
        assert transcript.info.sparsity["steps"] == alone.info.sparsity["steps"] > 0


def test_every_model_of_the_configuration_is_in_the_catalogue():
    files = (Path(__file__).parents[3] / "conf" / "model").glob("*.yaml")
    named = {OmegaConf.load(path).name_or_path.split("@")[0] for path in files} - {"default"}
    assert named == {each.hub_id for known_model in KNOWN_MODELS.values() for each in known_model.checkpoints}
    assert find("default") is None


def test_weights_for_speech_beside_the_model(tmp_path):
    model, processor = speech_models.make("phi4_multimodal")
    base = decode(model, processor, recording(3), 1024)[0]
    torch.manual_seed(1)
    trained = get_peft_model(model, LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False))
    expected = decode(model, processor, recording(3), 1024)[0]
    trained.save_pretrained(tmp_path / KNOWN_MODELS["phi4_multimodal"].lora)
    model, _ = speech_models.make("phi4_multimodal")
    load_lora(model, KNOWN_MODELS["phi4_multimodal"].lora, str(tmp_path))
    assert decode(model, processor, recording(3), 1024)[0] == expected != base


def test_a_revision_follows_the_name(tmp_path):
    assert locate_model("owner/model@refs/pr/70") == ("owner/model", {"revision": "refs/pr/70"})
    assert locate_model("owner/model") == ("owner/model", {})
    (tmp_path / "mine@home").mkdir()
    assert locate_model(tmp_path / "mine@home") == (str(tmp_path / "mine@home"), {})


def test_the_table_has_every_checkpoint(capsys):
    runpy.run_module("unique_asr.models.pretrained", run_name="__main__", alter_sys=True)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + sum(len(known_model.checkpoints) for known_model in KNOWN_MODELS.values())


def test_memory_is_what_the_cache_takes(speech_model):
    name, model, _ = speech_model
    attention = SparseAttentionConfig(budget=BUDGET)
    decoder = GreedyDecoder(model, attention, capacity=2048, static=False)
    decoder.step.reserve(2048)
    decoder.prefill(torch.zeros(1, 8, model.config.get_text_config(decoder=True).hidden_size))
    layers = decoder.cache.paged_layers
    kept = sum(buffer.nbytes for layer in layers for buffer in (layer.keys, layer.values))
    pages = sum(buffer.nbytes for layer in layers for buffer in layer.statistics)
    memory = estimate_pass_memory(KNOWN_MODELS[name], 10, read_shape(model), attention, torch.float32, tokens=2048)
    assert (memory.cache, memory.statistics) == (kept, pages)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert memory.weights == pytest.approx(weights, rel=1e-6)


def test_only_flash_attention_prefills_without_copies_of_the_keys():
    hour = {
        (device, dtype): estimate_pass_memory(
            KNOWN_MODELS["moss_transcribe_diarize"], 3600, dtype=dtype, device=device, batch=2
        )
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16)
    }
    positions, heads, dim = 52456, 16, 128
    copies = 2 * 2 * heads * positions * dim * 2  # of keys and values, two rows
    mask = 2 * 2048 * positions
    assert hour["cpu", torch.bfloat16].scratch == copies + mask
    assert hour["cuda", torch.bfloat16].scratch < copies / 5
    assert hour["cuda", torch.float32] == hour["cpu", torch.float32]
    minute = estimate_pass_memory(
        KNOWN_MODELS["moss_transcribe_diarize"], 60, dtype=torch.bfloat16, batch=80
    )  # short rows: by a mask
    assert minute.scratch > 80 * 2 * heads * 1126 * dim * 2
