"""Where kernels are launched: on the device of their tensors.

Triton launches on the current device of the thread, which need not be theirs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

HERE = nullcontext()


def use_device(tensor: Tensor) -> AbstractContextManager:
    """Make the device of a tensor the current one within the block.

    Nothing is done, in less than a microsecond, for tensors on the CPU or on the current device.
    """
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(tensor.device)


def launch_on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that launches kernels run on the device of its tensors, the first of which tells it."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with use_device(next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))):
            return function(*args, **kwargs)

    return run
