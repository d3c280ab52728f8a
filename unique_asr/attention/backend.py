"""Which of the two backends runs a decode step: plain PyTorch anywhere, or the Triton kernels on CUDA."""

import importlib.util
import os
from functools import cache
from types import SimpleNamespace

import torch


def uses_triton(backend: str, device: torch.device) -> bool:
    """Whether the kernels run for a cache on `device`.

    Args:
        backend: of the configuration: auto, torch or triton.

    Raises:
        ValueError: triton is asked for where there is no CUDA device.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # kernels as NumPy, for tests
    if backend == "auto":
        return device.type == "cuda" and not interpreted and importlib.util.find_spec("triton") is not None
    if backend == "torch":
        return False
    if device.type != "cuda" and not interpreted:
        raise ValueError(f"attention.backend is triton, which needs a CUDA device: the model is on {device}")
    return True


@cache
def load_kernels() -> SimpleNamespace:
    """Import the kernels at the first use, as Triton may be missing elsewhere.

    Returns:
        A namespace of their functions, and of the constants that limit them.
    """
    names = {
        "page_statistics": ("append", "write_page_statistics"),
        "page_scores": ("page_scores", "select_pages", "select_pages_in_two_levels"),
        "sparse_decode": ("sparse_decode",),
        "sparse_step": ("sparse_step", "STEP_PAGES"),
        "top_pages": ("MAX_PAGES",),
    }
    found = {}
    for module, members in names.items():
        loaded = importlib.import_module(f"unique_asr.kernels.{module}")
        found |= {member: getattr(loaded, member) for member in members}
    return SimpleNamespace(**found)
