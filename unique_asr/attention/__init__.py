"""UNIQUE attention: any transformers decoder reads its KV cache by pages.

The method is `reference.py` and `scores.py`; `cache.py` keeps the pages, `huggingface.py` joins them to transformers,
`static_step.py` is a step as the device sees it, `decode_step.py` captures it, and `backend.py` finds the Triton
kernels; `soft_mask.py` is for training. Nothing here knows of speech.
"""

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
