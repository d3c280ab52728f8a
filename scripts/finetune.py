"""Train a speech LLM: python scripts/finetune.py experiment=default_model data.speech=DIR init.encoder=DIR ..."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr.attention import SparseAttentionConfig
from unique_asr.data import join, read_manifest, spread
from unique_asr.models import load, resolve_device
from unique_asr.models.compose import compose
from unique_asr.models.packing import save_packed_model
from unique_asr.training.adapters import AdapterConfig, add_adapters, without_adapters
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus, read_manifests, read_synthetic
from unique_asr.training.distributed import Processes
from unique_asr.training.trainer import StageConfig, Trainer
from unique_asr.training.validation import validate


def finetune(config: DictConfig) -> None:
    torch.manual_seed(config.seed)
    processes = Processes.start(resolve_device(config.device))
    device = processes.device
    log = partial(print, flush=True) if processes.first else lambda line: None
    stages = read_stages(config)
    torch.set_float32_matmul_precision("high")
    if not config.init.model and not (config.init.encoder and config.init.language_model):
        raise ValueError("nothing to start from: give init.model, or init.encoder and init.language_model")
    if config.init.model:
        model, processor = load(config.init.model, device=str(device), dtype="float32")
    else:
        options = OmegaConf.to_container(config.init.options, resolve=True)
        texts = [line for path in config.init.ctc_texts for line in Path(path).read_text().splitlines()]
        model, processor = compose(
            config.init.encoder, config.init.language_model, texts, config.init.ctc_units, **options
        )
        model.to(device)
    # Dropout stays off: the augmentation regularises, and frozen parts must give what they give at inference.
    model.eval()
    if config.lora:
        add_adapters(model, AdapterConfig(**OmegaConf.to_container(config.lora)))
    torch.manual_seed(config.seed + processes.rank)  # noise and masks differ, weights do not

    weights = OmegaConf.to_container(config.data.weights)
    sources = []
    if config.data.manifests:
        data = config.data
        sources += read_manifests(data.manifests, weights, device, data.min_match, missing=data.missing)
    for folder in config.data.synthetic or []:
        sources += read_synthetic(folder, weights, device)
    for source in sources:
        log(f"{source.name}: {source.hours:.2f} h in {len(source.recordings)} recordings, weight {source.weight}")
    corpus = Corpus(sources, config.seed + processes.rank, config.data.max_gap_seconds)

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
        checkpoints=config.output.checkpoints,
        resume=config.resume,
        validate_steps=validation.every,
        processes=processes,
        tensorboard=tensorboard(output) if config.output.tensorboard and processes.first else None,
        log=log,
    )

    def save(stage: StageConfig, name: str | None = None) -> None:
        attention = stage.training_attention()
        if attention:  # what the model was made for, for those who load it
            model.config.sparse_attention = attention.sparse.to_dict()
        bits = OmegaConf.to_container(config.output.bits) if config.output.bits else {}
        save_packed_model(without_adapters(model), processor, output / (name or stage.name), bits)

    def measure(stage: StageConfig) -> dict[str, float]:
        attention = stage.training_attention()
        sparse = attention.sparse if attention else None
        if validation.attention:
            sparse = SparseAttentionConfig(**OmegaConf.to_container(validation.attention, resolve=True))
        options = {"with_llm": stage.llm_weight > 0, "sparse": sparse}
        return validate(model, processor, recordings, trainer.dtype, validation.batch, **options)

    trainer.save = save
    if recordings:
        trainer.validate, trainer.save_best = measure, partial(save, name="best")
    trainer.run(stages)


def read_stages(config: DictConfig) -> list[StageConfig]:
    """The stages that have steps, checked before anything is loaded."""
    try:
        stages = [StageConfig(**stage) for stage in OmegaConf.to_container(config.stages, resolve=True)]
    except TypeError as error:
        raise ValueError(f"stages: {error}; the fields are those of StageConfig") from None
    for stage in stages:
        stage.training_attention()
    return [stage for stage in stages if stage.steps]


def tensorboard(folder: Path) -> object:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("output.tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(folder)


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
def main(config: DictConfig) -> None:
    try:
        finetune(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"finetune: {error}")


if __name__ == "__main__":
    main()
