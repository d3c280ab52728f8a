"""The rivals of UNIQUE behind one switch, `attention=NAME`: same model, same paged cache, same dense prefill.

dense, unique, second_moment, mean and quest are scores of `unique_asr.attention`. The others choose tokens, one small
file each; `sliding` cuts the audio instead. `rivals_active` lets the attention function see them.
"""

from unique_asr.evaluation.methods.base import Method, RivalConfig, rivals_active
from unique_asr.evaluation.methods.h2o import H2O
from unique_asr.evaluation.methods.infllm import InfLLM
from unique_asr.evaluation.methods.murmur import Murmur
from unique_asr.evaluation.methods.sliding import Sliding
from unique_asr.evaluation.methods.streaming_llm import StreamingLLM

METHODS: dict[str, type[Method]] = {method.name: method for method in (StreamingLLM, H2O, InfLLM, Murmur)}

__all__ = ["H2O", "METHODS", "InfLLM", "Method", "Murmur", "RivalConfig", "Sliding", "StreamingLLM", "rivals_active"]
