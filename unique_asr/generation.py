"""Text LLMs that read a long context by pages: a chat prompt in, text out as it is written.

    generator = TextGenerator("Qwen/Qwen3-4B")
    text, info = generator.generate("Who is the murderer?", context=Path("novel.txt").read_text())
    for piece in text:
        print(piece, end="", flush=True)
    print(info.sparsity)

Any causal LM of transformers: a hub id, a folder, or a GGUF file, whose weights are unpacked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from unique_asr.attention import SparseAttentionConfig
from unique_asr.attention.huggingface import resolve_combine
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.models import ModelError, convert_load_errors, resolve_device, resolve_dtype
from unique_asr.models.pretrained.formats import TextStream
from unique_asr.remote import expand_home

LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")  # rotary embeddings that change with the length of what is read at once


class GenerationError(ValueError):
    """A prompt that cannot be answered; the message is one line and names the remedy."""


@dataclass
class GenerationInfo:
    """How a text was made; complete once all pieces of it are taken."""

    prompt_tokens: int
    tokens: int = 0
    stop_reason: str = ""  # end or length
    sparsity: dict[str, Any] = field(default_factory=dict)  # SparsityCounters.to_dict()
    timings: dict[str, float] = field(default_factory=dict)  # s: prefill, decode
    warnings: list[str] = field(default_factory=list)


class TextGenerator:
    """A text LLM with its settings; decoding is greedy.

    Args:
        model: a hub id, a folder, a GGUF file, or a (model, tokenizer) pair.
        attention: `unique` reads `budget` tokens of the context a step, `dense` all; or a SparseAttentionConfig.
        device, dtype: see `unique_asr.models.load`.
        prefill_chunk: tokens of the prompt that are read at once, which bounds the memory of a long context.

    Raises:
        ModelError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | PathLike[str] | tuple[Any, Any],
        *,
        attention: str | SparseAttentionConfig = "unique",
        budget: int | None = 512,
        device: str = "auto",
        dtype: str = "auto",
        prefill_chunk: int = 2048,
    ) -> None:
        if not isinstance(attention, SparseAttentionConfig):
            if attention not in ("unique", "dense"):
                raise GenerationError(f"attention={attention}: use unique or dense, or give a SparseAttentionConfig")
            attention = SparseAttentionConfig(budget=budget if attention == "unique" else None)
        self.model, self.tokenizer = model if isinstance(model, tuple) else load_text_model(model, device, dtype)
        self.attention, self.prefill_chunk = resolve_combine(attention, self.model), prefill_chunk
        self.stop_ids = stop_ids(self.model, self.tokenizer)

    def generate(
        self,
        prompt: str,
        *,
        context: str | None = None,
        system: str | None = None,
        max_new_tokens: int = 1024,
        chat: bool | None = None,
        template_options: dict[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Iterator[str], GenerationInfo]:
        """Return the text in pieces, as it is decoded, and how it is made.

        Args:
            prompt: a question, or a text to go on with.
            context: a text that comes before the prompt, of any length that the model knows.
            system: an instruction for a chat model.
            chat: use the tokenizer's chat template; by default if it has one.
            template_options: for the template, {"enable_thinking": False} for instance.
            progress: called as progress(done, total), in tokens, while the prompt is read.

        Raises:
            GenerationError: for a prompt that cannot be encoded; while pieces are taken if memory runs out.
        """
        ids = self.encode_prompt(prompt, context, system, chat, template_options)
        info = GenerationInfo(prompt_tokens=len(ids))
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and len(ids) + max_new_tokens > limit:
            info.warnings.append(
                f"{len(ids)} tokens of prompt and {max_new_tokens} of text are more than the {limit} the model knows"
            )
        original = getattr(config, "original_max_position_embeddings", None)
        if "longrope" in find_rope_types(config) and original and len(ids) <= original < len(ids) + max_new_tokens:
            info.warnings.append(
                f"the positions of this model change at {original} tokens, which the text would pass: "
                f"use max_new_tokens={original - len(ids)} or a longer context"
            )
        return self._pieces(ids, max_new_tokens, info, progress), info

    def encode_prompt(
        self,
        prompt: str,
        context: str | None = None,
        system: str | None = None,
        chat: bool | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt; the arguments are those of `generate`.

        Raises:
            GenerationError: if `chat` is true and the tokenizer has no chat template.
        """
        text = prompt if context is None else f"{context}\n\n{prompt}"
        has_template = self.tokenizer.chat_template is not None
        if chat and not has_template:
            raise GenerationError("chat=true: the tokenizer has no chat template; use chat=false")
        if chat is False or not has_template:
            return self.tokenizer(text if system is None else f"{system}\n\n{text}")["input_ids"]
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **(template_options or {})
        )["input_ids"]

    def _pieces(
        self, ids: list[int], max_new_tokens: int, info: GenerationInfo, progress: Callable[[int, int], None] | None
    ) -> Iterator[str]:
        decoder = self.make_decoder(len(ids), max_new_tokens)
        try:
            with torch.no_grad():
                table = self.model.get_input_embeddings()
                embeds = table(torch.tensor([ids], device=table.weight.device))
            begin = time.perf_counter()
            decoder.prefill(embeds, progress)
            read = time.perf_counter()
            info.timings["prefill"] = read - begin
            stream = TextStream(self.tokenizer)
            for token in decoder.tokens(max_new_tokens, self.stop_ids):
                info.tokens += 1
                info.timings["decode"] = time.perf_counter() - read
                info.sparsity = decoder.counters.to_dict()
                if piece := stream.push(token):
                    yield piece
            info.stop_reason = decoder.stop_reason or ""
            if piece := stream.flush():
                yield piece
        except torch.OutOfMemoryError as error:
            raise GenerationError(
                f"out of memory with {len(ids)} tokens of prompt; use a shorter context, a smaller prefill_chunk, "
                "dtype=bfloat16 or device=cpu"
            ) from error

    def make_decoder(self, prompt: int, max_new_tokens: int) -> GreedyDecoder:
        """Return a decoder for a prompt and a text of so many tokens."""
        config = self.model.config.get_text_config(decoder=True)
        whole = not find_rope_types(config).isdisjoint(LENGTH_DEPENDENT_ROPE)
        pieces = 1 if whole else -(-prompt // self.prefill_chunk)
        return GreedyDecoder(
            self.model,
            self.attention,
            capacity=prompt + max_new_tokens,
            prefill_chunk=-(-prompt // pieces),  # of equal length: a chunk of one token would be a decode step
            static=False if whole else None,
        )


def load_text_model(
    name_or_path: str | PathLike[str], device: str = "auto", dtype: str = "auto", option: str = "model"
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer, from a folder, the hub or a .gguf file.

    Args:
        device, dtype: see `unique_asr.models.load`.
        option: what errors call the model.

    Raises:
        ModelError: if it cannot be loaded.
    """
    chosen = resolve_device(device)
    tokenizer = load_text_tokenizer(name_or_path, option)
    source, options = _text_source(name_or_path, option)
    with convert_load_errors(name_or_path, "text LLM", option=option):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=resolve_dtype(dtype, chosen), **options)
    return model.to(chosen).eval(), tokenizer


def load_text_tokenizer(name_or_path: str | PathLike[str], option: str = "model") -> Any:
    """Load the tokenizer of a causal LM; see `load_text_model`.

    Raises:
        ModelError: if it cannot be loaded, or transformers reads that of a .gguf file wrongly.
    """
    source, options = _text_source(name_or_path, option)
    with convert_load_errors(name_or_path, "text LLM", option=option):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    gemma = "Gemma" in type(tokenizer).__name__
    if options and gemma and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        # As transformers 5.17 does, which cuts words into other tokens too.
        raise ModelError(
            f"{option}={name_or_path}: transformers {transformers.__version__} reads this file's tokenizer wrongly; "
            "update transformers or give the original model's folder"
        )
    return tokenizer


def _text_source(name_or_path: str | PathLike[str], option: str) -> tuple[str, dict[str, str]]:
    """What transformers loads, and the options that it needs for it."""
    path = expand_home(name_or_path)
    if path.suffix.lower() != ".gguf":
        return str(path) if path.is_dir() else str(name_or_path), {}
    if not path.is_file():
        raise ModelError(f"{option}={name_or_path}: no such file")
    return str(path.parent), {"gguf_file": path.name}


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids of all tokens that a generation configuration, a configuration or a tokenizer calls the end."""
    found: set[int] = set()
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True), tokenizer):
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return found


def find_rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary embeddings of a model: `default`, `longrope`, `linear` ..."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = parameters.values() if parameters and all(isinstance(v, dict) for v in parameters.values()) else [parameters]
    return {one.get("rope_type", "default") for one in each}
