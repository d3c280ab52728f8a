"""The rivals of UNIQUE behind one switch, `attention=NAME`: same model, same paged cache, same dense prefill.

dense, unique, second_moment, mean and quest are scores of `unique_asr.attention`. The others choose tokens, one small
file each: selectors (`unique_asr.attention.selector`) for the field `selector` of a `SparseAttentionConfig`. `sliding`
cuts the audio instead.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.selector import TokenSelector
from unique_asr.evaluation.methods.h2o import H2O
from unique_asr.evaluation.methods.infllm import InfLLM
from unique_asr.evaluation.methods.murmur import Murmur
from unique_asr.evaluation.methods.sliding import Sliding
from unique_asr.evaluation.methods.streaming_llm import StreamingLLM

METHODS: dict[str, type[TokenSelector]] = {selector.name: selector for selector in (StreamingLLM, H2O, InfLLM, Murmur)}


def describe_method(method: SparseAttentionConfig | Sliding) -> tuple[str, dict[str, Any]]:
    """Return the kind of a method and its settings, by which decodings are found again (`evaluation.decodings`).

    The names stay what they were when the published decodings were made (benchmarks/long_form.tar.xz).
    """
    if isinstance(method, Sliding):
        return "Sliding", asdict(method)
    if method.selector is None:
        return "SparseAttentionConfig", method.to_dict()
    return "RivalConfig", method.to_dict() | {"method": asdict(method.selector)}


__all__ = ["H2O", "METHODS", "InfLLM", "Murmur", "Sliding", "StreamingLLM", "describe_method"]
