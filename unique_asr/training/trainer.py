"""The curriculum: stages that differ in what trains, on which lengths, with which losses."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unique_asr.attention.soft_mask import TrainingAttention, TrainingAttentionConfig
from unique_asr.training.checkpoint import Checkpoint, collect_random_states, restore_random_states
from unique_asr.training.decoders import GraphedDecoder
from unique_asr.training.distributed import Processes
from unique_asr.training.lora import PART as LORA
from unique_asr.training.lora import language_model, parts
from unique_asr.training.precision import MasterWeights


@dataclass
class StageConfig:
    """One stage of the curriculum."""

    name: str
    steps: int
    train: dict[str, float]  # encoder, projector, residual, language_model, lora, encoder.layers.5 ...: peak rates
    seconds: tuple[float, float] = (5.0, 29.0)  # length of the joined items, log-uniform
    windows: int = 64  # encoder windows a micro-batch
    micro_batches: int = 1  # a step
    ctc_weight: float = 1.0
    llm_weight: float = 0.0
    tokens: int = 0  # of a micro-batch of the LLM, in rows of a power of two that fit the items; replaces `windows`
    pack: bool = False  # with `tokens`: one row of them all, items one after the other, each seeing only itself
    length: int = 0  # tokens of a row, where the LLM learns from texts alone
    short_share: float = 0.0  # share of the micro-batches with items of one window, whatever `seconds` says
    cased_share: float = 0.5  # of the items; the transcripts of the rest are lower case without punctuation
    position_dropout: float = 0.0  # share of the LLM's audio positions that are zeroed
    slips: float = 0.0  # share of the tokens that are wrong among those that the LLM reads of its own transcript
    warmup: float = 0.05  # share of the stage
    final_rate: float = 0.05  # of the peak learning rate
    minutes: float | None = None  # the stage ends after this time at the latest, its schedule with it
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    attention: dict[str, Any] | None = None  # the LLM's: fields of TrainingAttentionConfig and SparseAttentionConfig
    checkpointing: bool = False  # compute the LLM's activations again in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        if self.pack and not self.tokens:
            raise ValueError(f"stage {self.name}: pack needs `tokens`, the length of the row that items share")

    @property
    def trains_frames(self) -> bool:
        """Whether what is heard changes with the steps."""
        return any(part.startswith(("encoder", "projector")) for part in self.train)

    def training_attention(self) -> TrainingAttentionConfig | None:
        """None if every query reads everything."""
        found = self.attention_config()
        return found if found.masks else None

    def attention_config(self) -> TrainingAttentionConfig:
        return TrainingAttentionConfig.from_dict({"mode": "dense"} if self.attention is None else self.attention)


class Material(Protocol):
    """What a model learns from: `SpeechMaterial`, `PretrainedMaterial`, `TextMaterial`."""

    def compute_loss(
        self, stage: StageConfig, decoder: GraphedDecoder | None, mark_decoded: bool
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Of a new micro-batch, and measures of it; mark_decoded: tell the LLM which tokens inference decodes."""

    def collect_random_states(self) -> dict[str, Any]: ...

    def restore_random_states(self, states: dict[str, Any]) -> None: ...

    def clear_drawn(self) -> None:
        """The losses so far were numbers."""

    def describe(self) -> list[Any]:
        """What was drawn since `clear_drawn`."""


