"""One run of training: the model it starts from, what it learns from, how it is validated and saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import conf_folder
from unique_asr.attention import SparseAttentionConfig
from unique_asr.data import join, read_manifest, take_evenly
from unique_asr.generation import load_text_model
from unique_asr.models import ModelError, load, pretrained, resolve_device
from unique_asr.models.listening_llm import HeardPrompt
from unique_asr.models.sources import locate_model
from unique_asr.models.speech_llm.compose import compose
from unique_asr.models.speech_llm.packing import INDEX, save_packed_changes, save_packed_model
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus, Source
from unique_asr.training.distributed import Processes
from unique_asr.training.heard_material import HeardMaterial
from unique_asr.training.heard_rows import HeardRowMaker
from unique_asr.training.heard_text import HeardTextRowMaker, read_pairs, read_texts
from unique_asr.training.listening import can_listen_once, load_or_listen, read_heard
from unique_asr.training.lora import LoraSettings, add_lora, copy_without_lora
from unique_asr.training.manifests import read_manifests, read_synthetic
from unique_asr.training.material import Material
from unique_asr.training.precision import cast_weights
from unique_asr.training.pretrained_material import PretrainedMaterial
from unique_asr.training.speech_material import SpeechMaterial
from unique_asr.training.stages import StageConfig
from unique_asr.training.text_material import TextMaterial
from unique_asr.training.text_sources import read_text_sources
from unique_asr.training.trainer import Trainer
from unique_asr.training.validation import validate, validate_pretrained


def finetune(config: DictConfig) -> None:
    """Train as `config`, a composed conf/finetune.yaml, says; models and metrics go to its output.dir.

    Raises:
        ValueError: an option, a model or a file does not fit.
        OSError: a file cannot be read or written.
        FloatingPointError: the loss is no longer a number.
    """
    torch.manual_seed(config.seed)
    processes = Processes.start(resolve_device(config.device))
    device = processes.device
    dtype = torch.bfloat16 if config.bfloat16 == "always" or device.type == "cuda" else torch.float32
    log = partial(print, flush=True) if processes.first else lambda line: None
    stages = read_stages(config)
    bits = read_bits(config)
    torch.set_float32_matmul_precision("high")
    log(f"loading {describe_start(config)}")
    model, reader = load_start(config, device, dtype)
    own = not config.text.model and pretrained.find(model) is None  # of this package: stored packed
    # Dropout stays off: the augmentation regularises, and frozen parts must give what they give at inference.
    model.eval()
    if config.lora:
        add_lora(model, LoraSettings(**OmegaConf.to_container(config.lora)))
    material = make_material(config, stages, model, reader, processes, log)
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
        bits=bits if own else None,
        cuda_graphs=config.cuda_graphs,
        log_every=config.log_every,
        save_minutes=config.output.save_minutes,
        checkpoints=config.output.checkpoints,
        resume=config.resume,
        validate_steps=config.validation.every,
        processes=processes,
        tensorboard=open_tensorboard(output) if config.output.tensorboard and processes.first else None,
        log=log,
    )

    def save(stage: StageConfig, name: str | None = None) -> None:
        folder = output / (name or stage.name)
        if stage.mask:  # what the model was made for, for those who load it
            model.config.sparse_attention = stage.mask.sparse.to_dict()
        if config.text.model:
            copy_without_lora(model).save_pretrained(folder)
            reader.save_pretrained(folder)
        elif not own:
            plain = copy_without_lora(model)
            with cast_weights(plain, dtype):
                plain.save_pretrained(folder)
            reader.save_pretrained(folder)
        elif config.output.changes_only:  # packing all weights again would round them again
            state = model.state_dict()
            changed = {name: state[name] for name in trainer.trained}
            save_packed_changes(changed, find_packed_start(config), folder)
            model.config.save_pretrained(folder)
        else:
            save_packed_model(copy_without_lora(model), reader, folder, bits)

    trainer.save = save
    if config.validation.manifest and not config.text.model:
        trainer.validate = make_validation(config, model, reader, dtype)
        trainer.save_best = partial(save, name="best")
    trainer.run(stages)


def read_stages(config: DictConfig) -> list[StageConfig]:
    """The stages that have steps, checked; raises ValueError for what does not fit."""
    try:
        stages = [StageConfig(**stage) for stage in OmegaConf.to_container(config.stages, resolve=True)]
    except TypeError as error:
        raise ValueError(f"stages: {error}; the fields are those of StageConfig") from None
    return [stage for stage in stages if stage.steps != 0]


def read_bits(config: DictConfig) -> dict[str, int]:
    """Bits a value of the stored weights, by name prefix; with output.changes_only those of init.model."""
    if not config.output.changes_only:
        return OmegaConf.to_container(config.output.bits) if config.output.bits else {}
    if config.lora:
        raise ValueError("output.changes_only: LoRA is merged into weights that did not train; leave one of them out")
    index = json.loads((find_packed_start(config) / INDEX).read_text())
    return {name: entry["bits"] for name, entry in index.items() if "bits" in entry}


def find_packed_start(config: DictConfig) -> Path:
    """The folder of packed weights that init.model names; raises ValueError if there is none."""
    name = str(config.init.model)
    folder = Path(locate_model(name)[0])
    if not (folder / INDEX).is_file():
        raise ValueError(f"output.changes_only needs packed weights to change, and init.model={name} has none")
    return folder


def describe_start(config: DictConfig) -> str:
    """Name what training begins with; raises ValueError if nothing is named."""
    init = config.init
    if name := config.text.model or init.model:
        return str(name)
    if not (init.encoder and init.language_model):
        raise ValueError(
            "nothing to start from: give init.model, or init.encoder and init.language_model, or text.model"
        )
    return f"{init.encoder} and {init.language_model}"


def load_start(config: DictConfig, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, object]:
    """The model that training begins with, and its processor or tokenizer.

    Weights are float32; those of pretrained speech LLMs are in `dtype`, for most of them seldom train.
    Raises ModelError for what cannot be loaded.
    """
    init = config.init
    if config.text.model:
        model, tokenizer = load_text_model(config.text.model, str(device), "float32", option="text.model")
        if config.text.rope_theta:
            set_rope_theta(model, config.text.rope_theta)
        return model, tokenizer
    if init.model:
        listed = conf_folder() / "model" / f"{init.model}.yaml"
        name = OmegaConf.load(listed).name_or_path if listed.is_file() else init.model
        try:
            if pretrained.find(name) is None:
                return load(name, device=str(device), dtype="float32")
            model, processor = pretrained.load(name, str(device), str(dtype).removeprefix("torch."))
        except ModelError as error:
            raise ModelError(f"init.{error}; conf/model lists what can be fine-tuned") from error
        pretrained.merge_lora(model)
        return model, processor
    options = OmegaConf.to_container(init.options, resolve=True)
    if init.projector:
        model, processor = compose_with_projector(init.encoder, init.language_model, init.projector, options)
    else:
        texts = [line for path in init.ctc_texts for line in Path(path).read_text().splitlines()]
        model, processor = compose(init.encoder, init.language_model, texts, init.ctc_units, **options)
    return model.to(device), processor


def set_rope_theta(model: torch.nn.Module, theta: float) -> None:
    """Give a language model another base of its rotary embeddings, as for contexts that it was not trained on.

    Raises:
        ValueError: its embeddings are not the plain rotary ones.
    """
    rotary = next((module for module in model.modules() if hasattr(module, "inv_freq")), None)
    if rotary is None or getattr(rotary, "rope_type", "default") != "default":
        raise ValueError("text.rope_theta is for models with plain rotary embeddings; leave it out")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
    fresh = type(rotary)(model.config).to(rotary.inv_freq.device)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.inv_freq.clone()


def compose_with_projector(
    encoder: str, language_model: str, projector: str, options: Mapping[str, object]
) -> tuple[torch.nn.Module, object]:
    """A new speech LLM with the projector of a trained one, but for its residual; CTC head included; float32."""
    trained, processor = load(projector, device="cpu", dtype="float32")
    same = ("stack_factor", "projector_size", "context_layers", "merge_frames")
    options = {name: getattr(trained.config, name) for name in same} | dict(options)
    model, processor = compose(encoder, language_model, ctc_tokens=processor.ctc_tokens, **options)
    head = {name: value for name, value in trained.projector.state_dict().items() if not name.startswith("residual")}
    model.projector.load_state_dict(head, strict=False)
    return model, processor


def make_material(
    config: DictConfig,
    stages: Sequence[StageConfig],
    model: torch.nn.Module,
    reader: object,
    processes: Processes,
    log: Callable[[str], None],
) -> Material:
    """What the texts of `text` or the recordings and texts of `data` give this process to learn from."""
    seed = config.seed + processes.rank
    if config.text.model and (config.data.pairs or config.data.texts):
        recordings = read_pairs(config.data.pairs, OmegaConf.to_container(config.data.weights))
        texts = read_texts(config.data.texts)
        hours = sum(part.seconds for parts in recordings for part in parts) / 3600
        log(f"{hours:.1f} h of speech in {len(recordings)} recordings; {sum(map(len, texts))} lines of text")
        maker = HeardTextRowMaker(texts, recordings, HeardPrompt(reader))
        return HeardMaterial(model, maker, seed, config.data.workers)
    if config.text.model:
        material = TextMaterial(model, reader, config.text.files, seed)
        log(f"{material.tokens} tokens in {len(material.files)} texts")
        return material
    augment = AugmentConfig(**OmegaConf.to_container(config.augment))
    is_pretrained = pretrained.find(model) is not None
    once = not is_pretrained and can_listen_once(model, stages)
    rows = {bool(stage.lengths) for stage in stages}
    if True in rows and (False in rows or not once):
        raise ValueError(
            "stages: `lengths` is for models that listen (merge: decoder), while their LLM alone trains; give it to "
            "all stages or to none"
        )
    texts, recordings = read_sources(config, model, reader, augment, once, processes, log)
    for source in recordings + texts:
        log(f"{source.name}: {source.hours:.2f} h in {len(source.recordings)} recordings, weight {source.weight}")
    if True in rows:
        return HeardMaterial(model, HeardRowMaker(texts, recordings, reader), seed, config.data.workers)
    corpus = Corpus(recordings + texts, seed, config.data.max_gap_seconds)
    kind = PretrainedMaterial if is_pretrained else SpeechMaterial
    return kind(model, reader, corpus, augment, seed)


def read_sources(
    config: DictConfig,
    model: torch.nn.Module,
    processor: object,
    augment: AugmentConfig,
    once: bool,
    processes: Processes,
    log: Callable[[str], None],
) -> tuple[list[Source], list[Source]]:
    """The texts and the recordings of `data`.

    Args:
        once: the recordings may be listened to before the first step, for what is heard does not change.
    """
    data, weights = config.data, OmegaConf.to_container(config.data.weights)

    def read() -> list[Source]:
        found = read_manifests(data.manifests, weights, processes.device, data.min_match, missing=data.missing, log=log)
        return found + [source for path in data.synthetic for source in read_synthetic(path, weights, processes.device)]

    if data.texts and not once:
        raise ValueError("data.texts is for models that listen (merge: decoder), while their LLM alone trains")
    if once and data.heard and not (data.manifests or data.synthetic):
        recordings = read_heard(Path(data.heard))
    elif once and (data.manifests or data.synthetic):
        kept = Path(data.heard or Path(config.output.dir) / "heard.pt")
        about = {
            "files": [compute_digest(Path(path)) for path in [*data.manifests, *data.synthetic]],
            "filters": [data.min_match, data.missing, sorted(name for name, weight in weights.items() if not weight)],
        }
        recordings = load_or_listen(model, processor, read, about, kept, augment, data.readings, processes, log)
    else:
        recordings = read()
    for source in recordings:
        source.weight = weights.get(source.name, 1.0)
    texts = read_text_sources(data.texts, data.listener_tokenizer, model.listener, weights) if data.texts else []
    return texts, recordings


def compute_digest(path: Path) -> str:
    """SHA-256 of a manifest; of a folder, of its files' names and sizes; for what is neither, its name as it is."""
    if path.is_dir():
        files = sorted(path.iterdir())
        return hashlib.sha256(repr([(file.name, file.stat().st_size) for file in files]).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


def make_validation(
    config: DictConfig, model: torch.nn.Module, processor: object, dtype: torch.dtype
) -> Callable[[StageConfig], dict[str, float]]:
    """A function that measures word error rates, in percent, on the recordings of `validation`."""
    options = config.validation
    rows = read_manifest(options.manifest, source=options.source)
    recordings = take_evenly(join(rows, seconds=options.seconds), options.limit)

    def measure(stage: StageConfig) -> dict[str, float]:
        sparse = stage.mask.sparse if stage.mask else None
        if options.attention:
            sparse = SparseAttentionConfig(**OmegaConf.to_container(options.attention, resolve=True))
        if pretrained.find(model):
            return validate_pretrained(model, processor, recordings, dtype, sparse)
        return validate(model, processor, recordings, dtype, options.batch, with_llm=stage.has_llm_loss, sparse=sparse)

    return measure


def open_tensorboard(folder: Path) -> object:
    """A SummaryWriter for `folder`; raises ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("output.tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(folder)
