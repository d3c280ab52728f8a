"""From options to systems: the Whisper reference, the CTC head, and the model with each method and budget."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr import models
from unique_asr.attention import SparseAttentionConfig
from unique_asr.evaluation import systems
from unique_asr.evaluation.decodings import identify_weights
from unique_asr.evaluation.encoder import Encoder
from unique_asr.evaluation.harness import System
from unique_asr.evaluation.method_grid import build_methods
from unique_asr.evaluation.methods import Sliding, describe_method

Provenance = dict[str, Any]  # everything that the texts of a system depend on


def build_systems(config: DictConfig) -> Iterator[tuple[System, Provenance]]:
    """Make the systems of a run: the reference, the CTC head, then the model with every method and budget.

    Models are loaded when there is something to decode, and shared by the systems.

    Yields:
        Each system, and what its texts depend on.

    Raises:
        ValueError: options do not fit the model or each other.
    """
    if config.reference is not None:

        def make_reference() -> System:
            return systems.Whisper(config.reference, config.device, threads=config.threads or 0)

        about = {"system": "whisper", "model": identify_weights(config.reference)}
        yield systems.Deferred("whisper", make_reference), about
    name = config.model.name_or_path
    if name is None:
        return
    methods, kind = build_methods(config), models.identify_model(name).kind
    known, reads_words = kind in ("known", "listening_llm"), kind == "listening_llm"
    if config.listener and not reads_words:
        raise ValueError(f"model={name}: has no listener that writes words; leave out listener")
    batch, passes, concurrent = config.batch, config.parallel_passes, config.concurrent
    sliding = any(isinstance(method, Sliding) for method in methods.values())
    if known and (batch > 1 or passes > 1 or concurrent > 1 or config.ctc or sliding):
        raise ValueError(
            f"model={name}: batch, parallel_passes, concurrent, ctc and sliding are for this package's own models"
        )
    loading = threading.Lock()

    @functools.cache
    def load() -> Any:
        """Load the pair of model and processor; for this package's own models, the encoder that holds it."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        pair = models.load(name, config.device, config.dtype)
        if known:
            return pair
        folder = None if config.encoded is None else Path(config.encoded)
        return Encoder(*pair, keep=len(methods) + config.ctc > 1, folder=folder)

    dtype = models.resolve_dtype(config.dtype, models.resolve_device(config.device))
    decoding = OmegaConf.to_container(config.decoding)
    shared = {"model": identify_weights(name), "dtype": str(dtype), "batch": batch, "decoding": decoding}
    if config.listener:
        yield systems.Deferred("listener", lambda: systems.ListenerAlone(load())), shared | {"system": "listener"}
    if config.ctc:
        yield systems.Deferred("ctc", lambda: systems.GreedyCTC(load())), shared | {"system": "ctc"}
    for label, method in methods.items():
        options, attention, (kind, settings) = dict(decoding), method, describe_method(method)
        about = {"system": kind, "attention": {"budget": None} | settings}
        if isinstance(method, Sliding):
            options["sliding"], attention = method, SparseAttentionConfig(budget=None)
        elif method.selector is not None:
            about["attention"]["method_name"] = method.selector.name
            if method.selector.name == "murmur":
                options["chunk_seconds"] = about["chunk_seconds"] = config.rivals.murmur_chunk_seconds
        if known:
            kind = systems.PretrainedLLM
        elif batch > 1:
            kind = functools.partial(systems.BatchedSpeechLLM, batch=batch)
        elif passes > 1 and not isinstance(method, Sliding):
            kind = functools.partial(systems.ParallelSpeechLLM, passes=passes)
            about["parallel_passes"] = passes
        else:
            kind = systems.SpeechLLM

        def make(kind=kind, label=label, attention=attention, options=options) -> System:
            with loading:
                model = load().share() if concurrent > 1 else load()
            return kind(label, model, attention, **options)

        yield systems.Deferred(label, make), shared | about
