"""Everything that a run needs to go on as if it had never stopped: weights, optimiser, random numbers, place."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unique_asr.training.distributed import Processes

if TYPE_CHECKING:
    from unique_asr.training.trainer import Material

FILE = "checkpoint.pt"


@dataclass
class Checkpoint:
    """A place between two steps. weights: float32, of all parameters that were trained so far, by name."""

    stages: list[dict[str, Any]]  # what the run was to do
    stage: int  # index of the stage that goes on
    step: int  # steps of it that are done
    elapsed: float  # its seconds so far
    totals: dict[str, float]  # of measures since the last line of the log
    best: float | None  # word error rate of the best model so far
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None  # None at the start of a stage
    random: list[dict[str, Any]]  # of each process

    def save(self, folder: Path) -> None:
        """A crash while writing leaves the former checkpoint."""
        path = folder / FILE
        torch.save(vars(self), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    @classmethod
    def load(cls, folder: Path, stages: list[Any]) -> Checkpoint | None:
        """None if the folder has none. Raises ValueError if it belongs to other stages than these."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = cls(**torch.load(path, map_location="cpu", weights_only=False))
        except Exception as error:
            raise ValueError(f"{path}: not a checkpoint ({error}); remove it or give another output.dir") from None
        defaults = {each.name: each.default for stage in stages for each in fields(stage)}  # of options that came later
        if [{**defaults, **stage} for stage in found.stages] != [asdict(stage) for stage in stages]:
            raise ValueError(f"{path}: made with other stages; give the same, another output.dir, or resume=false")
        return found


def collect_random_states(material: Material) -> dict[str, Any]:
    """The states of all random numbers of this process."""
    return {
        "material": material.collect_random_states(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: list[dict[str, Any]], processes: Processes, material: Material) -> None:
    """Raises ValueError if the run had another number of processes."""
    if len(states) != processes.count:
        raise ValueError(f"the checkpoint is of {len(states)} processes, not {processes.count}: start as many")
    state = states[processes.rank]
    material.restore_random_states(state["material"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
