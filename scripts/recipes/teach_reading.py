"""Teach the LLM of a speech LLM that listens with Whisper's decoder to read what it hears.

    python scripts/recipes/teach_reading.py --whisper weights/whisper-base --language-model weights/smollm2-135m \
        --projector outputs/default/settle --texts librispeech.txt ljspeech.txt --heard heard.pt --minutes 7 \
        --output outputs/reader

The LLM learns to write texts from the positions that a listener would give of them (unique_asr/training/texts.py), so
no audio is needed. `--heard` adds what the listener heard in real recordings (scripts/recipes/listen.py). Rows have up
to 8 K tokens: the answer of ten minutes of speech begins where they end.

`--projector` names a model of scripts/finetune.py whose CTC head gives the times; `--model` goes on with a model that
listens already. In the last part of the training the weights are rounded to what is stored. `--masked` sends a share of
the rows above the budget through UNIQUE's mask, soft in the first half of the time and hard in the second. On a GPU:
with the default `--tokens` and `--lengths`, 0.1 s a step on an H100; on two CPU cores, `--tokens 600 --lengths 600`.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unique_asr.attention.soft_mask import training_attention
from unique_asr.models import SHIPPED_MODELS, SpeechLLMForConditionalGeneration, SpeechLLMProcessor, load
from unique_asr.models.speech_llm.compose import compose
from unique_asr.models.speech_llm.ctc import normalize_ctc_text
from unique_asr.models.speech_llm.packing import INDEX, find_bits, round_to_bits, save_packed_changes, save_packed_model
from unique_asr.training.corpus import LOWER_CASE, Source, Utterance
from unique_asr.training.graphs import Decoder, GraphedDecoder
from unique_asr.training.listening import read_heard
from unique_asr.training.precision import MasterWeights
from unique_asr.training.texts import read_texts

ALTERNATIVES = 8  # tokens that a position is an expectation over
LENGTHS = [512, 1024, 1024, 2048, 4096, 8192]
SHORT = 512  # rows of at most so many tokens may be nearly empty; longer ones are at least half full
TOKENS_A_POSITION = 2.2  # of the positions and the answer together
HEARD_SHARE = 0.3  # of the rows are real, if there are any
LOWER_SHARE = 0.2  # of the rows: the answer in lower case without punctuation
SLIPS_SHARE, SLIPS = 0.5, 0.02  # share of the rows in which the LLM reads wrong tokens of its own, and of those tokens
BITS = {
    "": 8,
    "encoder": 5,
    "projector": 6,
    "projector.context": 4,
    "listener": 5,
    "listener.decoder.embed_tokens": 4,
    "language_model.model.layers": 4,
}  # of the stored weights, by name prefix


@dataclass
class Row:
    """Ids before and after the positions, and of the answer; tokens [M, A] and weights [M, A] of the positions.

    written: the answer as the LLM reads it while it writes on: with slips of its own.
    """

    before: list[int]
    candidates: Tensor
    weights: Tensor
    after: list[int]
    answer: list[int]
    written: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.candidates) + len(self.after) + len(self.answer)


@dataclass
class Batch:
    """Rows padded on the right: ids [B, N]; `heard`: places of the positions in the flat batch; `read`: of the tokens
    before those to write, `targets`. decoded: bool [B, N], what inference decodes token by token."""

    ids: Tensor
    heard: Tensor
    candidates: Tensor
    weights: Tensor
    read: Tensor
    targets: Tensor
    decoded: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> "Batch":
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


class Rows:
    """Rows of what was heard in texts, and in real recordings."""

    def __init__(self, texts: list[Source], heard: list[Source], processor: SpeechLLMProcessor, seed: int) -> None:
        self.texts, self.heard, self.processor = texts, heard, processor
        self.random = np.random.default_rng(seed)

    def row(self, length: int) -> Row:
        """Of about `length` tokens at most."""
        limit = length * self.random.uniform(0.5 if length > SHORT else 0.05, 1.0)
        real = bool(self.heard) and self.random.random() < HEARD_SHARE
        parts: list[Utterance] = []
        tokens = 0.0
        while tokens < limit:
            for utterance in self._stretch(self.heard if real else self.texts):
                tokens += TOKENS_A_POSITION * len(utterance.heard[0])
                if parts and tokens > limit:
                    break
                parts.append(utterance)
        return self._finish(parts)

    def _stretch(self, sources: list[Source]) -> Iterable[Utterance]:
        weights = np.array([source.weight for source in sources])
        return sources[self.random.choice(len(sources), p=weights / weights.sum())].stretch(True, self.random)

    def _finish(self, parts: list[Utterance]) -> Row:
        lower = self.random.random() < LOWER_SHARE
        before, after = self.processor.tokenize_prompt(LOWER_CASE if lower else None)
        text = " ".join(part.text for part in parts)
        answer = self.processor.tokenizer(normalize_ctc_text(text) if lower else text, add_special_tokens=False)[
            "input_ids"
        ]
        answer.append(self.processor.end_token_id)
        slips = SLIPS if self.random.random() < SLIPS_SHARE else 0.0
        written = [
            answer[self.random.integers(len(answer))] if self.random.random() < slips else token for token in answer
        ]
        candidates, weights = (torch.cat([part.heard[which] for part in parts]) for which in (0, 1))
        return Row(before, candidates.long(), weights.float(), after, answer, written)


class Batches(IterableDataset):
    """Endless batches of `tokens`, in rows of one of the lengths."""

    def __init__(self, make: Callable[[int], Rows], tokens: int, lengths: list[int], seed: int) -> None:
        self.make, self.tokens, self.lengths, self.seed = make, tokens, lengths, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        made = self.make(self.seed + (1000 * worker.id if worker else 0))
        while True:
            length = int(made.random.choice(self.lengths))
            rows = []
            while len(rows) < max(1, self.tokens // length):
                row = made.row(length)
                if len(row) <= length:
                    rows.append(row)
            yield collate(rows, length)


def collate(rows: list[Row], length: int) -> Batch:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    decoded = torch.zeros(len(rows), length, dtype=torch.bool)
    heard, read = [], []
    candidates, weights = [], []
    for index, row in enumerate(rows):
        first = len(row.before)
        last = first + len(row.candidates)
        answer = last + len(row.after)
        end = answer + len(row.answer)
        ids[index, :first] = torch.tensor(row.before)
        ids[index, last:end] = torch.tensor(row.after + row.written)
        decoded[index, answer:end] = True
        heard.append(torch.arange(first, last) + index * length)
        read.append(torch.arange(answer - 1, end - 1) + index * length)
        more = ALTERNATIVES - row.candidates.shape[1]
        candidates.append(functional.pad(row.candidates, (0, more)))
        weights.append(functional.pad(row.weights, (0, more)))
    targets = torch.tensor([token for row in rows for token in row.answer])
    return Batch(ids, torch.cat(heard), torch.cat(candidates), torch.cat(weights), torch.cat(read), targets, decoded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", required=True)
    parser.add_argument("--language-model")
    parser.add_argument("--projector")
    parser.add_argument("--model", help="in place of the two: a model that listens already")
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--heard", type=Path, help="of scripts/recipes/listen.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of the rows")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--from-layer", type=int, default=0, help="train the LLM's layers from this one on")
    parser.add_argument("--rounded", type=float, default=0.4, help="share of the time at the end with rounded weights")
    parser.add_argument("--masked", type=float, default=0.0, help="share of the steps through UNIQUE's mask")
    parser.add_argument("--budget", type=int, default=256, help="of the mask, tokens")
    parser.add_argument("--tau", type=float, default=0.05, help="softness of the mask while it is soft")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 4))
    parser.add_argument("--save-minutes", type=float, default=2.0)
    parser.add_argument("--max-pass-seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.model or (arguments.language_model and arguments.projector)):
        parser.error("give --model, or --language-model and --projector")
    model, processor = load(arguments.model, device="cpu", dtype="float32") if arguments.model else composed(arguments)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    heard = read_heard(arguments.heard) if arguments.heard else []
    for source in heard:
        source.weight = len(source.recordings)
    texts = read_texts(arguments.texts, arguments.whisper, model.listener, {})
    make = partial(Rows, texts, heard, processor)
    batches = Batches(make, arguments.tokens, arguments.lengths, arguments.seed)
    source = SHIPPED_MODELS["default"].folder if arguments.model == "default" else Path(arguments.model or "")

    def save(trained: list[str]) -> None:
        if arguments.model and (source / INDEX).is_file():  # packing it all again would round it all again
            state = model.state_dict()
            save_packed_changes({name: state[name] for name in trained}, source, arguments.output)
        else:
            save_packed_model(model, processor, arguments.output, BITS)

    teach(model, batches, arguments, save)


def composed(arguments: argparse.Namespace) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Whisper, the CTC head of a trained projector, and the LLM."""
    trained, trained_processor = load(arguments.projector, device="cpu", dtype="float32")
    model, processor = compose(
        arguments.whisper,
        arguments.language_model,
        merge="decoder",
        listener_ascii=True,
        stack_factor=trained.config.stack_factor,
        projector_size=trained.config.projector_size,
        context_layers=trained.config.context_layers,
        merge_frames=trained.config.merge_frames,
        max_pass_seconds=arguments.max_pass_seconds,
        ctc_tokens=trained_processor.ctc_tokens,
    )
    head = {name: value for name, value in trained.projector.state_dict().items() if not name.startswith("residual")}
    model.projector.load_state_dict(head, strict=False)
    return model, processor


