"""Stages that train through the page selection, with and without adapters; and the configurations that do so."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from training_cases import CLEAN, LONG, SEGMENTS, SOFT, Stopped, configuration, metrics, rows, stage, stop_after

from unique_asr.attention.soft_mask import TrainingAttentionConfig
from unique_asr.models import load
from unique_asr.models.speech_llm.packing import save_packed_model
from unique_asr.training.corpus import Corpus
from unique_asr.training.finetune import finetune
from unique_asr.training.lora import LoraSettings, add_lora, copy_without_lora
from unique_asr.training.manifests import read_manifests
from unique_asr.training.speech_material import SpeechMaterial
from unique_asr.training.stages import StageConfig
from unique_asr.training.trainer import Trainer


@pytest.fixture
def make_trainer(speech_llm, write_manifest, tmp_path):
    """Trainers of equal tiny models that differ in nothing but their folder."""

    def make(name="output", segments=LONG, seconds=8.0, seed=0, **options):
        model, processor = speech_llm()
        sources = read_manifests([write_manifest(segments, seconds=seconds)], {}, model.device)
        options = {"dtype": torch.float32, "log_every": 1, "log": lambda line: None, **options}
        material = SpeechMaterial(model, processor, Corpus(sources, seed=0), CLEAN, seed)
        return Trainer(model, material, tmp_path / name, **options)

    return make


def long_stage(name="stage", **options):
    options = {"seconds": (6.0, 8.0), "train": {"language_model": 3e-3}, "ctc_weight": 0.0, **options}
    return stage(name, **options)


@pytest.mark.parametrize("shape", [{}, {"tokens": 512, "pack": True}], ids=["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_a_stage_learns_through_a_mask(make_trainer, mode, checkpointing, shape):
    trainer = make_trainer()
    trainer.run_stage(long_stage(steps=8, attention={**SOFT, "mode": mode}, checkpointing=checkpointing, **shape))
    losses = metrics(trainer)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert trainer.model.language_model.config._attn_implementation == "sdpa"
    assert not trainer.model.get_decoder().is_gradient_checkpointing


def test_the_mask_matters_and_only_for_what_is_decoded(make_trainer):
    """First losses of one batch: a mask for all queries, for the transcript's, and none, are three numbers."""
    first = {}
    for name, attention in {
        "dense": None,
        "named dense": {"mode": "dense"},
        "decoded": SOFT,
        "all": {**SOFT, "queries": "all"},
        "budget over everything": {**SOFT, "budget": 4096},
    }.items():
        trainer = make_trainer(name)
        trainer.run_stage(long_stage(steps=1, attention=attention))
        (first[name],) = metrics(trainer)
    assert first["dense"] == first["named dense"] == pytest.approx(first["budget over everything"], rel=1e-5)
    assert len({round(first[name], 5) for name in ("dense", "decoded", "all")}) == 3


def test_the_last_steps_are_hard(make_trainer, monkeypatch):
    modes = []
    loss = SpeechMaterial.compute_loss

    def watch(self, *arguments):
        found = loss(self, *arguments)
        modes.append(self.model.language_model.model.layers[0].self_attn.training_attentions[-1].config.mode)
        return found

    monkeypatch.setattr(SpeechMaterial, "compute_loss", watch)
    make_trainer().run_stage(long_stage(steps=8, attention={**SOFT, "hard_last": 0.25}))
    assert modes == ["soft"] * 6 + ["hard"] * 2


def test_adapters_train_alone_and_vanish_when_saved(make_trainer, tmp_path):
    trainer = make_trainer()
    model = trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert copy_without_lora(model) is model
    add_lora(model, LoraSettings(rank=4, alpha=8))
    trainer.run_stage(long_stage(steps=8, train={"lora": 3e-2}, attention=SOFT))
    assert sum(metrics(trainer)[-3:]) < 0.95 * sum(metrics(trainer)[:3])
    plain = copy_without_lora(model)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    save_packed_model(plain, trainer.material.processor, tmp_path / "saved", {})
    loaded, _ = load(tmp_path / "saved", device="cpu", dtype="float32")
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = model.language_model(input_ids=ids).logits
        torch.testing.assert_close(loaded.language_model(input_ids=ids).logits, expected, rtol=1e-2, atol=1e-2)


def test_wrong_targets_are_named(speech_llm):
    with pytest.raises(ValueError, match=r"lora\.targets is nothing"):
        add_lora(speech_llm()[0], LoraSettings(targets="nothing"))


# Checkpoints


