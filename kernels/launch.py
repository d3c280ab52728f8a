"""Where kernels are launched: on the device of their tensors.

Triton launches on the current device of the thread, which need not be theirs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def use_device(tensor: Tensor) -> AbstractContextManager:
    """Make the device of a tensor the current one within the block; nothing changes for tensors on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch_on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that launches kernels run on the device of its first argument, a tensor."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with use_device(args[0] if args else next(iter(kwargs.values()))):
            return function(*args, **kwargs)

    return run