def teach(
    model: SpeechLLMForConditionalGeneration,
    batches: Batches,
    arguments: argparse.Namespace,
    save: Callable[[list[str]], None],
) -> None:
    """Trains the LLM but for its embeddings; the loss is that of the answers' tokens. save: takes the trained names."""
    model.requires_grad_(False)
    decoder, cuda = model.get_decoder(), model.device.type == "cuda"
    trained = {f"layers.{index}": layer for index, layer in enumerate(decoder.layers) if index >= arguments.from_layer}
    names = {
        parameter: f"language_model.model.{part}.{name}"
        for part, module in {**trained, "norm": decoder.norm}.items()
        for name, parameter in module.named_parameters()
    }
    for parameter in names:
        parameter.requires_grad_(True)
    masters = MasterWeights(model, torch.bfloat16 if cuda else torch.float32)
    optimizer = torch.optim.AdamW(masters.of(list(names)), betas=(0.9, 0.95), weight_decay=0.01, fused=cuda)
    attention = training_attention(model, mode="dense", budget=arguments.budget, tau=arguments.tau)
    masks = [replace(attention.config, mode=mode) for mode in ("soft", "hard")]
    table = model.get_input_embeddings().weight
    run = GraphedDecoder(decoder, attention) if cuda else Decoder(decoder)
    chance = random.Random(arguments.seed)
    loader = DataLoader(batches, batch_size=None, num_workers=arguments.workers, pin_memory=cuda, prefetch_factor=None)
    begin, done, saved = time.monotonic(), 0.0, 0.0
    total, lines = torch.zeros((), device=table.device), 0
    for step, batch in enumerate(loader, 1):
        rate = arguments.rate * min(1.0, step / 50) * (1 - 0.97 * done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(table.device)
        with torch.no_grad():
            positions = model.listener.embed_expected(batch.weights.to(table.dtype), batch.candidates, table)
            embeds = table[batch.ids].flatten(0, 1).index_copy(0, batch.heard, positions).unflatten(0, batch.ids.shape)
        masked = batch.ids.shape[1] > attention.config.sparse.budget and chance.random() < arguments.masked
        attention.config = masks[done >= 0.5] if masked else replace(attention.config, mode="dense")
        states = run(embeds, batch.decoded if masked else None).flatten(0, 1)[batch.read]
        loss = functional.cross_entropy((states @ table.T).float(), batch.targets)
        loss.backward()
        masters.take_gradients(list(names))
        torch.nn.utils.clip_grad_norm_(masters.of(list(names)), 1.0)
        optimizer.step()
        masters.give_weights(list(names))
        if done > 1 - arguments.rounded:
            for parameter, name in names.items():
                if parameter.ndim == 2:
                    parameter.data.copy_(round_to_bits(masters.weights[parameter], find_bits(name, BITS)))
        total, lines = total + loss.detach(), lines + 1
        del states, loss  # and their gradient nodes, which belong to this stream: a later capture could not use them
        elapsed = time.monotonic() - begin
        done = elapsed / (60 * arguments.minutes)
        if step % 25 == 0 or done >= 1:
            print(f"step {step}  loss {total.item() / lines:.4f}  rate {rate:.1e}  {elapsed:.0f} s", flush=True)
            total, lines = torch.zeros_like(total), 0
        if elapsed > saved + 60 * arguments.save_minutes or done >= 1:
            with masters.restored():
                save(list(names.values()))
            saved = elapsed
        if done >= 1:
            break
    attention.restore()


if __name__ == "__main__":
    main()
