"""The training loop: stages that differ in what trains, on which rows, with which losses and attention."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unique_asr.attention.huggingface_training import TrainingAttention
from unique_asr.training.checkpoint import Checkpoint, collect_random_states, restore_random_states
from unique_asr.training.decoders import GraphedDecoder
from unique_asr.training.distributed import Processes
from unique_asr.training.lora import find_language_model
from unique_asr.training.material import Material
from unique_asr.training.parameter_groups import freeze, make_parameter_groups
from unique_asr.training.precision import MasterWeights
from unique_asr.training.stages import StageConfig


@dataclass
class Trainer:
    """Runs stages one after the other; metrics go to `output_dir`/metrics.jsonl."""

    model: PreTrainedModel
    material: Material
    output_dir: Path
    dtype: torch.dtype = torch.bfloat16  # what the model computes in; the optimiser steps float32 weights
    bits: Mapping[str, int] | None = None  # of the stored weights, by name prefix, for stages with `round_last`
    cuda_graphs: bool = True  # of the LLM, in stages with `tokens`
    log_every: int = 20  # steps
    log: Callable[[str], None] = print  # is called with each line for people
    save: Callable[[StageConfig], None] | None = None  # is called every `save_minutes` and at the end of a stage
    save_minutes: float = 5.0
    validate: Callable[[StageConfig], dict[str, float]] | None = None  # measures, word error rates among them
    validate_steps: int | None = None  # between two validations within a stage; one more at its end
    save_best: Callable[[StageConfig], None] | None = None  # is called when a validation was the best so far
    resume: bool = False  # from the checkpoint in `output_dir`, if there is one
    checkpoints: bool = False  # keep one there, every `save_minutes` and at the end of a stage
    processes: Processes = field(default_factory=Processes)
    tensorboard: Any = None  # a SummaryWriter for the same metrics

    def __post_init__(self) -> None:
        self.language_model = find_language_model(self.model)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.best: float | None = None  # word error rate of the best validation
        self.trained: set[str] = set()  # names of all parameters trained so far
        self._steps = 0  # of all stages, for TensorBoard
        self._stages: list[StageConfig] = []
        self._index = 0  # of the stage that runs

    def run(self, stages: Sequence[StageConfig], after_stage: Callable[[StageConfig], None] | None = None) -> None:
        """Run one stage after the other; with `resume`, from where the checkpoint stopped.

        Raises:
            ValueError: the checkpoint or a stage does not fit the model, the material or these stages.
            FloatingPointError: the loss is no longer a number.
        """
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
                self._save_checkpoint(index + 1, 0, 0.0, {}, None)

    def report(self, stage: StageConfig, measures: dict[str, float]) -> None:
        """Log measures of a stage and add them to the metrics."""
        self.log(f"{stage.name}: " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
        self._record({"stage": stage.name, **measures})

    def run_stage(self, stage: StageConfig, checkpoint: Checkpoint | None = None) -> None:
        """Run one stage, from `checkpoint` on if there is one; raises as `run`."""
        groups = make_parameter_groups(self.model, stage)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._check_rounding(stage, trained)
        self.trained |= trained
        masters = MasterWeights(self.model, self.dtype, self.bits if stage.round_last else None)
        # Dense items that share a row need it as well: it keeps them apart without a mask of N x N.
        masked = stage.schedule.masks or stage.pack
        handle = TrainingAttention(self.language_model, stage.schedule.last) if masked else None
        decoder = self.model.get_decoder()
        if stage.checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
            decoder.train()
        try:
            self._step_through(stage, groups, masters, handle, checkpoint)
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
            freeze(self.model)

    def _check_rounding(self, stage: StageConfig, trained: set[str]) -> None:
        if stage.round_last and not self.bits:
            raise ValueError(
                f"stage {stage.name}: round_last rounds to the bits of the stored weights; give output.bits"
            )
        if stage.round_last and any(".lora_" in name for name in trained):
            raise ValueError(f"stage {stage.name}: round_last is not for lora, which is merged before it is stored")

    def _step_through(
        self,
        stage: StageConfig,
        groups: list[dict],
        masters: MasterWeights,
        handle: TrainingAttention | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        """All steps of a stage. `handle` is None where every query of every micro-batch reads everything."""
        trained = [parameter for group in groups for parameter in group["params"]]
        weights = masters.get_float32(trained)
        optimizer = torch.optim.AdamW(
            [{**group, "params": masters.get_float32(group["params"])} for group in groups],
            betas=(0.9, 0.95),
            weight_decay=stage.weight_decay,
            fused=self.model.device.type == "cuda",
        )
        decoder = self._make_graphs(stage, handle)
        began = saved = time.monotonic()
        step, done = 0, 0.0
        totals = {"loss": 0.0, "ctc": 0.0, "llm": 0.0, "seconds": 0.0, "tokens": 0.0}
        if checkpoint and checkpoint.optimizer is not None:
            optimizer.load_state_dict(checkpoint.optimizer)
            step, began, totals = checkpoint.step, began - checkpoint.elapsed, dict(checkpoint.totals)
            done = stage.get_done(step, checkpoint.elapsed)
        masters.give_weights(trained, as_stored=_is_last(stage.round_last, done))
        while done < 1:
            rate = compute_rate(done, stage)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            for _ in range(stage.micro_batches):
                if handle:
                    handle.config = stage.schedule.draw(done)
                mark = handle is not None and handle.config.masks and handle.config.queries == "decoded"
                loss, measures = self.material.compute_loss(stage, decoder, mark)
                (loss / stage.micro_batches).backward()
                for name, value in {"loss": loss.detach(), **measures}.items():
                    totals[name] += value
                del loss  # and its gradient nodes, which belong to this stream: a later capture could not use them
            masters.take_gradients(trained)
            self.processes.average_gradients(weights)
            nn.utils.clip_grad_norm_(weights, stage.clip_norm)
            optimizer.step()
            step += 1
            self._steps += 1
            elapsed = self.processes.share_first(time.monotonic() - began)
            done = stage.get_done(step, elapsed)
            masters.give_weights(trained, as_stored=_is_last(stage.round_last, done))
            if step % self.log_every == 0 or done >= 1:
                count = ((step - 1) % self.log_every + 1) * stage.micro_batches
                self._log_progress(stage, step, done, elapsed, rate, count, totals)
                totals = dict.fromkeys(totals, 0.0)
            if self.validate_steps and step % self.validate_steps == 0 and done < 1:
                with masters.use_float32(), _pause(handle):
                    self._validate(stage)
            if began + elapsed - saved > self.save_minutes * 60:
                with masters.use_float32():
                    if self.save and self.processes.first:
                        self.save(stage)
                    if self.checkpoints:
                        self._save_checkpoint(self._index, step, elapsed, totals, optimizer)
                saved = time.monotonic() if self.processes.count == 1 else began + elapsed

    def _make_graphs(self, stage: StageConfig, handle: TrainingAttention | None) -> GraphedDecoder | None:
        """The LLM as CUDA graphs, where a stage can have them."""
        wanted = self.cuda_graphs and self.model.device.type == "cuda" and stage.tokens and stage.micro_batches == 1
        if not wanted or stage.checkpointing:  # which saves random states, and a capture cannot
            return None
        return GraphedDecoder(self.model.get_decoder(), handle)

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

    def _save_checkpoint(
        self, stage: int, step: int, elapsed: float, totals: dict, optimizer: torch.optim.Optimizer | None
    ) -> None:
        random = self.processes.gather(collect_random_states(self.material))
        if self.processes.first:
            Checkpoint(
                stages=[asdict(each) for each in self._stages],
                stage=stage,
                step=step,
                elapsed=elapsed,
                totals={name: float(value) for name, value in totals.items()},
                best=self.best,
                weights={name: value.data for name, value in self.model.named_parameters() if name in self.trained},
                optimizer=optimizer.state_dict() if optimizer else None,
                random=random,
                all_steps=self._steps,
            ).save(self.output_dir)
        self.processes.wait()

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in checkpoint.weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(f"the checkpoint has a weight {name} that the model lacks: start from the same model")
            parameters[name].data = value.to(parameters[name].device)
        self.trained = set(checkpoint.weights)
        self.best, self._steps = checkpoint.best, checkpoint.all_steps
        restore_random_states(checkpoint.random, self.processes, self.material)
        names = [*(f"stage {stage.name}" for stage in self._stages), "the end"]
        self.log(f"resumed at step {checkpoint.step} of {names[checkpoint.stage]}")

    def _log_progress(
        self, stage: StageConfig, step: int, done: float, elapsed: float, rate: float, count: int, totals: dict
    ) -> None:
        """Report the means of `totals` over `count` micro-batches; raises FloatingPointError for NaN and infinity."""
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
        of = "" if stage.steps is None else f"/{stage.steps}"
        tokens_a_second = means["tokens"] * self.processes.count * step / elapsed
        speed = f"{tokens_a_second:.0f} tokens/s  " if means["tokens"] else ""
        self.log(
            f"{stage.name} {step}{of}  loss {means['loss']:.3f}  ctc {means['ctc']:.3f}"
            f"  llm {means['llm']:.3f}  rate {rate:.2f}"
            f"  {elapsed / step:.3f} s/step  {speed}{elapsed:.0f} s, {left:.0f} s left"
        )
        self._record({"stage": stage.name, "step": step, "elapsed": elapsed, "rate": rate, **means})

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
def _pause(handle: TrainingAttention | None) -> Iterator[None]:
    """The model's own attention within the block."""
    if handle is None:
        yield
        return
    handle.restore()
    try:
        yield
    finally:
        handle.apply()


def _is_last(share: float, done: float) -> bool:
    """Whether a stage is in the `share` of it at its end."""
    return share > 0 and done >= 1 - share


def compute_rate(done: float, stage: StageConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `final_rate`.

    Args:
        done: share of the stage that is over.
    """
    if done < stage.warmup:
        return max(done / stage.warmup, 0.02)
    progress = (done - stage.warmup) / (1 - stage.warmup)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
