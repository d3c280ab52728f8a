"""The curriculum: stages that differ in what trains, on which lengths, with which losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor

from .augment import AugmentConfig
from .batches import Batch, Batcher
from .corpus import Corpus, log_uniform
from .losses import ctc_loss, language_model_loss
from .positions import PositionBatcher

POSITIONS_A_SECOND = 4.0  # of speech, about


@dataclass
class StageConfig:
    """One stage of the curriculum."""

    name: str
    steps: int
    train: dict[str, float]  # encoder, projector, residual, language_model: those that train, peak learning rates
    seconds: tuple[float, float] = (5.0, 29.0)  # length of the joined items, log-uniform
    windows: int = 64  # encoder windows a micro-batch
    micro_batches: int = 1  # a step
    ctc_weight: float = 1.0
    llm_weight: float = 0.0
    cached: bool = False  # train the LLM on cached positions instead of audio; `windows` half minutes a micro-batch
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

    log: called with each line for people; metrics also go to `output_dir`/metrics.jsonl.
    """

    model: SpeechLLMForConditionalGeneration
    processor: SpeechLLMProcessor
    corpus: Corpus
    augment: AugmentConfig
    output_dir: Path
    seed: int = 0
    autocast: torch.dtype | None = torch.bfloat16
    positions: PositionBatcher | None = None  # for stages with `cached`
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
        fused = self.model.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=stage.weight_decay, fused=fused)
        parameters = [parameter for group in groups for parameter in group["params"]]
        cached = self._cached_batches(stage) if stage.cached else None
        began = saved = time.monotonic()
        step, done = 0, 0.0
        totals = {"loss": 0.0, "ctc": 0.0, "llm": 0.0, "seconds": 0.0, "tokens": 0.0}
        while step < stage.steps and done < 1:
            rate = _rate(done, stage)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            for _ in range(stage.micro_batches):
                with torch.autocast(self.model.device.type, self.autocast, enabled=self.autocast is not None):
                    loss, measures = self._cached_loss(stage, cached) if cached is not None else self._audio_loss(stage)
                (loss / stage.micro_batches).backward()
                for name, value in {"loss": loss.detach(), **measures}.items():
                    totals[name] += value
            nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            elapsed = time.monotonic() - began
            done = max(step / stage.steps, elapsed / (stage.minutes * 60) if stage.minutes else 0.0)
            if step % self.log_every == 0 or step == stage.steps or done >= 1:
                count = ((step - 1) % self.log_every + 1) * stage.micro_batches
                self._progress(stage, step, done, elapsed, rate, count, totals)
                totals = dict.fromkeys(totals, 0.0)
            if self.save and time.monotonic() - saved > self.save_minutes * 60:
                self.save(stage)
                saved = time.monotonic()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _cached_loss(self, stage: StageConfig, batches: Iterator[Batch]) -> tuple[Tensor, dict[str, Tensor | float]]:
        batch = next(batches)
        audio = self._drop(self.positions.embed(batch), stage)
        loss, tokens = language_model_loss(self.model, audio, batch)
        return loss, {"llm": loss.detach(), "tokens": tokens}

    def _cached_batches(self, stage: StageConfig) -> Iterator[Batch]:
        if self.positions is None:
            raise ValueError(f"stage {stage.name}: cached needs data.positions, made with scripts/cache_positions.py")

        def sizes(random: np.random.Generator) -> tuple[int, int]:
            low, high = stage.seconds
            if random.random() < stage.short_share:
                low, high = min(5.0, low), min(29.0, high)
            seconds = log_uniform(random, low, high)
            return round(seconds * POSITIONS_A_SECOND), max(1, round(stage.windows * 30 / seconds))

        return self.positions.batches(sizes, stage.cased_share)

    def _drop(self, audio: Sequence[Tensor], stage: StageConfig) -> list[Tensor]:
        """The positions of each item, some of them zeroed."""
        if not stage.position_dropout:
            return list(audio)
        return [
            embeds * (torch.rand(len(embeds), 1, device=embeds.device) >= stage.position_dropout) for embeds in audio
        ]

    def _audio_loss(self, stage: StageConfig) -> tuple[Tensor, dict[str, Tensor | float]]:
        batch = self.batcher.batch(self._items(stage), transcripts=stage.llm_weight > 0)
        frames_train = {"encoder", "projector"} & set(stage.train)
        with torch.set_grad_enabled(bool(frames_train)):
            frames = self.model.encode_windows(batch.features)
        measures: dict[str, Tensor | float] = {"seconds": batch.seconds}
        loss = frames.logits.new_zeros((), dtype=torch.float32)
        if stage.ctc_weight and frames_train and bool((batch.windows == 1).any()):
            measures["ctc"] = ctc_loss(frames, batch)
            loss = loss + stage.ctc_weight * measures["ctc"]
        if stage.llm_weight:
            with torch.set_grad_enabled(bool(frames_train)):
                positions = self.model.window_positions(frames, batch.spans)
            del frames
            embeds = self.model.embed_positions(positions)
            recording = torch.repeat_interleave(batch.windows)
            counts = torch.zeros_like(batch.windows).index_add_(0, recording, positions.counts.cpu())
            audio = self._drop(embeds.split(counts.tolist()), stage)
            measures["llm"], measures["tokens"] = language_model_loss(self.model, audio, batch)
            loss = loss + stage.llm_weight * measures["llm"]
        if not loss.requires_grad:
            raise ValueError(
                f"stage {stage.name}: nothing to learn from; CTC needs `seconds` below one window and the encoder or"
                " the projector in `train`, the LLM needs `llm_weight`"
            )
        return loss, {name: value.detach() if isinstance(value, Tensor) else value for name, value in measures.items()}

    def _items(self, stage: StageConfig) -> list:
        low, high = stage.seconds
        if self.corpus.random.random() < stage.short_share:
            low, high = min(5.0, low), min(29.0, high)
        windows = self.processor.window_seconds
        if high <= windows:
            lengths = self.corpus.random.uniform(low, high, stage.windows).tolist()
        else:
            seconds = log_uniform(self.corpus.random, low, high)
            lengths = [seconds] * max(1, round(stage.windows * windows / max(seconds, windows)))
        return [self.corpus.item(seconds, stage.cased_share) for seconds in lengths]

    def _parameter_groups(self, stage: StageConfig) -> list[dict]:
        projector = self.model.projector
        residual = list(projector.residual.parameters())
        embeddings = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        parts = {
            "encoder": [p for name, p in self.model.encoder.named_parameters() if "embed_positions" not in name],
            "projector": [p for p in projector.parameters() if all(p is not other for other in residual)],
            "residual": residual,
            # The embedding table stays: the CTC head reads it, and it is stored exactly as it came.
            "language_model": [p for p in self.model.language_model.parameters() if id(p) not in embeddings],
        }
        unknown = set(stage.train) - set(parts)
        if unknown:
            raise ValueError(f"stage {stage.name}: train has unknown parts {sorted(unknown)}; they are {sorted(parts)}")
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        groups = []
        for part, peak in stage.train.items():
            for parameter in parts[part]:
                parameter.requires_grad_(True)
            groups.append({"params": parts[part], "lr": 0.0, "peak": peak})
        return groups

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
