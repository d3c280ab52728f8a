"""Work in threads, each with a CUDA stream of its own: what leaves a GPU idle alone fills it together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch

from unique_asr.models import resolve_device

STREAMS = (
    31  # PyTorch has 32, of which one captures graphs (`unique_asr.attention.cuda_graph`), and gives them out again
)


def in_threads(work: Iterable[Callable[[], None]], threads: int, device: str = "auto") -> None:
    """Do all of `work`, `threads` at a time, each on a stream of `device` if that is CUDA.

    threads: at most `STREAMS`. The first error of the work is raised once the others have come to their end. The
    threads do not outlive the program, so that an interrupt ends them.
    """
    waiting, errors = iter(list(work)), []
    cuda = (chosen := resolve_device(device)).type == "cuda"

    def worker() -> None:
        with torch.cuda.stream(torch.cuda.Stream(chosen)) if cuda else nullcontext():
            for task in waiting:  # an iterator over a list gives each of them once, whoever asks
                try:
                    task()
                except Exception as error:
                    errors.append(error)

    if cuda:
        torch.cuda.synchronize(chosen)  # what the work begins with is there for every stream
    workers = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if errors:
        raise errors[0]
