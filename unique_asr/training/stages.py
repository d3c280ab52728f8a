"""What a stage of training may be told: what trains, on which rows, for how long, with which losses and attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unique_asr.attention.soft_mask import TrainingAttentionConfig
from unique_asr.training.attention_schedule import AttentionSchedule


@dataclass
class StageConfig:
    """One stage of the curriculum. Shares are from 0 to 1."""

    name: str
    steps: int | None  # None: `minutes` alone ends the stage
    train: dict[str, float]  # encoder, projector, residual, language_model, lora, encoder.layers.5 ...: peak rates
    frozen_layers: int = 0  # of the LLM, the first ones, whatever `train` says

    # Rows: of items that are joined to some seconds, or, without audio (texts, what was heard), of a number of tokens
    seconds: tuple[float, float] = (5.0, 29.0)  # length of the joined items, log-uniform
    windows: int = 64  # encoder windows a micro-batch
    micro_batches: int = 1  # a step
    tokens: int = 0  # of a micro-batch of the LLM, in rows of a power of two that fit the items; replaces `windows`
    pack: bool = False  # with `tokens`: one row of them all, items one after the other, each seeing only itself
    lengths: list[int] = field(default_factory=list)  # tokens; all rows of a micro-batch have one of these, at random
    recorded_share: float = 0.3  # with `lengths`: of the rows that are of recordings, not of texts, if there are both
    hotwords_share: float = 0.0  # with `data.pairs` or texts of a language model: of the rows that have hotwords
    short_share: float = 0.0  # share of the micro-batches with items of one window, whatever `seconds` says

    # Losses, and what makes them harder
    ctc_weight: float = 1.0
    llm_weight: float = 0.0  # with `lengths` the LLM's loss is the only one, whatever this is
    cased_share: float = 0.5  # of the items; the transcripts of the rest are lower case without punctuation
    position_dropout: float = 0.0  # share of the LLM's audio positions that are zeroed
    slips: float = 0.0  # share of the tokens that are wrong among those that the LLM reads of its own transcript
    slips_share: float = 1.0  # of the items that have such slips

    # Attention of the LLM: fields of TrainingAttentionConfig and SparseAttentionConfig, `budget` one or a list, and
    # `share`, of the micro-batches that are masked. Or a list of such phases, each with `until`, the share of the stage
    # at which it ends.
    attention: dict[str, Any] | list[dict[str, Any]] | None = None
    checkpointing: bool = False  # compute the LLM's activations again in the backward pass: less memory, more time

    # Schedule
    minutes: float | None = None  # the stage ends after this time at the latest, its schedule with it
    warmup: float = 0.05  # share of the stage
    final_rate: float = 0.05  # of the peak learning rate
    round_last: float = 0.0  # share of the stage, at its end, that computes with the weights as they will be stored
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError(f"stage {self.name}: nothing ends it; give `steps` or `minutes`")
        if self.pack and not self.tokens:
            raise ValueError(f"stage {self.name}: pack needs `tokens`, the length of the row that items share")
        if self.lengths and (min(self.lengths) < 1 or self.pack):
            raise ValueError(f"stage {self.name}: lengths is {self.lengths}; give tokens of a row, and no `pack`")
        for name in ("recorded_share", "hotwords_share", "short_share", "cased_share", "position_dropout", "slips",
                     "slips_share", "round_last"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"stage {self.name}: {name} is {getattr(self, name)}; give a share from 0 to 1")
        _ = self.schedule  # is checked here, before anything is loaded

    @property
    def trains_frames(self) -> bool:
        """Whether what is heard changes with the steps."""
        return any(part.startswith(("encoder", "projector")) for part in self.train)

    @property
    def has_llm_loss(self) -> bool:
        """Whether the LLM's transcripts are part of the loss."""
        return self.llm_weight > 0 or bool(self.lengths)

    @cached_property
    def schedule(self) -> AttentionSchedule:
        """`attention`, parsed."""
        return AttentionSchedule.from_options(self.attention)

    @property
    def mask(self) -> TrainingAttentionConfig | None:
        """The mask that the trained model is made for; None if every query reads everything."""
        return self.schedule.last if self.schedule.masks else None

    def get_done(self, step: int, elapsed: float) -> float:
        """Share of the stage that is over after `step` steps in `elapsed` seconds; 1 or more ends it."""
        of_steps = 0.0 if self.steps is None else step / self.steps
        return max(of_steps, elapsed / (self.minutes * 60) if self.minutes else 0.0)
