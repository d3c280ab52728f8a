"""Long-form transcription with a speech LLM that reads its KV cache by pages.

import unique_asr

segments, info = unique_asr.transcribe("talk.m4a")
for segment in segments:
    print(segment.start, segment.end, segment.text)

for index, transcript in unique_asr.transcribe_batch(["a.mp3", "b.mp3"]):  # side by side
    print(index, transcript.text)

with unique_asr.sparse_attention(model, budget=512):  # any transformers decoder
    model.generate(...)
"""

from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unique_asr.attention import sparse_attention
    from unique_asr.pipeline import transcribe, transcribe_batch

__version__ = "0.1.0"
_BEGAN = perf_counter()  # before anything heavy is imported: where the time of a program is counted from
__all__ = ["__version__", "sparse_attention", "transcribe", "transcribe_batch"]

_MODULES = {
    "sparse_attention": "unique_asr.attention",
    "transcribe": "unique_asr.pipeline",
    "transcribe_batch": "unique_asr.pipeline",
}


def __getattr__(name: str):
    """Import torch and transformers only when something that needs them is asked for."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
