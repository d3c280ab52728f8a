"""UNIQUE attention: any transformers decoder reads its KV cache by pages.

The method is `reference.py` and `scores.py`; `cache.py` keeps the pages, `huggingface.py` joins them to transformers,
`static_step.py` is a step as the device sees it, `decode_step.py` captures it, and `backend.py` finds the Triton
kernels; `soft_mask.py` is for training. Nothing here knows of speech.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unique_asr.attention.cache import PagedCache
    from unique_asr.attention.configuration import SparseAttentionConfig
    from unique_asr.attention.counters import SparsityCounters
    from unique_asr.attention.decode_step import DecodeStep
    from unique_asr.attention.huggingface import SparseAttention, sparse_attention
    from unique_asr.attention.soft_mask import TrainingAttention, TrainingAttentionConfig, training_attention

__all__ = [
    "DecodeStep",
    "PagedCache",
    "SparseAttention",
    "SparseAttentionConfig",
    "SparsityCounters",
    "TrainingAttention",
    "TrainingAttentionConfig",
    "sparse_attention",
    "training_attention",
]

_MODULES = {
    "DecodeStep": "unique_asr.attention.decode_step",
    "PagedCache": "unique_asr.attention.cache",
    "SparseAttention": "unique_asr.attention.huggingface",
    "SparseAttentionConfig": "unique_asr.attention.configuration",
    "SparsityCounters": "unique_asr.attention.counters",
    "TrainingAttention": "unique_asr.attention.soft_mask",
    "TrainingAttentionConfig": "unique_asr.attention.soft_mask",
    "sparse_attention": "unique_asr.attention.huggingface",
    "training_attention": "unique_asr.attention.soft_mask",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers when something that needs them is asked for; SparseAttentionConfig does not."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
