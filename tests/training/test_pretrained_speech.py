"""Pretrained speech LLMs: tiny ones of transformers' real classes learn, are saved without LoRA, and transcribe."""

import json
import sys

import pytest
import torch
from training_cases import CLEAN, ROOT, SOFT, Stopped, configuration, metrics, rows, stage, stop_after

sys.path.append(str(ROOT / "tests" / "models"))
import speech_models
import transformers

from unique_asr.application.cli import read_saved_attention
from unique_asr.models.pretrained import KNOWN_MODELS, load, merge_lora
from unique_asr.models.pretrained.prompting import embed_prompt
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus
from unique_asr.training.finetune import finetune
from unique_asr.training.lora import LoraSettings, add_lora, copy_without_lora
from unique_asr.training.manifests import read_manifests
from unique_asr.training.pretrained_material import PretrainedMaterial
from unique_asr.training.trainer import Trainer
from unique_asr.transcribers import make_transcriber

KNOWN = [name for name in KNOWN_MODELS if hasattr(transformers, KNOWN_MODELS[name].model_class)]
WORDS = {
    "a.wav": [
        {"start": 0.0, "end": 0.6, "text": "THE CAT SAT", "cased": "The cat sat."},
        {"start": 0.6, "end": 1.2, "text": "on a mat"},
    ]
}
LEARN = {"seconds": (1.4, 1.5), "windows": 1, "train": {"language_model": 3e-3}, "cased_share": 0.0}


@pytest.fixture
def make_material(write_manifest):
    def make(name, augment=CLEAN, segments=WORDS):
        model, processor = speech_models.make(name)
        sources = read_manifests([write_manifest(segments, seconds=1.5)], {}, model.device)
        return PretrainedMaterial(model, processor, Corpus(sources, seed=0, max_gap_seconds=0.0), augment)

    return make


@pytest.fixture
def make_trainer(make_material, tmp_path):
    def make(name="qwen2_audio", folder="output", augment=CLEAN, lora=False, **options):
        material = make_material(name, augment)
        if lora:
            add_lora(material.model, LoraSettings(rank=4, alpha=8))
        options = {"dtype": torch.float32, "log_every": 1, "log": lambda line: None, **options}
        return Trainer(material.model, material, tmp_path / folder, **options)

    return make


@pytest.mark.parametrize("name", KNOWN)
def test_the_loss_is_the_models_own(make_material, name):
    """Of the answer's tokens, over the vectors that it transcribes from."""
    material = make_material(name)
    loss, measures = material.compute_loss(stage(**LEARN))
    ((item,),) = material.drawn
    (samples,), (answer,) = material._heard([item])
    with torch.no_grad():
        prompt = embed_prompt(material.known_model, material.model, material.processor, samples)
        said = material.model.get_input_embeddings()(torch.tensor([answer]))
        logits = material.model(inputs_embeds=torch.cat([prompt, said], 1), use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[prompt.shape[1] - 1 : -1], torch.tensor(answer))
    torch.testing.assert_close(loss, expected)
    assert measures["seconds"] == len(samples) / 16000
    assert measures["tokens"] == prompt.shape[1] + len(answer)


@pytest.mark.parametrize("name", KNOWN)
def test_the_answer_is_read_as_it_is_written(make_material, name):
    material = make_material(name)
    item = material.corpus.draw_item(1.5, cased_share=1.0)
    while len(item.pieces) < 2:
        item = material.corpus.draw_item(1.5, cased_share=0.0)
    *tokens, end = material.write_answer(item, speed=2.0)
    assert end == material.processor.tokenizer.eos_token_id
    parser = material.known_model.parser()
    read = [*parser.push(material.processor.tokenizer.decode(tokens)), *parser.close()]
    words = [utterance.cased or utterance.text for _, utterance, _ in item.pieces]
    assert " ".join(found.text for found in read) == " ".join(words)
    if parser.timed:
        assert [found.start for found in read] == pytest.approx([0.0, item.pieces[0][1].seconds / 2], abs=0.01)
        assert len({found.speaker for found in read}) == 1


