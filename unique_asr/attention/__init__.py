"""UNIQUE attention: any transformers decoder reads its KV cache by pages. Nothing here knows of speech.

    with sparse_attention(model, budget=512) as sparse:
        model.generate(**inputs)
    print(sparse.counters)

Read in this order:

    reference.py, scores.py     the method in plain PyTorch (arXiv 2605.27740)
    configuration.py            its settings
    statistics.py               page statistics of a layer
    paged_layer.py, cache.py    keys and values with their page statistics: of one layer, and of a model
    selector.py                 the interface of what a step reads; page_selector.py is UNIQUE
    steps.py                    one decode step of one layer: select, attend
    static_step.py              what a step that can be captured shares among layers
    decode_step.py              one decode step of a whole model, in CUDA graphs (cuda_graph.py, fused_linear.py)
    dense.py                    dense attention, for a prefill in chunks
    huggingface.py              the glue with transformers: the attention function, and the switches of a model
    generation_cache.py         the cache that generate gets from a switched model
    supported.py                what attention must be like: anything else is refused
    soft_mask.py                training through the page selection: the method in plain PyTorch
    huggingface_training.py     the glue of training with transformers
    backend.py                  finds the Triton kernels (kernels/ at the top of the repository)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unique_asr.attention.cache import PagedCache
    from unique_asr.attention.configuration import SparseAttentionConfig
    from unique_asr.attention.counters import SparsityCounters
    from unique_asr.attention.decode_step import DecodeStep
    from unique_asr.attention.huggingface import SparseAttention, sparse_attention
    from unique_asr.attention.huggingface_training import TrainingAttention, training_attention
    from unique_asr.attention.selector import TokenSelector
    from unique_asr.attention.soft_mask import TrainingAttentionConfig

__all__ = [
    "DecodeStep",
    "PagedCache",
    "SparseAttention",
    "SparseAttentionConfig",
    "SparsityCounters",
    "TokenSelector",
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
    "TokenSelector": "unique_asr.attention.selector",
    "TrainingAttention": "unique_asr.attention.huggingface_training",
    "TrainingAttentionConfig": "unique_asr.attention.soft_mask",
    "sparse_attention": "unique_asr.attention.huggingface",
    "training_attention": "unique_asr.attention.huggingface_training",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers when something that needs them is asked for; SparseAttentionConfig does not."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
