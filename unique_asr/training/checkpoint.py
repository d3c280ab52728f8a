"""A checkpoint: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unique_asr.training.distributed import Processes
from unique_asr.training.material import Material
from unique_asr.training.stages import StageConfig

FILE = "checkpoint.pt"


@dataclass
class Checkpoint:
    """The state of a run between two steps."""

    stages: list[dict[str, Any]]  # what the run was to do
    stage: int  # index of the stage that goes on
    step: int  # steps of it that are done
    elapsed: float  # its seconds so far
    totals: dict[str, float]  # of measures since the last line of the log
    best: float | None  # word error rate of the best model so far
    weights: dict[str, Tensor]  # float32, of all parameters that were trained so far, by name
    optimizer: dict[str, Any] | None  # None at the start of a stage
    random: list[dict[str, Any]]  # of each process
    all_steps: int = 0  # of all stages so far

    def save(self, folder: Path) -> None:
        """Write it to `folder`/checkpoint.pt; a crash while writing leaves the former one."""
        path = folder / FILE
        torch.save(vars(self), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    @classmethod
    def load(cls, folder: Path, stages: list[StageConfig]) -> Checkpoint | None:
        """Read `folder`/checkpoint.pt; None if there is none.

        Raises ValueError if it cannot be read or was made with other stages than these.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = cls(**torch.load(path, map_location="cpu", weights_only=False))
        except Exception as error:
            raise ValueError(f"{path}: not a checkpoint ({error}); remove it or give another output.dir") from None
        defaults = {  # of options that came later
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in fields(StageConfig)
        }
        if [{**defaults, **stage} for stage in found.stages] != [asdict(stage) for stage in stages]:
            raise ValueError(f"{path}: made with other stages; give the same, another output.dir, or resume=false")
        return found


def collect_random_states(material: Material) -> dict[str, Any]:
    """The states of all random number generators of this process, for `restore_random_states`."""
    return {
        "material": material.collect_random_states(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: list[dict[str, Any]], processes: Processes, material: Material) -> None:
    """Put this process's generators into its state among `states`.

    Raises ValueError if there was another number of processes.
    """
    if len(states) != processes.count:
        raise ValueError(f"the checkpoint is of {len(states)} processes, not {processes.count}: start as many")
    state = states[processes.rank]
    material.restore_random_states(state["material"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