@pytest.mark.parametrize(
    ("stop", "shape"),
    [(2, {}), (4, {}), (7, {}), (7, {"tokens": 512, "pack": True})],
    ids=["in the first stage", "at its end", "in the second", "among packed rows"],
)
def test_a_resumed_run_has_the_same_losses(make_trainer, stop, shape):
    """Two stages with augmentation noise and position dropout, cut after `stop` steps and gone on with."""
    stages = [
        long_stage("one", steps=4, train={"projector": 1e-3, "encoder": 1e-3}, ctc_weight=0.3, llm_weight=0.0,
                   seconds=(2.0, 5.0)),
        long_stage("two", steps=4, attention={**SOFT, "hard_last": 0.4}, position_dropout=0.2, **shape),
    ]  # fmt: skip
    options = {"checkpoints": True, "save_minutes": 0.0, "seed": 3}
    torch.manual_seed(5)
    whole = make_trainer("whole", **options)
    whole.run(stages)

    torch.manual_seed(5)
    with pytest.raises(Stopped):
        make_trainer("cut", log=stop_after(stop), **options).run(stages)
    torch.manual_seed(99)
    resumed = make_trainer("cut", resume=True, **options)
    resumed.run(stages)
    steps = [(row["stage"], row["step"], row["loss"], row["rate"]) for row in rows(whole)]
    again = {(row["stage"], row["step"]): row for row in rows(resumed)}  # the step of the cut was logged, but not kept
    assert steps == [(*key, row["loss"], row["rate"]) for key, row in again.items()]
    for ours, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_may_lack_options_that_came_later(make_trainer, tmp_path):
    trainer = make_trainer(checkpoints=True)
    trainer.run([long_stage(steps=1)])
    path = trainer.output_dir / "checkpoint.pt"
    state = torch.load(path, weights_only=False)
    del state["stages"][0]["pack"]
    torch.save(state, path)
    make_trainer(resume=True).run([long_stage(steps=1)])
    with pytest.raises(ValueError, match="made with other stages"):
        make_trainer(resume=True).run([long_stage(steps=1, tokens=512, pack=True)])


def test_what_cannot_be_resumed_is_named(make_trainer):
    make_trainer(checkpoints=True).run([long_stage(steps=1)])
    with pytest.raises(ValueError, match="made with other stages"):
        make_trainer(resume=True).run([long_stage(steps=2)])
    (make_trainer().output_dir / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a checkpoint"):
        make_trainer(resume=True).run([long_stage(steps=1)])


def test_the_best_model_is_kept(make_trainer):
    rates = iter([50.0, 40.0, 45.0, 30.0])
    trainer = make_trainer()
    best = []
    trainer.validate, trainer.validate_steps = lambda _: {"ctc": 10.0, "llm": 20.0, "sparse": next(rates)}, 2
    trainer.save_best = lambda _: best.append(trainer.best)
    trainer.run([long_stage(steps=8, attention=SOFT)])
    assert best == [50.0, 40.0, 30.0]
    assert [row["sparse"] for row in rows(trainer) if "sparse" in row] == [50.0, 40.0, 45.0, 30.0]


# Configurations


@pytest.mark.parametrize("experiment", ["sparsity", "sparsity_lora"])
def test_the_arms_differ_in_the_mode_alone(experiment):
    arms = {}
    for mode in ("dense", "soft", "hard"):
        config = OmegaConf.to_container(
            configuration(f"experiment={experiment}", f"training={mode}", "seed=2"), resolve=True
        )
        assert mode in config["output"]["dir"]
        assert "seed2" in config["output"]["dir"]
        (only,) = (StageConfig(**found) for found in config["stages"])
        attention = TrainingAttentionConfig.from_dict(only.attention)
        assert attention.mode == mode
        assert attention.masks == (mode != "dense")
        assert config["validation"]["attention"] == {"budget": attention.sparse.budget}
        config["training"].pop("mode"), config["output"].pop("dir"), config["stages"][0]["attention"].pop("mode")
        arms[mode] = config
    assert arms["dense"] == arms["soft"] == arms["hard"]


@pytest.mark.parametrize(
    ("experiment", "mode", "pack"), [("sparsity", "soft", "false"), ("sparsity_lora", "hard", "true")]
)
def test_an_experiment_runs(speech_llm, write_manifest, tmp_path, experiment, mode, pack):
    """From a model to one that says how it is to be decoded, and the best one beside it."""
    model, processor = speech_llm()
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    manifest = write_manifest(LONG, seconds=8.0)
    overrides = [
        *(f"experiment={experiment}", f"training={mode}", "training.budget=40", f"init.model={tmp_path}/start"),
        *("recipe.steps=2", "recipe.tokens=256", "recipe.seconds=[6,8]", f"recipe.pack={pack}"),
        *("validation.limit=1", "validation.every=1"),
        *(
            f"data.manifests=[{manifest}]",
            f"validation.manifest={manifest}",
            "device=cpu",
            f"output.dir={tmp_path}/out",
        ),
    ]
    finetune(configuration(*overrides))
    found = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in found if "sparse" in row]
    assert len(validations) == 2
    assert all(row["sparse_steps"] > 0.5 for row in validations)
    for name in ("adapt", "best"):
        trained, _ = load(tmp_path / "out" / name, device="cpu")
        assert trained.config.sparse_attention["budget"] == 40
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


def test_a_folder_of_texts_and_missing_audio(write_manifest, tmp_path):
    folder = write_manifest({"x.wav": None}, text="all of it").parent
    (folder / "x.txt").write_text("All\nof it.\n")
    (source,) = read_manifests([folder], {}, torch.device("cpu"))
    assert [utterance.text for utterance in source.recordings[0]] == ["All of it."]
    path = write_manifest({**SEGMENTS, "b.wav": SEGMENTS["a.wav"]})
    (tmp_path / "b.wav").unlink()
    with pytest.raises(ValueError, match=r"data\.missing=skip"):
        read_manifests([path], {}, torch.device("cpu"))
    (source,) = read_manifests([path], {}, torch.device("cpu"), missing="skip")
    assert len(source.recordings) == 1
