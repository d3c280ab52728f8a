"""Stages on a tiny model: the loss falls, and only what should train moves. The scripts run from end to end."""

import dataclasses
import json

import pytest
import torch
from omegaconf import OmegaConf
from training_cases import CLEAN, EVERYTHING, ROOT, SEGMENTS, configuration, metrics, stage
from transformers import WhisperModel

from unique_asr.models import SpeechLLMConfig, load
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus
from unique_asr.training.finetune import finetune, load_start
from unique_asr.training.manifests import read_manifests
from unique_asr.training.parameter_groups import make_parameter_groups
from unique_asr.training.speech_material import SpeechMaterial
from unique_asr.training.stages import StageConfig
from unique_asr.training.trainer import Trainer, compute_rate


@pytest.fixture
def trainer(speech_llm, write_manifest, tmp_path):
    """Trains a new tiny model on one utterance."""
    model, processor = speech_llm()
    sources = read_manifests([write_manifest(SEGMENTS)], {}, model.device)
    material = SpeechMaterial(model, processor, Corpus(sources, seed=0), CLEAN)
    return Trainer(model, material, tmp_path / "output", dtype=torch.float32, log_every=1, log=lambda line: None)


STAGES = {
    "align": stage(train={"projector": 1e-2}, llm_weight=0.0),
    "hear": stage(train={"encoder": 1e-2, "projector": 1e-2}, llm_weight=0.0, micro_batches=2),
    "read": stage(train={"language_model": 1e-2, "residual": 1e-2}, position_dropout=0.05),
    "joint": stage(ctc_weight=0.3),
    "long": stage(seconds=(9.0, 10.0), windows=4),  # two windows of 6 s an item: no CTC
    "shaped": stage(seconds=(5.0, 7.0), tokens=128),
    "packed": stage(seconds=(5.0, 7.0), tokens=256, pack=True),
    "short": stage(train={"language_model": 1e-2}, ctc_weight=0.0),
}
PARTS = {
    "encoder.": "encoder",
    "projector.residual.": "residual",
    "projector.": "projector",
    "language_model.": "language_model",
}
FROZEN = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "encoder.embed_positions.weight")


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_reduces_the_loss_of_one_item(trainer, kind):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run_stage(STAGES[kind])
    losses = metrics(trainer)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert (sum(metrics(trainer, "ctc")) > 0) == (kind in ("align", "hear", "joint", "shaped", "packed"))
    assert (sum(metrics(trainer, "llm")) > 0) == (kind not in ("align", "hear"))

    moved = set()
    for name, value in trainer.model.state_dict().items():
        if not torch.equal(value, before[name]):
            assert name not in FROZEN
            moved.add(next(part for prefix, part in PARTS.items() if name.startswith(prefix)))
    assert moved == set(STAGES[kind].train)
    assert not any(parameter.requires_grad for parameter in trainer.model.parameters())


def test_stages_follow_one_another(trainer):
    seen = []
    stages = [stage(name, steps=1) for name in ("one", "two")]

    def after(done):
        trainer.report(done, {"ctc": 12.5})
        seen.append(done.name)

    trainer.run(stages, after)
    assert seen == ["one", "two"]
    assert metrics(trainer, "stage") == ["one", "one", "two", "two"]


def test_a_stage_ends_in_time(trainer):
    trainer.run_stage(stage(steps=1_000_000, minutes=0.2 / 60, llm_weight=0.0, train={"projector": 1e-3}))
    assert 0.2 < metrics(trainer, "elapsed")[-1] < 5


def test_rates_warm_up_and_decay():
    config = stage(warmup=0.2, final_rate=0.1)
    rates = [compute_rate(done / 100, config) for done in range(100)]
    assert rates[0] == 0.02
    assert max(rates) == rates[20] == 1
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_micro_batches_average(trainer):
    """The progress that is reported is a mean over micro-batches and steps."""
    frozen = {"train": {"projector": 0.0}, "llm_weight": 0.0, "weight_decay": 0.0}
    trainer.run_stage(stage("single", steps=1, **frozen))
    trainer.log_every = 4
    trainer.run_stage(stage("many", steps=4, micro_batches=3, **frozen))
    assert metrics(trainer)[1] == pytest.approx(metrics(trainer)[0], rel=1e-4)


def test_unknown_parts_name_the_parts(trainer):
    with pytest.raises(
        ValueError, match=r"stage odd: train has unknown parts \['decoder'\]; give encoder, projector, "
    ):
        trainer.run_stage(stage("odd", train={"decoder": 1e-3}))


def test_a_part_may_be_one_layer_with_its_own_rate(trainer):
    model = trainer.model
    groups = make_parameter_groups(
        model, stage(train={"encoder": 1e-5, "encoder.layers.0.fc1": 1e-3, "projector": 1e-4})
    )
    assert [group["peak"] for group in groups] == [1e-5, 1e-3, 1e-4]
    layer = model.encoder.layers[0]
    assert [id(value) for value in groups[1]["params"]] == [id(value) for value in layer.fc1.parameters()]
    assert not {id(value) for value in groups[0]["params"]} & {id(value) for value in groups[1]["params"]}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("encoder.", "projector.")) and "embed_positions" not in name and "residual" not in name
    }


def test_shapes_are_powers_of_two_that_hold_the_items(trainer):
    shapes = set()
    for _ in range(50):
        items, (rows, length) = trainer.material.draw_items(stage(seconds=(3.0, 60.0), tokens=512))
        assert len(items) == rows
        assert rows * length == 512
        shapes.add((rows, length))
        assert all(item.seconds <= max(length / 9.0, 3.0) + 2.0 for item in items)
    assert shapes == {(16, 32), (8, 64), (4, 128), (2, 256), (1, 512)}


