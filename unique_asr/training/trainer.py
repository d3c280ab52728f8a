"""The curriculum: stages that differ in what trains, on which lengths, with which losses."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor

from .augment import AugmentConfig
from .batches import Batcher
from .corpus import Corpus, Item, log_uniform
from .graphs import GraphedDecoder
from .losses import ctc_loss, language_model_loss
from .precision import MasterWeights

TOKENS_A_SECOND = 9.0  # of fast speech: the LLM's positions and the transcript together


@dataclass
class StageConfig:
    """One stage of the curriculum."""

    name: str
    steps: int
    train: dict[str, float]  # encoder, projector, residual, language_model, encoder.layers.5 ...: peak learning rates
    seconds: tuple[float, float] = (5.0, 29.0)  # length of the joined items, log-uniform
    windows: int = 64  # encoder windows a micro-batch
    micro_batches: int = 1  # a step
    ctc_weight: float = 1.0
    llm_weight: float = 0.0
    tokens: int = 0  # of a micro-batch of the LLM, in rows of a power of two that fit the items; replaces `windows`
    short_share: float = 0.0  # share of the micro-batches with items of one window, whatever `seconds` says
    cased_share: float = 0.5  # of the items; the transcripts of the rest are lower case without punctuation
    position_dropout: float = 0.0  # share of the LLM's audio positions that are zeroed
    warmup: float = 0.05  # share of the stage
    final_rate: float = 0.05  # of the peak learning rate
    minutes: float | None = None  # the stage ends after this time at the latest, its schedule with it
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclass
class Trainer:
    """Runs stages one after the other.

    dtype: what the model computes in; the weights that the optimiser steps are float32. log: called with each line for
    people; metrics also go to `output_dir`/metrics.jsonl.
    """

    model: SpeechLLMForConditionalGeneration
    processor: SpeechLLMProcessor
    corpus: Corpus
    augment: AugmentConfig
    output_dir: Path
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    cuda_graphs: bool = True  # of the LLM, in stages with `tokens`
    log_every: int = 20
    log: Callable[[str], None] = print
    save: Callable[[StageConfig], None] | None = None  # called every `save_minutes` and at the end of a stage
    save_minutes: float = 5.0
    batcher: Batcher = field(init=False)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.model, self.processor, self.augment, self.seed)
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[StageConfig], after_stage: Callable[[StageConfig], None] | None = None) -> None:
        for stage in stages:
            self.run_stage(stage)
            if self.save:
                self.save(stage)
            if after_stage:
                after_stage(stage)

    def report(self, stage: StageConfig, measures: dict[str, float]) -> None:
        self.log(f"{stage.name}: " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
        self._record({"stage": stage.name, **measures})

    def run_stage(self, stage: StageConfig) -> None:
        """Raises FloatingPointError if the loss is no longer a number."""
        groups = self._parameter_groups(stage)
        trained = [parameter for group in groups for parameter in group["params"]]
        masters = MasterWeights(self.model, self.dtype)
        try:
            self._run_stage(stage, groups, trained, masters)
        finally:
            masters.close()
            gc.collect()  # captured graphs hold gigabytes in cycles
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)

    def _run_stage(
        self, stage: StageConfig, groups: list[dict], trained: list[nn.Parameter], masters: MasterWeights
    ) -> None:
        weights = masters.of(trained)
        optimizer = torch.optim.AdamW(
            [{**group, "params": masters.of(group["params"])} for group in groups],
            betas=(0.9, 0.95),
            weight_decay=stage.weight_decay,
            fused=self.model.device.type == "cuda",
        )
        graphs = self.cuda_graphs and self.model.device.type == "cuda" and stage.tokens and stage.micro_batches == 1
        decoder = GraphedDecoder(self.model.get_decoder()) if graphs else None
        began = saved = time.monotonic()
        step, done = 0, 0.0
        totals = {"loss": 0.0, "ctc": 0.0, "llm": 0.0, "seconds": 0.0, "tokens": 0.0}
        while step < stage.steps and done < 1:
            rate = _rate(done, stage)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            for _ in range(stage.micro_batches):
                loss, measures = self._loss(stage, decoder)
                (loss / stage.micro_batches).backward()
                for name, value in {"loss": loss.detach(), **measures}.items():
                    totals[name] += value
            masters.take_gradients(trained)
            nn.utils.clip_grad_norm_(weights, stage.clip_norm)
            optimizer.step()
            masters.give_weights(trained)
            step += 1
            elapsed = time.monotonic() - began
            done = max(step / stage.steps, elapsed / (stage.minutes * 60) if stage.minutes else 0.0)
            if step % self.log_every == 0 or step == stage.steps or done >= 1:
                count = ((step - 1) % self.log_every + 1) * stage.micro_batches
                self._progress(stage, step, done, elapsed, rate, count, totals)
                totals = dict.fromkeys(totals, 0.0)
            if self.save and time.monotonic() - saved > self.save_minutes * 60:
                with masters.restored():
                    self.save(stage)
                saved = time.monotonic()

    def _drop(self, audio: Sequence[Tensor], stage: StageConfig) -> list[Tensor]:
        """The positions of each item, some of them zeroed."""
        if not stage.position_dropout:
            return list(audio)
        return [
            embeds * (torch.rand(len(embeds), 1, device=embeds.device) >= stage.position_dropout) for embeds in audio
        ]

    def _loss(self, stage: StageConfig, decoder: GraphedDecoder | None) -> tuple[Tensor, dict[str, Tensor | float]]:
        items, shape = self._items(stage)
        batch = self.batcher.batch(items, transcripts=stage.llm_weight > 0)
        frames_train = any(part.startswith(("encoder", "projector")) for part in stage.train)
        with torch.set_grad_enabled(frames_train):
            frames = self.model.encode_windows(batch.features)
        measures: dict[str, Tensor | float] = {"seconds": batch.seconds}
        loss = frames.logits.new_zeros((), dtype=torch.float32)
        if stage.ctc_weight and frames_train and bool((batch.windows == 1).any()):
            measures["ctc"] = ctc_loss(frames, batch)
            loss = loss + stage.ctc_weight * measures["ctc"]
        if stage.llm_weight:
            with torch.set_grad_enabled(frames_train):
                positions = self.model.window_positions(frames, batch.spans)
            del frames
            embeds = self.model.embed_positions(positions)
            recording = torch.repeat_interleave(batch.windows)
            counts = torch.zeros_like(batch.windows).index_add_(0, recording, positions.counts.cpu())
            audio = self._drop(embeds.split(counts.tolist()), stage)
            measures["llm"], measures["tokens"] = language_model_loss(self.model, audio, batch, shape, decoder)
            loss = loss + stage.llm_weight * measures["llm"]
        if not loss.requires_grad:
            raise ValueError(
                f"stage {stage.name}: nothing to learn from; CTC needs `seconds` below one window and the encoder or"
                " the projector in `train`, the LLM needs `llm_weight`"
            )
        return loss, {name: value.detach() if isinstance(value, Tensor) else value for name, value in measures.items()}

    def _items(self, stage: StageConfig) -> tuple[list[Item], tuple[int, int] | None]:
        """The items of a micro-batch, and the rows and length that the LLM is given."""
        low, high = stage.seconds
        if self.corpus.random.random() < stage.short_share:
            low, high = min(5.0, low), min(29.0, high)
        windows = self.processor.window_seconds
        seconds, shape = log_uniform(self.corpus.random, low, high), None
        if stage.tokens:
            length = min(2 ** math.ceil(math.log2(seconds * TOKENS_A_SECOND)), stage.tokens)
            rows, longest = stage.tokens // length, min(length / TOKENS_A_SECOND, high)
            lengths = self.corpus.random.uniform(max(longest / 2, low), longest, rows).tolist()
            shape = rows, length
        elif high <= windows:
            lengths = self.corpus.random.uniform(low, high, stage.windows).tolist()
        else:
            lengths = [seconds] * max(1, round(stage.windows * windows / max(seconds, windows)))
        return [self.corpus.item(seconds, stage.cased_share) for seconds in lengths], shape

    def _parameter_groups(self, stage: StageConfig) -> list[dict]:
        """Groups of an optimiser; everything else is frozen."""
        embeddings = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        prefixes = {part: "projector.residual" if part == "residual" else part for part in stage.train}
        groups = {part: {"params": [], "lr": 0.0, "peak": peak} for part, peak in stage.train.items()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            # The embedding table stays: the CTC head reads it, and it is stored exactly as it came.
            if id(parameter) in embeddings or "embed_positions" in name:
                continue
            found = [part for part, prefix in prefixes.items() if name.startswith(prefix + ".")]
            if name.startswith("projector.residual."):
                found = [part for part in found if part == "residual"]
            if found:
                parameter.requires_grad_(True)
                groups[max(found, key=lambda part: len(prefixes[part]))]["params"].append(parameter)
        unknown = [part for part, group in groups.items() if not group["params"]]
        if unknown:
            raise ValueError(
                f"stage {stage.name}: train has unknown parts {unknown}; give encoder, projector, residual, "
                "language_model, or how the names of some weights begin, such as encoder.layers.5"
            )
        return list(groups.values())

    def _progress(
        self, stage: StageConfig, step: int, done: float, elapsed: float, rate: float, count: int, totals: dict
    ) -> None:
        means = {name: float(value) / count for name, value in totals.items()}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"stage {stage.name}: the loss is {means['loss']} near step {step}")
        left = elapsed * (1 - done) / max(done, 1e-9)
        self.log(
            f"{stage.name} {step}/{stage.steps}  loss {means['loss']:.3f}  ctc {means['ctc']:.3f}"
            f"  llm {means['llm']:.3f}  rate {rate:.2f}"
            f"  {elapsed / step:.3f} s/step  {elapsed:.0f} s, {left:.0f} s left"
        )
        self._record({"stage": stage.name, "step": step, "elapsed": elapsed, "rate": rate, **means})

    def _record(self, row: dict) -> None:
        with (self.output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _rate(done: float, stage: StageConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `final_rate`."""
    if done < stage.warmup:
        return max(done / stage.warmup, 0.02)
    progress = (done - stage.warmup) / (1 - stage.warmup)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
