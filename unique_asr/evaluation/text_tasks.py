"""The tasks of texts for one model: RULER, counting, perplexity. Samples come in, values and counts of pages come out.

Prefill is dense; what is measured is reading the context while writing the answer, or while reading on token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from unique_asr.attention import PagedCache, SparseAttentionConfig
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.huggingface import NAME, resolve_combine, set_attention
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING
from unique_asr.evaluation.ruler import RulerSample, Sources, format_answers, make_sample, split_sentences
from unique_asr.generation import load_text_model, load_text_tokenizer
from unique_asr.transcribers.batch import interleave

PREFILL_CHUNK = 2048  # tokens that are read at once before the answer


class LanguageModel:
    """A causal language model and its tokenizer, each loaded when it is first needed.

    Args:
        name: a hub id, a folder, or a GGUF file.
        device, dtype: see `unique_asr.models.load`.
    """

    def __init__(self, name: str, device: str, dtype: str) -> None:
        self.name, self.device, self.dtype = name, device, dtype

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises ModelError if it cannot be loaded."""
        return load_text_tokenizer(self.name, option="text.model")

    @cached_property
    def model(self) -> Any:
        """The model. Raises ModelError if it cannot be loaded."""
        return load_text_model(self.name, self.device, self.dtype, option="text.model")[0]


