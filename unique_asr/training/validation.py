"""Word error rates while training, of greedy decoding on recordings of one window or pass.

Of this package's own models: of the CTC head's best path and of the LLM. Of pretrained speech LLMs: of the LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from unique_asr.attention import SparseAttentionConfig, sparse_attention
from unique_asr.data import Recording
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.evaluation.scoring import Score
from unique_asr.generation import stop_ids
from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.pretrained import find
from unique_asr.models.pretrained.pass_memory import limit_text_tokens
from unique_asr.models.pretrained.prompting import embed_prompt
from unique_asr.training.precision import cast_weights

TOKENS_A_SECOND = 9.0  # of fast speech


@torch.no_grad()
def validate(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    recordings: Sequence[Recording],
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 32,
    with_llm: bool = True,
    sparse: SparseAttentionConfig | None = None,
) -> dict[str, float]:
    """Word error rates in percent, by Whisper's English normaliser, of greedy decoding with dense attention.

    Args:
        dtype: what is computed in (autocast).
        batch: recordings decoded at once.
        with_llm: also decode with the LLM, not with the CTC head alone.
        sparse: decode with this attention too.

    Returns:
        `ctc`; `llm`; with `sparse` also `sparse`, and `sparse_steps`, the share of its steps that were sparse.
    """
    ctc, llm, selected = Score(), Score(), Score()
    steps = sparse_steps = 0
    training = set_training(model, False)
    for first in range(0, len(recordings), batch):
        group = recordings[first : first + batch]
        inputs = processor.apply_transcription_request([recording.audio() for recording in group]).to(model.device)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            features = {"input_features": inputs["input_features"]}
            if "feature_attention_mask" in inputs:
                features["attention_mask"] = inputs["feature_attention_mask"]
            frames = model.encode_windows(features)
            windows = iter(zip(frames.logits.argmax(-1), inputs["window_frames"].tolist(), strict=True))
            for recording, count in zip(group, inputs["window_counts"].tolist(), strict=True):
                best = torch.cat([path[start:end] for path, (start, end) in (next(windows) for _ in range(count))])
                ctc.add(recording.text, decode_ctc_path(model, processor, best))
            limit = max(256, round(TOKENS_A_SECOND * max(recording.duration for recording in group)))
            passes = ([(llm, None)] if with_llm else []) + ([(selected, sparse)] if with_llm and sparse else [])
            for score, attention in passes:
                with sparse_attention(model, attention) if attention else nullcontext() as switch:
                    tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
                for recording, text in zip(group, processor.batch_decode(tokens), strict=True):
                    score.add(recording.text, text)
                if switch:
                    steps += switch.counters.steps
                    sparse_steps += switch.counters.sparse_steps
    set_training(model, training)
    measures = {"ctc": 100 * ctc.wer}
    if with_llm:
        measures["llm"] = 100 * llm.wer
    if with_llm and sparse:
        measures |= {"sparse": 100 * selected.wer, "sparse_steps": sparse_steps / max(steps, 1)}
    return measures


@torch.no_grad()
def validate_pretrained(
    model: Any,
    processor: Any,
    recordings: Sequence[Recording],
    dtype: torch.dtype = torch.bfloat16,
    sparse: SparseAttentionConfig | None = None,
) -> dict[str, float]:
    """The same as `validate` for a known model: `llm`, and with `sparse` also `sparse` and `sparse_steps`."""
    known_model, dense = find(model), SparseAttentionConfig(budget=None)
    stops = stop_ids(model, processor.tokenizer)
    scores, measures = {"llm": (dense, Score())} | ({"sparse": (sparse, Score())} if sparse else {}), {}
    training = set_training(model, False)
    with cast_weights(model, dtype):
        for name, (attention, score) in scores.items():
            # One chunk and steps that are not captured: weights move while training.
            decoder = GreedyDecoder(model, attention, prefill_chunk=1 << 30, static=False)
            for recording in recordings:
                embeds = embed_prompt(known_model, model, processor, recording.audio())
                decoder.reset()
                decoder.prefill(embeds)
                tokens = list(decoder.tokens(limit_text_tokens(known_model, recording.duration), stops))
                parser = known_model.parser()
                text = processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                score.add(recording.text, " ".join(found.text for found in (*parser.push(text), *parser.close())))
            measures[name] = 100 * score.wer
            counted = decoder.counters
    set_training(model, training)
    if sparse:
        measures["sparse_steps"] = counted.sparse_steps / max(counted.steps, 1)
    return measures


def set_training(model: Any, training: bool) -> bool:
    """Set the LLM's training mode, in which it has no cache if `checkpointing` is on; returns the former mode."""
    former = model.get_decoder().training
    model.get_decoder().train(training)
    return former


def decode_ctc_path(model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, best: torch.Tensor) -> str:
    """The text of a CTC path [T] of indices into `model.ctc_tokens`, the blank being one past the last."""
    path = torch.unique_consecutive(best)
    return processor.tokenizer.decode(model.ctc_tokens[path[path < len(model.ctc_tokens)]]).strip()
