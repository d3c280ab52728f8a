"""Train a speech LLM: python scripts/finetune.py experiment=default_model data.speech=DIR init.encoder=DIR ..."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr.data import join, read_manifest, spread
from unique_asr.models import load, resolve_device
from unique_asr.models.compose import compose
from unique_asr.models.packing import save_packed_model
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus, read_manifests, read_synthetic
from unique_asr.training.trainer import StageConfig, Trainer
from unique_asr.training.validation import validate


def finetune(config: DictConfig) -> None:
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    torch.set_float32_matmul_precision("high")
    if not config.init.model and not (config.init.encoder and config.init.language_model):
        raise ValueError("nothing to start from: give init.model, or init.encoder and init.language_model")
    if config.init.model:
        model, processor = load(config.init.model, device=config.device, dtype="float32")
    else:
        options = OmegaConf.to_container(config.init.options, resolve=True)
        texts = [line for path in config.init.ctc_texts for line in Path(path).read_text().splitlines()]
        model, processor = compose(
            config.init.encoder, config.init.language_model, texts, config.init.ctc_units, **options
        )
        model.to(device)
    # Dropout stays off: the augmentation regularises, and frozen parts must give what they give at inference.
    model.eval()

    weights = OmegaConf.to_container(config.data.weights)
    sources = []
    if config.data.manifests:
        sources += read_manifests(config.data.manifests, weights, device, config.data.min_match)
    for folder in config.data.synthetic or []:
        sources += read_synthetic(folder, weights, device)
    for source in sources:
        print(f"{source.name}: {source.hours:.2f} h in {len(source.recordings)} recordings, weight {source.weight}")
    corpus = Corpus(sources, config.seed, config.data.max_gap_seconds)

    validation = config.validation
    recordings = []
    if validation.manifest:
        rows = read_manifest(validation.manifest, source=validation.source)
        recordings = spread(join(rows, seconds=validation.seconds), validation.limit)
    output = Path(config.output.dir)
    trainer = Trainer(
        model,
        processor,
        corpus,
        AugmentConfig(**OmegaConf.to_container(config.augment)),
        output,
        seed=config.seed,
        dtype=torch.bfloat16 if config.bfloat16 == "always" or device.type == "cuda" else torch.float32,
        cuda_graphs=config.cuda_graphs,
        log_every=config.log_every,
        save_minutes=config.output.save_minutes,
        log=lambda line: print(line, flush=True),
    )

    def save(stage: StageConfig) -> None:
        save_packed_model(model, processor, output / stage.name, OmegaConf.to_container(config.output.bits))

    trainer.save = save

    def after_stage(stage: StageConfig) -> None:
        if recordings:
            measures = validate(model, processor, recordings, trainer.dtype, with_llm=stage.llm_weight > 0)
            trainer.report(stage, measures)

    try:
        stages = [StageConfig(**stage) for stage in OmegaConf.to_container(config.stages)]
    except TypeError as error:
        raise ValueError(f"stages: {error}; the fields are those of StageConfig") from None
    trainer.run([stage for stage in stages if stage.steps], after_stage)


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
def main(config: DictConfig) -> None:
    try:
        finetune(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"finetune: {error}")


if __name__ == "__main__":
    main()