class RulerRun:
    """RULER's tasks for one model.

    Args:
        language_model: what answers.
        options: the group `text` of conf/evaluate.yaml.
    """

    def __init__(self, language_model: LanguageModel, options: DictConfig) -> None:
        self.language_model, self.tokenizer, self.options = language_model, language_model.tokenizer, options
        text = Path(options.file).read_text(encoding="utf-8") if options.file else ""
        questions = Path(options.qa).read_text(encoding="utf-8").splitlines() if options.qa else []
        self.sources = Sources(split_sentences(text), tuple(json.loads(line) for line in questions if line.strip()))
        self.tasks = [task for task in options.tasks if task != "qa" or questions]
        self._samples: dict[tuple[str, int, int], RulerSample] = {}  # every method gets the same
        self._last: tuple[SparseAttentionConfig, BatchEngine] | None = None

    def list_samples(self) -> Iterator[tuple[str, int, dict[str, Callable[[], RulerSample]]]]:
        """List every task at every length.

        Yields:
            Task, length in tokens, and functions that make the samples, by the keys of the samples.
        """
        options = self.options
        for length in options.lengths:
            for task in self.tasks:
                seeds = range(options.seed, options.seed + options.samples)
                keys = {seed: f"{task} {length} {seed}" for seed in seeds}
                yield task, length, {keys[seed]: partial(self._make_sample, task, length, seed) for seed in seeds}

    def _make_sample(self, task: str, length: int, seed: int) -> RulerSample:
        place = task, length, seed
        if place not in self._samples:
            self._samples[place] = make_sample(task, length, self.count_tokens, seed, self.sources)
        return self._samples[place]

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a prompt, with those of the model's chat template."""
        return len(self.tokenizer(self._apply_chat_template(text, ""), add_special_tokens=False).input_ids)

    def _apply_chat_template(self, prompt: str, begin: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt + begin
        messages = [{"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return asked + begin.lstrip()

    def _tokenize(self, sample: RulerSample) -> Tensor:
        """Make the token ids [1, N] of what the model is asked, up to where its answer begins."""
        text, special = self._apply_chat_template(sample.prompt, sample.begin), self.tokenizer.chat_template is None
        return self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids

    def run(self, samples: Sequence[RulerSample], attention: SparseAttentionConfig) -> list[dict[str, Any]]:
        """Let the model answer the samples side by side.

        Returns:
            For each sample its `value` (share of the answers that were found), `output`, `answers`, `pages_read` and
            `pages_total`.
        """
        decoder = self._get_decoder(attention)
        answers = dict(interleave((self._answer(sample, decoder) for sample in samples), len(samples), decoder.step))
        return [answers[index] for index in range(len(samples))]

    def _answer(self, sample: RulerSample, decoder: BatchEngine) -> Generator[None, None, dict[str, Any]]:
        """Answer one sample; yields where the batch has to make a step."""
        model = self.language_model.model
        ids = self._tokenize(sample).to(model.device)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        row, tokens = decoder.new_sequence(), []
        try:
            row.prefill(model.get_input_embeddings()(ids))
            for token in row.tokens(sample.answer_tokens, ends):
                if token is PENDING:
                    yield PENDING
                else:
                    tokens.append(token)
        finally:
            decoder.remove(row)
        output = self.tokenizer.decode(tokens)
        return {
            "value": sample.score(output),
            "output": output,
            "answers": sample.answers,
            "pages_read": row.counters.pages_read,
            "pages_total": row.counters.pages_total,
        }

    def _get_decoder(self, attention: SparseAttentionConfig) -> BatchEngine:
        """Return the last decoder if it is for the same method, so that its memory and CUDA graphs are kept."""
        if self._last is None or self._last[0] is not attention:
            self._last = attention, BatchEngine(self.language_model.model, attention, PREFILL_CHUNK)
        return self._last[1]


class CountingRun(RulerRun):
    """RULER's counting tasks for models too small to write the answer: they read it, and a wrong one beside it.

    Raises:
        ValueError: `text.tasks` names no counting task.
    """

    def __init__(self, language_model: LanguageModel, options: DictConfig) -> None:
        super().__init__(language_model, options)
        self.tasks = [task for task in self.tasks if task in ("common_words", "frequent_words")]
        if not self.tasks:
            raise ValueError("text.tasks has no task with words to count: give common_words or frequent_words")

    def _tokenize_answer(self, task: str, words: Sequence[str]) -> Tensor:
        text = f" {format_answers(task, words)}"
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]

    def run(self, samples: Sequence[RulerSample], attention: SparseAttentionConfig) -> list[dict[str, Any]]:
        """Let the model read the right and a wrong answer to each sample, one token a decode step.

        Returns:
            For each sample the mean loss, in nats a token, of the `right` and the `wrong` answer, its `value` (the
            wrong one's less the right one's), `pages_read` and `pages_total`.
        """
        model = self.language_model.model
        prompts = [self._tokenize(sample)[0] for sample in samples for _ in range(2)]
        answers = [
            self._tokenize_answer(sample.task, words) for sample in samples for words in (sample.answers, sample.others)
        ]
        longest, steps = max(map(len, prompts)), max(map(len, answers))
        ids = torch.zeros(len(prompts), longest + steps, dtype=torch.long)
        starts = torch.tensor([longest - len(prompt) for prompt in prompts])
        for row, start, prompt, answer in zip(ids, starts, prompts, answers, strict=True):
            row[start:longest], row[longest : longest + len(answer)] = prompt, answer
        ids, place = ids.to(model.device), (torch.arange(longest + steps) - starts[:, None]).to(model.device)
        read = torch.arange(steps) < torch.tensor([len(answer) for answer in answers])[:, None]
        set_attention(model, NAME)
        cache = PagedCache(model.config, resolve_combine(attention, model), longest + steps)

        def logits(start: int, end: int) -> Tensor:
            return model(
                ids[:, start:end],
                attention_mask=(place[:, :end] >= 0).long(),
                position_ids=place[:, start:end].clamp(min=0),
                **{CACHE_ARGUMENT: cache},
                logits_to_keep=1,
            ).logits[:, -1]

        spans = [(start, min(longest, start + PREFILL_CHUNK)) for start in range(0, longest, PREFILL_CHUNK)]
        losses = []
        for start, end in (*spans, *((token, token + 1) for token in range(longest, longest + steps - 1))):
            likely = logits(start, end).float().log_softmax(dim=-1)
            if end >= longest:
                losses.append(-likely.gather(1, ids[:, end : end + 1]))
        losses = torch.cat(losses, dim=1).cpu().where(read, 0).sum(dim=1) / read.sum(dim=1)
        right, wrong = losses.unflatten(0, (-1, 2)).unbind(dim=1)
        counted = {key: value // len(ids) for key, value in vars(cache.counters).items() if key.startswith("pages")}
        return [
            {"value": float(more - less), "right": float(less), "wrong": float(more), **counted}
            for less, more in zip(right, wrong, strict=True)
        ]


class PerplexityRun:
    """The perplexity of stretches of a text, evenly spaced over it; the last tokens of each are read one by one.

    Raises:
        ValueError: `text.file` is missing.
    """

    def __init__(self, language_model: LanguageModel, options: DictConfig) -> None:
        if options.file is None:
            raise ValueError("text.file is missing: task=perplexity reads a text, text.file=FILE")
        self.language_model, self.options = language_model, options
        self.ids = language_model.tokenizer(
            Path(options.file).read_text(encoding="utf-8"), return_tensors="pt"
        ).input_ids[0]

    def list_samples(self) -> Iterator[tuple[str, int, dict[str, Callable[[], Tensor]]]]:
        """List the stretches [N] of every length, as `RulerRun.list_samples`.

        Raises:
            ValueError: a length is longer than the text, or no longer than `text.score_tokens`.
        """
        for length in self.options.lengths:
            spare = len(self.ids) - length
            if spare < 0 or length <= self.options.score_tokens:
                raise ValueError(
                    f"text.lengths has {length} tokens: give more than text.score_tokens, {self.options.score_tokens}, "
                    f"and at most the {len(self.ids)} of {self.options.file}"
                )
            count = min(self.options.samples, 1 + spare // self.options.score_tokens)
            starts = [index * spare // max(count - 1, 1) for index in range(count)]
            key = f"perplexity {length} {self.options.score_tokens}"
            stretches = {f"{key} {start}": partial(self._cut_stretch, start, length) for start in starts}
            yield "perplexity", length, stretches

    def _cut_stretch(self, start: int, length: int) -> Tensor:
        return self.ids[start : start + length]

    def run(self, stretches: Sequence[Tensor], attention: SparseAttentionConfig) -> list[dict[str, Any]]:
        """Let the model read stretches side by side, the last tokens of each one a decode step.

        Returns:
            For each stretch its `value`, the mean loss of these tokens in nats, `pages_read` and `pages_total`.
        """
        model = self.language_model.model
        ids = torch.stack(list(stretches)).to(model.device)
        length, first = ids.shape[1], ids.shape[1] - self.options.score_tokens
        set_attention(model, NAME)
        cache = PagedCache(model.config, resolve_combine(attention, model), length)
        losses = []
        for start in range(0, first, PREFILL_CHUNK):
            chunk = ids[:, start : min(first, start + PREFILL_CHUNK)]
            logits = model(chunk, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
        for index in range(first, length):
            likely = logits[:, -1].float().log_softmax(dim=-1)
            losses.append(-likely.gather(1, ids[:, index : index + 1]))
            if index + 1 < length:
                logits = model(ids[:, index : index + 1], **{CACHE_ARGUMENT: cache}).logits
        counters, rows = cache.counters, len(ids)
        read = {"pages_read": counters.pages_read // rows, "pages_total": counters.pages_total // rows}
        return [{"value": value, **read} for value in torch.cat(losses, dim=1).mean(dim=1).tolist()]


TASK_RUNS = {"ruler": RulerRun, "counting": CountingRun, "perplexity": PerplexityRun}
