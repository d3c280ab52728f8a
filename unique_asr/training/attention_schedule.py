"""Which attention each micro-batch of a stage trains with: the mode, the budget, and the share that is masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unique_asr.attention.soft_mask import TrainingAttentionConfig


@dataclass(frozen=True)
class AttentionPhase:
    """The attention of a stage until a share of it is over.

    Attributes:
        configs: one for each budget; a masked micro-batch draws one of them, all equally likely.
        share: of the micro-batches that are masked, 0 to 1; the others are dense. A row that is not longer than the
            budget is dense anyway.
        until: share of the stage (of its steps or of its time) at which the phase ends.
    """

    configs: tuple[TrainingAttentionConfig, ...]
    share: float = 1.0
    until: float = 1.0

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> AttentionPhase:
        """Parse `share`, `until` and the fields of TrainingAttentionConfig.from_dict, of which `budget` may be a list.

        Raises ValueError for unknown fields and for shares outside 0 to 1.
        """
        options = dict(options)
        share, until = options.pop("share", 1.0), options.pop("until", 1.0)
        for name, value in (("share", share), ("until", until)):
            if not 0 <= value <= 1:
                raise ValueError(f"attention.{name} is {value}: give a share from 0 to 1")
        budget = options.get("budget")
        each = [{**options, "budget": value} for value in budget] if isinstance(budget, list) else [options]
        if not each:
            raise ValueError("attention.budget is an empty list: give tokens, such as [512, 256]")
        return cls(tuple(TrainingAttentionConfig.from_dict(values) for values in each), share, until)

    @property
    def masks(self) -> bool:
        """Whether any query of any micro-batch is masked."""
        return self.share > 0 and any(config.masks for config in self.configs)


@dataclass(frozen=True)
class AttentionSchedule:
    """The phases of a stage, in order of time."""

    phases: tuple[AttentionPhase, ...]

    @classmethod
    def from_options(cls, options: dict[str, Any] | Sequence[dict[str, Any]] | None) -> AttentionSchedule:
        """From a stage's `attention`: None (dense), the options of one phase, or a list of them with rising `until`."""
        if options is None:
            options = {"mode": "dense"}
        phases = [AttentionPhase.from_dict(each) for each in ([options] if isinstance(options, dict) else options)]
        ends = [phase.until for phase in phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(f"attention.until is {ends}: give each phase a later end, and 1 to the last")
        if len({config.sparse.page_size for phase in phases for config in phase.configs}) > 1:
            raise ValueError("attention.page_size differs between the phases of a stage: give one")
        return cls(tuple(phases))

    @property
    def masks(self) -> bool:
        """Whether any query of any micro-batch is masked."""
        return any(phase.masks for phase in self.phases)

    @property
    def last(self) -> TrainingAttentionConfig:
        """What the trained model is to decode with: the first budget of the last phase that masks, if any does."""
        return next((phase for phase in reversed(self.phases) if phase.masks), self.phases[-1]).configs[0]

    def draw(self, done: float) -> TrainingAttentionConfig:
        """The attention of the next micro-batch, by torch's random numbers of the CPU where there is a choice.

        Args:
            done: share of the stage that is over.
        """
        phase = next((phase for phase in self.phases if done < phase.until), self.phases[-1])
        config = phase.configs[0]
        if phase.share < 1 and torch.rand(()).item() >= phase.share:
            return replace(config, mode="dense")
        if len(phase.configs) > 1:
            config = phase.configs[int(torch.randint(len(phase.configs), ()))]
        if config.mode == "soft" and done >= 1 - config.hard_last:
            return replace(config, mode="hard")
        return config
