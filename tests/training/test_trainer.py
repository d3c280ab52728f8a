"""Stages on a tiny model: the loss falls, and only what should train moves. The scripts run from end to end."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from unique_asr.models import SpeechLLMConfig, load
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.batches import Batcher
from unique_asr.training.corpus import Corpus, Item, read_manifests
from unique_asr.training.positions import PositionBank, PositionBatcher, listen
from unique_asr.training.trainer import StageConfig, Trainer, _rate

ROOT = Path(__file__).parents[2]
CLEAN = AugmentConfig(speed=0, gain_db=0, noise_share=0, frequency_masks=0, time_masks=0)
SEGMENTS = {"a.wav": [{"start": 0, "end": 2, "text": "the cat sat", "cased": "The cat sat."}]}
EVERYTHING = {"encoder": 3e-3, "projector": 1e-2, "residual": 1e-2, "language_model": 3e-3}


@pytest.fixture
def trainer(speech_llm, write_manifest, tmp_path):
    """Trains a new tiny model on one utterance, which is also in its bank of cached positions."""
    model, processor = speech_llm()
    sources = read_manifests([write_manifest(SEGMENTS)], {}, model.device)
    item = Item([(sources[0], sources[0].recordings[0][0], 0.0)], cased=True)
    bank = PositionBank([listen(model, Batcher(model, processor, CLEAN, 0), [item])])
    return Trainer(
        model,
        processor,
        Corpus(sources, seed=0),
        CLEAN,
        tmp_path / "output",
        autocast=None,
        positions=PositionBatcher(model, processor, bank, [], seed=0),
        log_every=1,
        log=lambda line: None,
    )


def metrics(trainer, name="loss"):
    rows = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows]


def stage(name="stage", steps=12, train=EVERYTHING, seconds=(2.0, 2.5), windows=2, **options):
    options = {"warmup": 0.0, "llm_weight": 1.0, "cased_share": 1.0, **options}
    return StageConfig(name, steps, train, seconds, windows, **options)


STAGES = {
    "align": stage(train={"projector": 1e-2}, llm_weight=0.0),
    "hear": stage(train={"encoder": 1e-2, "projector": 1e-2}, llm_weight=0.0, micro_batches=2),
    "read": stage(train={"language_model": 1e-2, "residual": 1e-2}, position_dropout=0.05),
    "joint": stage(ctc_weight=0.3),
    "long": stage(seconds=(9.0, 10.0), windows=4),  # two windows of 6 s an item: no CTC
    "cached": stage(train={"language_model": 1e-2}, cached=True, windows=1, seconds=(15.0, 15.1)),
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
    assert (sum(metrics(trainer, "ctc")) > 0) == (kind in ("align", "hear", "joint"))
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
    rates = [_rate(done / 100, config) for done in range(100)]
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
    with pytest.raises(ValueError, match=r"stage odd: train has unknown parts \['decoder'\]; they are \['encoder', "):
        trainer.run_stage(stage("odd", train={"decoder": 1e-3}))


def test_cached_positions_name_the_script(trainer):
    trainer.positions = None
    with pytest.raises(ValueError, match=r"cached needs data\.positions, made with scripts/cache_positions\.py"):
        trainer.run_stage(stage(cached=True))


def test_a_loss_that_is_no_number_ends_training(trainer):
    trainer.model.projector.up.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"stage stage: the loss is nan near step 1"):
        trainer.run_stage(stage(llm_weight=0.0))


def test_a_batch_of_cut_items_alone_has_no_ctc(trainer):
    with pytest.raises(ValueError, match="nothing to learn from"):
        trainer.run_stage(stage(steps=1, seconds=(9.0, 10.0), windows=2, train={"projector": 1e-3}, llm_weight=0.0))


# Configurations and the script


def configuration(name, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_experiments_compose(experiment):
    config = OmegaConf.to_container(configuration("finetune", f"experiment={experiment}"), resolve=True)
    assert config["stages"]
    for found in config["stages"]:
        parsed = StageConfig(**found)
        assert set(parsed.train) <= set(EVERYTHING)
        assert all(isinstance(rate, float) for rate in parsed.train.values())
    AugmentConfig(**config["augment"])
    SpeechLLMConfig(**config["init"]["options"])


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cache_positions
    import finetune

    return finetune, cache_positions


def test_from_a_manifest_to_a_model(scripts, speech_llm, write_manifest, tmp_path, monkeypatch):
    """Train on audio, cache positions with the result, and train its LLM on them."""
    finetune, cache_positions = scripts
    model, processor = speech_llm()
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    manifest = write_manifest(SEGMENTS)
    (tmp_path / "lines.txt").write_text("The sea.\nIs it far?\n")
    common = ["device=cpu", f"output.dir={tmp_path}/output", f"validation.manifest={manifest}", "log_every=1"]
    hear = "{name: hear, steps: 2, windows: 2, seconds: [2, 3], train: {projector: 1e-3}, llm_weight: 0.5}"
    finetune.finetune(
        configuration(
            "finetune", f"init.model={tmp_path}/start", f"data.manifests=[{manifest}]", f"stages=[{hear}]", *common
        )
    )
    positions = tmp_path / "positions.npz"
    command = f"x --model {tmp_path}/output/hear --manifests {manifest} --output {positions} --passes 2 --device cpu"
    monkeypatch.setattr(sys, "argv", command.split())
    cache_positions.main()
    assert len(PositionBank.load([positions]).recordings) == 2
    read = "{name: read, steps: 2, cached: true, windows: 1, seconds: [10, 20], train: {language_model: 1e-3}}"
    finetune.finetune(
        configuration(
            "finetune",
            f"init.model={tmp_path}/output/hear",
            f"data.positions=[{positions}]",
            f"data.texts=[{tmp_path}/lines.txt]",
            f"stages=[{read}]",
            *common,
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["hear"] * 3 + ["read"] * 3
    assert {"ctc", "llm"} <= rows[2].keys()  # word error rates
    trained, reader = load(tmp_path / "output" / "read", device="cpu")
    assert trained.config.window_seconds == 6
    assert reader.ctc_tokens == processor.ctc_tokens