@dataclass
class Trainer:
    """Runs stages one after the other.

    dtype: what the model computes in; the weights that the optimiser steps are float32. log: called with each line for
    people; metrics also go to `output_dir`/metrics.jsonl.
    """

    model: PreTrainedModel
    material: Material
    output_dir: Path
    dtype: torch.dtype = torch.bfloat16
    cuda_graphs: bool = True  # of the LLM, in stages with `tokens`
    log_every: int = 20
    log: Callable[[str], None] = print
    save: Callable[[StageConfig], None] | None = None  # called every `save_minutes` and at the end of a stage
    save_minutes: float = 5.0
    validate: Callable[[StageConfig], dict[str, float]] | None = None  # measures, word error rates among them
    validate_steps: int | None = None  # between two validations within a stage; one more at its end
    save_best: Callable[[StageConfig], None] | None = None  # called when a validation was the best so far
    resume: bool = False  # from the checkpoint in `output_dir`, if there is one
    checkpoints: bool = False  # keep one there, every `save_minutes` and at the end of a stage
    processes: Processes = field(default_factory=Processes)
    tensorboard: Any = None  # a SummaryWriter for the same metrics

    def __post_init__(self) -> None:
        self.language_model, self._parts = language_model(self.model), parts(self.model)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.best: float | None = None
        self._moved: set[str] = set()  # names of all parameters trained so far
        self._steps = 0  # of all stages, for TensorBoard
        self._stages: list[StageConfig] = []
        self._index = 0  # of the stage that runs

    def run(self, stages: Sequence[StageConfig], after_stage: Callable[[StageConfig], None] | None = None) -> None:
        """One stage after the other; with `resume`, from where the checkpoint stopped."""
        self._stages = list(stages)
        checkpoint = Checkpoint.load(self.output_dir, self._stages) if self.resume else None
        if checkpoint:
            self._restore(checkpoint)
        for index, stage in enumerate(self._stages):
            if checkpoint and index < checkpoint.stage:
                continue
            self._index = index
            self.run_stage(stage, checkpoint if checkpoint and checkpoint.stage == index else None)
            if self.save and self.processes.first:
                self.save(stage)
            self._validate(stage)
            if after_stage:
                after_stage(stage)
            if self.checkpoints:
                self._checkpoint(index + 1, 0, 0.0, {}, None)

    def report(self, stage: StageConfig, measures: dict[str, float]) -> None:
        self.log(f"{stage.name}: " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
        self._record({"stage": stage.name, **measures})

    def run_stage(self, stage: StageConfig, checkpoint: Checkpoint | None = None) -> None:
        """Raises FloatingPointError if the loss is no longer a number."""
        # Dense items that share a row need it as well: it keeps them apart without a mask of N x N.
        attention = stage.attention_config() if stage.pack else stage.training_attention()
        groups = self._parameter_groups(stage)
        trained = [parameter for group in groups for parameter in group["params"]]
        self._moved |= {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        masters = MasterWeights(self.model, self.dtype)
        handle = TrainingAttention(self.language_model, attention) if attention else None
        decoder = self.model.get_decoder()
        if stage.checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
            decoder.train()
        try:
            self._run_stage(stage, groups, trained, masters, handle, checkpoint)
        finally:
            masters.close()
            if handle:
                handle.restore()
            if stage.checkpointing:
                decoder.gradient_checkpointing_disable()
                decoder.eval()
            gc.collect()  # captured graphs hold gigabytes in cycles
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)

    def _run_stage(
        self,
        stage: StageConfig,
        groups: list[dict],
        trained: list[nn.Parameter],
        masters: MasterWeights,
        handle: TrainingAttention | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        weights = masters.of(trained)
        optimizer = torch.optim.AdamW(
            [{**group, "params": masters.of(group["params"])} for group in groups],
            betas=(0.9, 0.95),
            weight_decay=stage.weight_decay,
            fused=self.model.device.type == "cuda",
        )
        graphs = self.cuda_graphs and self.model.device.type == "cuda" and stage.tokens and stage.micro_batches == 1
        graphs = graphs and not stage.checkpointing  # which saves random states, and a capture cannot
        decoder = GraphedDecoder(self.model.get_decoder(), handle) if graphs else None
        began = saved = time.monotonic()
        step, done = 0, 0.0
        totals = {"loss": 0.0, "ctc": 0.0, "llm": 0.0, "seconds": 0.0, "tokens": 0.0}
        mark = handle is not None and handle.config.queries == "decoded"
        if checkpoint and checkpoint.optimizer is not None:
            optimizer.load_state_dict(checkpoint.optimizer)
            step, began, totals = checkpoint.step, began - checkpoint.elapsed, dict(checkpoint.totals)
            done = _done(step, checkpoint.elapsed, stage)
        while step < stage.steps and done < 1:
            rate = _rate(done, stage)
            if handle and done >= 1 - handle.config.hard_last and handle.config.mode == "soft":
                handle.config = replace(handle.config, mode="hard")
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            for _ in range(stage.micro_batches):
                loss, measures = self.material.compute_loss(stage, decoder, mark)
                (loss / stage.micro_batches).backward()
                for name, value in {"loss": loss.detach(), **measures}.items():
                    totals[name] += value
                del loss  # and its gradient nodes, which belong to this stream: a later capture could not use them
            masters.take_gradients(trained)
            self.processes.average_gradients(weights)
            nn.utils.clip_grad_norm_(weights, stage.clip_norm)
            optimizer.step()
            masters.give_weights(trained)
            step += 1
            self._steps += 1
            elapsed = self.processes.share_first(time.monotonic() - began)
            done = _done(step, elapsed, stage)
            if step % self.log_every == 0 or step == stage.steps or done >= 1:
                count = ((step - 1) % self.log_every + 1) * stage.micro_batches
                self._progress(stage, step, done, elapsed, rate, count, totals)
                totals = dict.fromkeys(totals, 0.0)
            if self.validate_steps and step % self.validate_steps == 0 and step < stage.steps and done < 1:
                with masters.restored(), _without(handle):
                    self._validate(stage)
            if began + elapsed - saved > self.save_minutes * 60:
                with masters.restored():
                    if self.save and self.processes.first:
                        self.save(stage)
                    if self.checkpoints:
                        self._checkpoint(self._index, step, elapsed, totals, optimizer)
                saved = time.monotonic() if self.processes.count == 1 else began + elapsed

    def _validate(self, stage: StageConfig) -> None:
        """Report the measures, and keep the best model by the most demanding word error rate that is measured."""
        if self.validate is None:
            return
        random = torch.get_rng_state()
        if self.processes.first:
            measures = self.validate(stage)
            self.report(stage, measures)
            rate = next((measures[name] for name in ("sparse", "llm", "ctc") if name in measures), None)
            if rate is not None and (self.best is None or rate < self.best):
                self.best = rate
                if self.save_best:
                    self.save_best(stage)
        torch.set_rng_state(random)
        self.processes.wait()

    def _checkpoint(
        self, stage: int, step: int, elapsed: float, totals: dict, optimizer: torch.optim.Optimizer | None
    ) -> None:
        random = self.processes.gather(collect_random_states(self.material))
        if self.processes.first:
            weights = {name: value.data for name, value in self.model.named_parameters() if name in self._moved}
            totals = {name: float(value) for name, value in totals.items()}
            state = optimizer.state_dict() if optimizer else None
            stages = [asdict(each) for each in self._stages]
            Checkpoint(stages, stage, step, elapsed, totals, self.best, weights, state, random).save(self.output_dir)
        self.processes.wait()

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in checkpoint.weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(f"the checkpoint has a weight {name} that the model lacks: start from the same model")
            parameters[name].data = value.to(parameters[name].device)
        self._moved = set(checkpoint.weights)
        self.best = checkpoint.best
        self._steps = sum(stage.steps for stage in self._stages[: checkpoint.stage]) + checkpoint.step
        restore_random_states(checkpoint.random, self.processes, self.material)
        names = [*(f"stage {stage.name}" for stage in self._stages), "the end"]
        self.log(f"resumed at step {checkpoint.step} of {names[checkpoint.stage]}")

    def _parameter_groups(self, stage: StageConfig) -> list[dict]:
        """Groups of an optimiser; everything else is frozen."""
        embeddings = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        prefixes = {part: self._prefixes(part) for part in stage.train}
        groups = {part: {"params": [], "lr": 0.0, "peak": peak} for part, peak in stage.train.items()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            # The embedding table stays: the CTC head reads it, and it is stored exactly as it came.
            if id(parameter) in embeddings or "embed_positions" in name:
                continue
            found = [part for part, prefix in prefixes.items() if name.startswith(prefix)]
            if ".lora_" in name:
                found = [part for part in stage.train if part == LORA]
            if name.startswith("projector.residual."):
                found = [part for part in found if part == "residual"]
            if found:
                parameter.requires_grad_(True)
                groups[max(found, key=lambda part: len(prefixes[part][0]))]["params"].append(parameter)
        unknown = [part for part, group in groups.items() if not group["params"]]
        if unknown:
            raise ValueError(
                f"stage {stage.name}: train has unknown parts {unknown}; give {', '.join(self._parts)}, lora (if "
                "`lora` is set), or how the names of some weights begin, such as language_model.layers.5"
            )
        return list(groups.values())

    def _prefixes(self, part: str) -> tuple[str, ...]:
        """How the names of a part's weights begin; encoder.layers.5 are layers of what the model calls otherwise."""
        head, _, rest = part.partition(".")
        return tuple(f"{begin}{rest}." if rest else begin for begin in self._parts.get(head, (f"{head}.",)))

    def _progress(
        self, stage: StageConfig, step: int, done: float, elapsed: float, rate: float, count: int, totals: dict
    ) -> None:
        means = {name: float(value) / count for name, value in totals.items()}
        if not math.isfinite(means["loss"]):
            path = self.output_dir / f"not_a_number_{self.processes.rank}.json"
            drawn = {"stage": stage.name, "step": step, "items": self.material.describe()}
            path.write_text(json.dumps(drawn, indent=1) + "\n")
            raise FloatingPointError(
                f"stage {stage.name}: the loss is {means['loss']} near step {step}; the items of the steps since the "
                f"last line are in {path}"
            )
        self.material.clear_drawn()
        left = elapsed * (1 - done) / max(done, 1e-9)
        if not self.processes.first:
            return
        self.log(
            f"{stage.name} {step}/{stage.steps}  loss {means['loss']:.3f}  ctc {means['ctc']:.3f}"
            f"  llm {means['llm']:.3f}  rate {rate:.2f}"
            f"  {elapsed / step:.3f} s/step  {self._speed(means, elapsed / step)}{elapsed:.0f} s, {left:.0f} s left"
        )
        self._record({"stage": stage.name, "step": step, "elapsed": elapsed, "rate": rate, **means})

    def _speed(self, means: dict, seconds: float) -> str:
        """Tokens that the LLMs of all processes read a second, if they read any."""
        return f"{means['tokens'] * self.processes.count / seconds:.0f} tokens/s  " if means["tokens"] else ""

    def _record(self, row: dict) -> None:
        if not self.processes.first:
            return
        if self.tensorboard:
            for name, value in row.items():
                if isinstance(value, float | int) and name != "step":
                    self.tensorboard.add_scalar(f"{row['stage']}/{name}", value, self._steps)
        with (self.output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def _without(handle: TrainingAttention | None) -> Iterator[None]:
    """The model's own attention within the block."""
    if handle is None:
        yield
        return
    handle.restore()
    try:
        yield
    finally:
        handle.apply()


def _done(step: int, elapsed: float, stage: StageConfig) -> float:
    """Share of the stage that is over."""
    return max(step / stage.steps, elapsed / (stage.minutes * 60) if stage.minutes else 0.0)


def _rate(done: float, stage: StageConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `final_rate`."""
    if done < stage.warmup:
        return max(done / stage.warmup, 0.02)
    progress = (done - stage.warmup) / (1 - stage.warmup)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