def test_a_packed_row_is_full(trainer):
    """Of items that were not heard before, each counted as fast speech; the last may be an utterance that is longer."""
    for _ in range(20):
        items, shape = trainer.material.draw_items(stage(seconds=(3.0, 60.0), tokens=512, pack=True))
        assert shape == (1, 512)
        counts = [trainer.material.count_tokens(item) for item in items]
        assert 512 - 3.0 * 9 < sum(counts) < 512 + 3.0 * 9
    with pytest.raises(ValueError, match="stage odd: pack needs `tokens`"):
        stage("odd", pack=True)


@pytest.mark.parametrize("kind", ["hear", "joint"])
def test_weights_are_stepped_in_float32_and_computed_in_bfloat16(trainer, kind):
    """Steps far below the resolution of bfloat16 still add up, and what is saved on the way is float32."""
    trainer.dtype = torch.bfloat16
    seen = []
    trainer.save, trainer.save_minutes = lambda _: seen.append(trainer.model.projector.up.weight.clone()), 0.0
    weight = trainer.model.projector.up.weight
    before = weight.clone()
    small = dict.fromkeys(STAGES[kind].train, 1e-06)
    trainer.run_stage(dataclasses.replace(STAGES[kind], steps=5, train=small, weight_decay=0.0))
    assert trainer.model.projector.up.weight is weight
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    moved = (weight - before).abs().median()
    assert 1e-6 < moved < 6e-6
    assert len(seen) == 5
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[-1], weight)


def test_a_loss_that_is_no_number_ends_training(trainer):
    trainer.model.projector.up.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"stage stage: the loss is nan near step 1"):
        trainer.run_stage(stage(llm_weight=0.0))


def test_the_items_of_a_bad_loss_are_kept(trainer):
    trainer.model.projector.up.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not_a_number_0\.json"):
        trainer.run_stage(stage(llm_weight=0.0, windows=3))
    kept = json.loads((trainer.output_dir / "not_a_number_0.json").read_text())
    assert [row[0]["text"] for row in kept["items"]] == ["the cat sat"] * 3


def test_a_batch_of_cut_items_alone_has_no_ctc(trainer):
    with pytest.raises(ValueError, match="nothing to learn from"):
        trainer.run_stage(stage(steps=1, seconds=(9.0, 10.0), windows=2, train={"projector": 1e-3}, llm_weight=0.0))


# Configurations and the script


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_experiments_compose(experiment):
    config = OmegaConf.to_container(configuration(f"experiment={experiment}"), resolve=True)
    assert config["stages"]
    for found in config["stages"]:
        parsed = StageConfig(**found)
        assert {part.split(".")[0] for part in parsed.train} <= {*EVERYTHING, "lora"}
        assert parsed.mask is None or parsed.mask.masks
        assert all(isinstance(rate, float) for rate in parsed.train.values())
    AugmentConfig(**config["augment"])
    options = config["init"]["options"]
    options.pop("listener_ascii", None)  # of compose alone, which makes `listener`
    SpeechLLMConfig(**options, listener={"stop": 1} if options.get("merge") == "decoder" else None)


def test_from_a_manifest_to_a_model(speech_llm, write_manifest, tmp_path):
    """Train on audio, go on with the result, and load what that gave."""
    model, processor = speech_llm()
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    manifest = write_manifest(SEGMENTS)
    common = [
        *("device=cpu", f"output.dir={tmp_path}/output", "log_every=1"),
        *(f"validation.manifest={manifest}", f"data.manifests=[{manifest}]"),
    ]
    hear = "{name: hear, steps: 2, windows: 2, seconds: [2, 3], train: {projector: 1e-3}, llm_weight: 0.5}"
    finetune(configuration(f"init.model={tmp_path}/start", f"stages=[{hear}]", *common))
    read = "{name: read, steps: 2, tokens: 128, seconds: [2, 9], train: {language_model: 1e-3}, llm_weight: 1}"
    finetune(configuration(f"init.model={tmp_path}/output/hear", f"stages=[{read}]", *common))
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["hear"] * 3 + ["read"] * 3
    assert {"ctc", "llm"} <= rows[2].keys()  # word error rates
    trained, reader = load(tmp_path / "output" / "read", device="cpu")
    assert trained.config.window_seconds == 6
    assert reader.ctc_tokens == processor.ctc_tokens


def test_a_new_model_may_have_the_ctc_head_of_a_trained_one(speech_llm, tmp_path):
    """From an encoder and an LLM; the projector but for its residual is that of the trained model."""
    model, processor = speech_llm(context_layers=1, merge_frames=5)
    model.projector.residual.bias.data.fill_(1.0)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    WhisperModel(model.config.audio_config).save_pretrained(tmp_path / "encoder")
    processor.feature_extractor.save_pretrained(tmp_path / "encoder")
    model.language_model.save_pretrained(tmp_path / "llm")
    processor.tokenizer.save_pretrained(tmp_path / "llm")
    config = configuration(
        f"init.encoder={tmp_path}/encoder", f"init.language_model={tmp_path}/llm", f"init.projector={tmp_path}/trained",
        "+init.options.window_seconds=6.0",
    )  # fmt: skip
    made, reader = load_start(config, torch.device("cpu"), torch.float32)
    assert reader.ctc_tokens == processor.ctc_tokens
    assert (made.config.context_layers, made.config.merge_frames) == (1, 5)
    theirs = model.projector.state_dict()
    for name, value in made.projector.state_dict().items():
        assert torch.equal(value, theirs[name]) == (name != "residual.bias"), name
