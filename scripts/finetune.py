"""Train a speech LLM, or a language model alone on texts; conf/finetune.yaml has the options.

python scripts/finetune.py experiment=sparsity init.model=default data.manifests=[train.jsonl]
python scripts/finetune.py experiment=speech_llm init.model=qwen3_asr_0.6b data.manifests=[train.jsonl]
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr.attention import SparseAttentionConfig
from unique_asr.data import join, read_manifest, take_evenly
from unique_asr.generation import load_text_model
from unique_asr.models import ModelError, load, resolve_device
from unique_asr.models import pretrained as adapters
from unique_asr.models.speech_llm.compose import compose
from unique_asr.models.speech_llm.packing import save_packed_model
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus, Source, read_manifests, read_synthetic
from unique_asr.training.distributed import Processes
from unique_asr.training.listening import can_listen_once, heard_sources, read_heard
from unique_asr.training.lora import LoraSettings, add_lora, without_lora
from unique_asr.training.precision import rounded
from unique_asr.training.pretrained import PretrainedSpeech
from unique_asr.training.speech import Speech
from unique_asr.training.text import Text
from unique_asr.training.texts import read_texts
from unique_asr.training.trainer import Material, StageConfig, Trainer
from unique_asr.training.validation import validate, validate_pretrained

MODELS = Path(__file__).parents[1] / "conf" / "model"


def finetune(config: DictConfig) -> None:
    torch.manual_seed(config.seed)
    processes = Processes.start(resolve_device(config.device))
    device = processes.device
    dtype = torch.bfloat16 if config.bfloat16 == "always" or device.type == "cuda" else torch.float32
    log = partial(print, flush=True) if processes.first else lambda line: None
    stages = read_stages(config)
    torch.set_float32_matmul_precision("high")
    model, reader = start(config, device, dtype)
    pretrained = adapters.find(model) is not None
    # Dropout stays off: the augmentation regularises, and frozen parts must give what they give at inference.
    model.eval()
    if config.lora:
        add_lora(model, LoraSettings(**OmegaConf.to_container(config.lora)))
    material: Material
    if config.text.model:
        material = Text(model, reader, config.text.files, config.seed + processes.rank)
        log(f"{material.tokens} tokens in {len(material.files)} texts")
    else:
        material = speech(config, stages, model, reader, processes, log)
    torch.manual_seed(config.seed + processes.rank)  # noise and masks differ, weights do not
    output = Path(config.output.dir)
    if processes.first:
        output.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, output / "config.yaml", resolve=True)
    trainer = Trainer(
        model,
        material,
        output,
        dtype=dtype,
        cuda_graphs=config.cuda_graphs,
        log_every=config.log_every,
        save_minutes=config.output.save_minutes,
        checkpoints=config.output.checkpoints,
        resume=config.resume,
        validate_steps=config.validation.every,
        processes=processes,
        tensorboard=tensorboard(output) if config.output.tensorboard and processes.first else None,
        log=log,
    )

    def save(stage: StageConfig, name: str | None = None) -> None:
        attention, folder = stage.training_attention(), output / (name or stage.name)
        if attention:  # what the model was made for, for those who load it
            model.config.sparse_attention = attention.sparse.to_dict()
        if config.text.model:
            without_lora(model).save_pretrained(folder)
            reader.save_pretrained(folder)
        elif pretrained:
            plain = without_lora(model)
            with rounded(plain, dtype):
                plain.save_pretrained(folder)
            reader.save_pretrained(folder)
        else:
            bits = OmegaConf.to_container(config.output.bits) if config.output.bits else {}
            save_packed_model(without_lora(model), reader, folder, bits)

    trainer.save = save
    if config.validation.manifest and not config.text.model:
        trainer.validate, trainer.save_best = (
            validation(config, model, reader, trainer.dtype),
            partial(save, name="best"),
        )
    trainer.run(stages)


def start(config: DictConfig, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, object]:
    """The model that training begins with, and its processor or tokenizer.

    In float32; pretrained speech LLMs in `dtype`, for most of their weights seldom train.
    """
    init = config.init
    if config.text.model:
        return load_text_model(config.text.model, str(device), "float32", option="text.model")
    if init.model:
        listed = MODELS / f"{init.model}.yaml"
        name = OmegaConf.load(listed).name_or_path if listed.is_file() else init.model
        try:
            if adapters.find(name) is None:
                return load(name, device=str(device), dtype="float32")
            model, processor = adapters.load(name, str(device), str(dtype).removeprefix("torch."))
        except ModelError as error:
            raise ModelError(f"init.{error}; conf/model lists what can be fine-tuned") from error
        adapters.merge_lora(model)
        return model, processor
    if not (init.encoder and init.language_model):
        raise ValueError(
            "nothing to start from: give init.model, or init.encoder and init.language_model, or text.model"
        )
    texts = [line for path in init.ctc_texts for line in Path(path).read_text().splitlines()]
    options = OmegaConf.to_container(init.options, resolve=True)
    model, processor = compose(init.encoder, init.language_model, texts, init.ctc_units, **options)
    return model.to(device), processor


def speech(
    config: DictConfig,
    stages: Sequence[StageConfig],
    model: torch.nn.Module,
    processor: object,
    processes: Processes,
    log: Callable[[str], None],
) -> Speech | PretrainedSpeech:
    """What the recordings and texts of `data` give."""
    data, augment = config.data, AugmentConfig(**OmegaConf.to_container(config.augment))
    weights = OmegaConf.to_container(data.weights)

    def read() -> list[Source]:
        found = read_manifests(data.manifests, weights, processes.device, data.min_match, missing=data.missing, log=log)
        return found + [source for path in data.synthetic for source in read_synthetic(path, weights, processes.device)]

    pretrained = adapters.find(model) is not None
    once = not pretrained and can_listen_once(model, stages)
    if data.texts and not once:
        raise ValueError("data.texts is for models that listen (merge: decoder), while their LLM alone trains")
    if once and data.heard and not (data.manifests or data.synthetic):
        sources = read_heard(Path(data.heard))
    elif once and (data.manifests or data.synthetic):
        kept = Path(data.heard or Path(config.output.dir) / "heard.pt")
        about = {
            "files": [digest(Path(path)) for path in [*data.manifests, *data.synthetic]],
            "filters": [data.min_match, data.missing, sorted(name for name, weight in weights.items() if not weight)],
        }
        sources = heard_sources(model, processor, read, about, kept, augment, data.readings, processes, log)
    else:
        sources = read()
    for source in sources:
        source.weight = weights.get(source.name, 1.0)
    sources += read_texts(data.texts, data.listener_tokenizer, model.listener, weights) if data.texts else []
    for source in sources:
        log(f"{source.name}: {source.hours:.2f} h in {len(source.recordings)} recordings, weight {source.weight}")
    corpus = Corpus(sources, config.seed + processes.rank, data.max_gap_seconds)
    material = PretrainedSpeech if pretrained else Speech
    return material(model, processor, corpus, augment, config.seed + processes.rank)


def digest(path: Path) -> str:
    """Of a manifest; of a folder, of the names and sizes of its files; of what is neither, its name."""
    if path.is_dir():
        files = sorted(path.iterdir())
        return hashlib.sha256(repr([(file.name, file.stat().st_size) for file in files]).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


def validation(
    config: DictConfig, model: torch.nn.Module, processor: object, dtype: torch.dtype
) -> Callable[[StageConfig], dict[str, float]]:
    """Word error rates on recordings of `validation`."""
    options = config.validation
    rows = read_manifest(options.manifest, source=options.source)
    recordings = take_evenly(join(rows, seconds=options.seconds), options.limit)

    def measure(stage: StageConfig) -> dict[str, float]:
        attention = stage.training_attention()
        sparse = attention.sparse if attention else None
        if options.attention:
            sparse = SparseAttentionConfig(**OmegaConf.to_container(options.attention, resolve=True))
        if adapters.find(model):
            return validate_pretrained(model, processor, recordings, dtype, sparse)
        with_llm = stage.llm_weight > 0
        return validate(model, processor, recordings, dtype, options.batch, with_llm=with_llm, sparse=sparse)

    return measure


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
