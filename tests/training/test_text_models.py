"""A language model alone: stretches of texts, dense and through the mask, from the script to evaluation."""

import json

import numpy as np
import pytest
import torch
from training_cases import Stopped, configuration, metrics, rows, stage, stop_after
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from unique_asr.evaluation.cli import main
from unique_asr.training.finetune import finetune
from unique_asr.training.text_material import TextMaterial
from unique_asr.training.trainer import Trainer

ROW = {"tokens": 256, "lengths": [128], "train": {"language_model": 1e-2}}


@pytest.fixture
def language_model(byte_tokenizer):
    tokenizer = byte_tokenizer()

    def make():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(
            **shape, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=None,
            eos_token_id=None, tie_word_embeddings=True, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval(), tokenizer

    return make


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the cat\n" * 40)
    return path


@pytest.fixture
def make_trainer(language_model, file, tmp_path):
    def make(name="output", **options):
        model, tokenizer = language_model()
        options = {"dtype": torch.float32, "log_every": 1, "log": lambda line: None, **options}
        return Trainer(model, TextMaterial(model, tokenizer, [file]), tmp_path / name, **options)

    return make


def test_the_loss_is_the_models_own(language_model, file):
    model, tokenizer = language_model()
    text = TextMaterial(model, tokenizer, [file], seed=1)
    loss, measures = text.compute_loss(stage(**ROW), None)
    ids = tokenizer(file.read_text(), return_tensors="pt").input_ids[0]
    assert text.tokens == len(ids)
    batch = torch.stack([ids[first : first + 128] for _, first, _ in text.drawn])
    assert len(batch) == 2
    torch.testing.assert_close(loss, model(batch, labels=batch).loss)
    assert measures["tokens"] == 256


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_it_learns(make_trainer, mode):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run_stage(stage(**ROW, attention={"mode": mode, "budget": 40}))
    losses = metrics(trainer)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    after = trainer.model.state_dict()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_mask_is_for_the_second_half(make_trainer):
    losses = {}
    for queries in ("decoded", "all"):
        trainer = make_trainer(queries)
        trainer.run_stage(stage(**ROW, attention={"budget": 40, "queries": queries}))
        losses[queries] = metrics(trainer)
    trainer = make_trainer("dense")
    trainer.run_stage(stage(**ROW))
    assert len({round(each[0], 6) for each in (*losses.values(), metrics(trainer))}) == 3


def test_a_resumed_run_has_the_same_losses(make_trainer):
    stages, options = [stage(**{**ROW, "steps": 5})], {"checkpoints": True, "save_minutes": 0.0}
    whole = make_trainer("whole", **options)
    whole.run(stages)
    with pytest.raises(Stopped):
        make_trainer("cut", log=stop_after(2), **options).run(stages)
    resumed = make_trainer("cut", resume=True, **options)
    resumed.run(stages)
    assert {row["step"]: row["loss"] for row in rows(resumed)} == {row["step"]: row["loss"] for row in rows(whole)}


def test_what_is_wrong_is_named(language_model, file, make_trainer):
    model, tokenizer = language_model()
    with pytest.raises(ValueError, match=r"text\.files is missing"):
        TextMaterial(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"none\.txt: no such text"):
        TextMaterial(model, tokenizer, [file.with_name("none.txt")])
    with pytest.raises(ValueError, match=r"lengths is \[\]; give the tokens of a row"):
        make_trainer().run_stage(stage(**{**ROW, "lengths": []}))
    with pytest.raises(ValueError, match=r"longer than every text in text\.files"):
        make_trainer().run_stage(stage(**{**ROW, "tokens": 4096, "lengths": [4096]}))


def test_a_loss_that_is_no_number_leaves_its_stretches(make_trainer, file):
    trainer = make_trainer()
    trainer.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan near step 1"):
        trainer.run_stage(stage(**ROW))
    kept = json.loads((trainer.output_dir / "not_a_number_0.json").read_text())
    assert [(item["file"], item["length"]) for item in kept["items"]] == [(str(file), 128)] * 2


@pytest.mark.parametrize("lora", [False, True])
def test_the_script_trains_what_evaluation_reads(language_model, file, tmp_path, monkeypatch, capsys, lora):
    model, tokenizer = language_model()
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    overrides = [
        *("experiment=sparsity_text", "training=soft", "training.budget=40", "recipe.steps=2", "recipe.length=128"),
        *(f"text.model={tmp_path}/start", f"text.files=[{file}]", "device=cpu", f"output.dir={tmp_path}/run"),
    ]
    if lora:
        train = "{name: adapt, steps: 2, tokens: 128, lengths: [128], train: {lora: 1e-2}, attention: ${training}}"
        overrides += ["+lora={rank: 4, alpha: 8}", f"stages=[{train}]"]
    finetune(configuration(*overrides))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "adapt")
    assert trained.config.sparse_attention["budget"] == 40
    assert not np.array_equal(*(m.model.layers[0].mlp.up_proj.weight.detach().numpy() for m in (trained, model)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                *("task=perplexity", f"text.model={tmp_path}/run/adapt", f"text.file={file}", "text.lengths=[200]"),
                *("text.score_tokens=20", "text.samples=2", "attention.budget=[null,40]", "device=cpu"),
                f"output.dir={tmp_path}/perplexity",
            ]
        )
    assert exit_.value.code == 0
    found = json.loads((tmp_path / "perplexity" / "results.json").read_text())["results"]
    assert [(result["system"], result["samples"]) for result in found] == [("dense", 2), ("unique-40", 2)]
