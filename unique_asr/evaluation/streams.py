"""Work in threads, each with a CUDA stream of its own: what leaves a GPU idle alone fills it together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch

from unique_asr.models import resolve_device

# PyTorch has 32 streams, which it gives out in turn; one of them captures graphs (`unique_asr.attention.cuda_graph`).
MAX_STREAMS = 31


def run_in_threads(work: Iterable[Callable[[], None]], threads: int, device: str = "auto") -> None:
    """Run every function of `work`, `threads` at a time, each on a CUDA stream of its own if `device` is CUDA.

    The threads do not outlive the program, so that an interrupt ends them.

    Args:
        work: functions without arguments.
        threads: at most `MAX_STREAMS`.
        device: see `unique_asr.models.load`.

    Raises:
        Exception: the first error of the work, once all other functions have ended.
    """
    waiting, errors = iter(list(work)), []
    cuda = (chosen := resolve_device(device)).type == "cuda"

    def run_waiting() -> None:
        with torch.cuda.stream(torch.cuda.Stream(chosen)) if cuda else nullcontext():
            for task in waiting:  # each thread takes the next function of the shared iterator
                try:
                    task()
                except Exception as error:
                    errors.append(error)

    if cuda:
        torch.cuda.synchronize(chosen)  # so that every stream sees what was computed before
    workers = [threading.Thread(target=run_waiting, daemon=True) for _ in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if errors:
        raise errors[0]
