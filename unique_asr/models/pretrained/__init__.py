"""Known speech LLMs of transformers: one entry each in `catalogue.py`, decoded on the paged cache.

    segments, info = unique_asr.transcribe("meeting.m4a", model="hf-audio/MOSS-Transcribe-Diarize-HF")

`prompting.py` builds a model's request, `encoding.py` encodes its audio a bounded piece at a time, `formats.py` reads
its answer while it is written, `pass_memory.py` estimates what a pass takes, and `loading.py` loads it, with `lora.py`
for weights that are kept apart. `python -m unique_asr.models.pretrained` prints the catalogue.
"""

from unique_asr.models.pretrained.catalogue import KNOWN_MODELS, DecoderShape, KnownModel
from unique_asr.models.pretrained.formats import BracketParser, JsonParser, ParsedUtterance, Parser, PlainParser
from unique_asr.models.pretrained.loading import find, load
from unique_asr.models.pretrained.lora import load_lora, merge_lora

__all__ = [
    "KNOWN_MODELS",
    "BracketParser",
    "DecoderShape",
    "JsonParser",
    "KnownModel",
    "ParsedUtterance",
    "Parser",
    "PlainParser",
    "find",
    "load",
    "load_lora",
    "merge_lora",
]