@pytest.mark.parametrize("name", KNOWN)
def test_parts_train_alone(make_trainer, name):
    trainer = make_trainer(name, lora=True)
    model, parts = trainer.model, KNOWN_MODELS[name].parts
    for part in (*parts, "lora"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.run_stage(stage(part, 1, **{**LEARN, "train": {part: 1e-2}}))
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(".lora_" in name if part == "lora" else name.startswith(parts[part]) for name in moved)
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen3_asr", "voxtral"])
@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_it_learns_an_item(make_trainer, name, mode):
    trainer = make_trainer(name)
    stage_options = {**LEARN, "steps": 15, "train": {"language_model": 1e-2}}
    trainer.run_stage(stage(**stage_options, attention={**SOFT, "mode": mode}, checkpointing=mode == "soft"))
    assert sum(metrics(trainer)[-3:]) < 0.97 * sum(metrics(trainer)[:3])
    assert trainer.language_model.config._attn_implementation == "sdpa"


def test_the_mask_matters_and_only_for_the_answer(make_trainer):
    first = {}
    for name, attention in {"dense": None, "answer": SOFT, "all": {**SOFT, "queries": "all"}}.items():
        trainer = make_trainer(folder=name)
        trainer.run_stage(stage(**{**LEARN, "steps": 1}, attention=attention))
        (first[name],) = metrics(trainer)
    assert len({round(loss, 5) for loss in first.values()}) == 3


def test_a_sliding_window_may_hold_everything(make_trainer):
    """As Phi-4's does."""
    losses = []
    for window in (None, 262144, 16):
        trainer = make_trainer("phi4_multimodal", str(window))
        trainer.model.config.sliding_window = window
        one = stage(**{**LEARN, "steps": 1}, attention=SOFT)
        if window == 16:
            with pytest.raises(ValueError, match="no full-attention layer"):
                trainer.run_stage(one)
        else:
            trainer.run_stage(one)
            losses += metrics(trainer)
    assert losses[0] == pytest.approx(losses[1])


def test_frozen_weights_stay_in_sixteen_bits(make_trainer):
    trainer = make_trainer(lora=True, dtype=torch.bfloat16)
    trainer.model.bfloat16()
    trainer.run_stage(stage(**{**LEARN, "steps": 2, "train": {"lora": 1e-2}}))
    kinds = {(".lora_" in name, value.dtype) for name, value in trainer.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert {value.dtype for value in copy_without_lora(trainer.model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", KNOWN)
def test_lora_vanishes_when_saved(make_trainer, tmp_path, name):
    trainer = make_trainer(name, lora=True)
    names = {name.replace(".base_layer.", ".") for name in trainer.model.state_dict() if ".lora_" not in name}
    trainer.run_stage(stage(**{**LEARN, "steps": 1, "train": {"lora": 1e-2}}))
    plain = copy_without_lora(trainer.model)
    assert set(plain.state_dict()) == names
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (model(inputs_embeds=embeds, use_cache=False).logits for model in (trainer.model, loaded))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_lora_that_came_with_a_model_is_merged(make_material, tmp_path, monkeypatch):
    from peft import LoraConfig, inject_adapter_in_model

    model = make_material("phi4_multimodal").model
    config = LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name="speech")
    model.eval()
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, use_cache=False).logits
        merge_lora(model)
        torch.testing.assert_close(model(inputs_embeds=embeds, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("unique_asr.models.pretrained.loading.AutoProcessor.from_pretrained", lambda *_: None)
    loaded, _ = load(tmp_path, "cpu")  # without a folder of LoRA weights
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs_embeds=embeds, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_has_the_same_losses(make_trainer, lora):
    noisy = AugmentConfig(speed=0.2, noise_share=0.5)
    train = {"lora": 1e-2} if lora else {"projector": 1e-2, "language_model.layers.0": 1e-3}
    stages = [stage("one", **{**LEARN, "steps": 2}), stage("two", **{**LEARN, "steps": 4, "train": train})]
    options = {"checkpoints": True, "save_minutes": 0.0, "augment": noisy, "lora": lora}
    torch.manual_seed(5)
    whole = make_trainer(folder="whole", **options)
    whole.run(stages)
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        make_trainer(folder="cut", log=stop_after(3), **options).run(stages)
    torch.manual_seed(99)
    resumed = make_trainer(folder="cut", resume=True, **options)
    resumed.run(stages)
    again = {(row["stage"], row["step"]): row["loss"] for row in rows(resumed)}
    assert again == {(row["stage"], row["step"]): row["loss"] for row in rows(whole)}


def test_items_have_about_the_tokens_of_a_step(make_material):
    material = make_material("qwen3_asr", segments={"a.wav": [{"start": 0.0, "end": 0.5, "text": "so"}]})
    for _ in range(20):
        items = material.draw_items(stage(seconds=(2.0, 60.0), tokens=512))
        assert 100 < sum(32 + 18 * item.seconds for item in items) <= 520
    assert len(material.draw_items(stage(seconds=(60.0, 60.0), windows=8))) == 4


def test_what_is_wrong_is_named(make_material, make_trainer, tiny):
    material = make_material("vibevoice_asr")
    with pytest.raises(ValueError, match="SpeechLLMForConditionalGeneration is no known speech LLM"):
        PretrainedMaterial(*tiny, material.corpus, CLEAN)
    with pytest.raises(ValueError, match="seconds reaches 60 and qwen2_audio hears 30 in one pass"):
        make_material("qwen2_audio").compute_loss(stage(seconds=(5.0, 60.0)))
    for option in ({"position_dropout": 0.1}, {"pack": True, "tokens": 64}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for this package's own models"):
            material.compute_loss(stage(**option))
    with pytest.raises(ValueError, match=r"unknown parts \['encoder'\]; give projector, language_model, lora"):
        make_trainer("vibevoice_asr").run_stage(stage(train={"encoder": 1e-3}))
    with pytest.raises(ValueError, match=r"lora\.targets is \['q'\]"):
        add_lora(material.model, LoraSettings(targets=["q"]))


@pytest.mark.parametrize("name", ["qwen3_asr", "glmasr"])
def test_the_script_trains_what_transcribes(write_manifest, tmp_path, monkeypatch, name):
    """From the command to a folder that is read with the attention that it was trained for."""
    monkeypatch.setattr("unique_asr.training.validation.limit_text_tokens", lambda *_: 8)
    monkeypatch.setattr("unique_asr.transcribers.pretrained.limit_text_tokens", lambda *_: 8)
    model, processor = speech_models.make(name)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"name_or_path: {tmp_path}/start")
    monkeypatch.setattr("unique_asr.training.finetune.conf_folder", lambda: tmp_path)
    manifest, out = write_manifest(WORDS, seconds=1.5), tmp_path / "out"
    overrides = [
        *("experiment=speech_llm", "training=soft", "training.budget=40", "init.model=mine"),
        *("recipe.align=1", "recipe.steps=2", "recipe.tokens=128", "recipe.seconds=[1.4,1.5]", "lora.rank=4"),
        *("validation.limit=1", "validation.every=1", f"validation.manifest={manifest}"),
        *(f"data.manifests=[{manifest}]", "device=cpu", "bfloat16=always", f"output.dir={out}"),
    ]
    finetune(configuration(*overrides))
    assert (out / "checkpoint.pt").is_file()
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["sparse_steps"] for row in found if "sparse" in row] == [1.0] * 2
    assert [row["stage"] for row in found if "llm" in row and "loss" not in row] == ["align", "adapt", "adapt"]
    assert "attention.budget=40" in read_saved_attention([f"model={out}/adapt"])
    for saved in ("align", "adapt", "best"):
        assert json.loads((out / saved / "config.json").read_text())["dtype"] == "bfloat16"
    trained, _ = load(out / "adapt", "cpu", "float32")
    changed = {key for key, value in trained.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    assert any(key.startswith("model.multi_modal_projector.") for key in changed)
    segments, info = make_transcriber(str(out / "adapt"), budget=40, device="cpu").transcribe(str(tmp_path / "a.wav"))
    list(segments)
    assert info.sparsity["sparse_steps"] > 0


def test_the_script_names_what_is_wrong(write_manifest, tmp_path, llama):
    def error(*overrides):
        with pytest.raises(ValueError) as caught:
            finetune(configuration("experiment=speech_llm", "device=cpu", *overrides))
        return str(caught.value)

    model, processor = speech_models.make("glmasr")
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    llama.save_pretrained(tmp_path / "llama")
    (tmp_path / "empty.jsonl").write_text("")
    start = f"init.model={tmp_path}/start"
    message = error(f"init.model={tmp_path}/llama")
    assert message.startswith("init.model=")
    assert "describes llama" in message
    assert message.endswith("conf/model lists what can be fine-tuned")
    assert "empty.jsonl: the manifest is empty" in error(start, f"data.manifests=[{tmp_path}/empty.jsonl]")
    assert "data: no utterance to train on" in error(start, f"output.dir={tmp_path}/out")
    assert "data.texts is for models that listen" in error(start, "data.texts=[x.txt]")
