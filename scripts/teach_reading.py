"""Build a speech LLM that listens with Whisper's decoder, and teach its LLM to read what it hears, from texts alone.

    python scripts/teach_reading.py --whisper weights/whisper-base --language-model weights/smollm2-135m \
        --projector runs/default/top --texts librispeech.txt ljspeech.txt --minutes 40 --output runs/reader

A listener's position is the expected embedding of one token, so no audio is needed: a text in Whisper's tokens, with
some words wrong and some positions blurred, is what a recording of it would give; the LLM learns to write the text.
Lines of a file are consecutive sentences; those without case get a capital and a full stop. `--projector` names a model
of scripts/finetune.py whose CTC head gives the times. Every 25 steps the model is saved.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, load
from unique_asr.models.compose import compose, listener_tokens
from unique_asr.models.ctc import ctc_text
from unique_asr.models.packing import save_packed_model
from unique_asr.training.corpus import LOWER_CASE, has_case

LINES = (1, 2, 4, 6, 8, 12)  # of a row
MAX_ROW = 1500  # tokens, prompt and answer
LOWER_SHARE = 0.25  # of the rows: the answer in lower case without punctuation
WRONG, LOST, TWICE = 0.006, 0.002, 0.002  # share of the words
BLURRED, BLUR = 0.08, 0.5  # share of the positions, and the most that such a one takes from another token
BITS = {
    "": 8,
    "encoder": 5,
    "projector": 6,
    "projector.context": 4,
    "listener": 5,
    "listener.decoder.embed_tokens": 4,
    "language_model.model.layers": 4,
}  # of the stored weights, by name prefix


class Rows:
    """Prompt, positions [M, hidden] and answer of made-up recordings."""

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        whisper: str,
        texts: list[Path],
        seed: int,
    ):
        self.random, self.processor, self.tokenizer = (
            random.Random(seed),
            processor,
            AutoTokenizer.from_pretrained(whisper),
        )
        self.places = {token: place for place, token in enumerate(listener_tokens(self.tokenizer, ascii_only=True))}
        self.listener, self.table = model.listener, model.get_input_embeddings().weight.detach()
        self.files = [[line.strip() for line in path.open() if line.strip()] for path in texts]
        self.words = [word for lines in self.files for line in lines[::10] for word in line.split()]

    def text(self) -> str:
        lines, count = self.random.choice(self.files), self.random.choice(LINES)
        first = self.random.randrange(max(1, len(lines) - count))
        found = lines[first : first + count]
        return " ".join(line if has_case(line) else f"{line[0].upper()}{line[1:]}." for line in found)

    def misheard(self, text: str) -> str:
        words = []
        for word in text.split():
            chance = self.random.random()
            if chance < WRONG:
                words.append(self.random.choice(self.words))
            elif chance >= WRONG + LOST:
                words += [word] * (2 if chance < WRONG + LOST + TWICE else 1)
        return " ".join(words)

    def positions(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
        heard = torch.tensor([[self.places[token]] for token in ids if token in self.places])
        other = heard[torch.randint(len(heard), (len(heard),))]
        other = torch.where(torch.rand(len(heard), 1) < 0.3, other, torch.randint(self.listener.stop, other.shape))
        share = (torch.rand(len(heard), 1) < BLURRED) * torch.rand(len(heard), 1) * BLUR
        return self.listener.expected(torch.cat([1 - share, share], 1), torch.cat([heard, other], 1), self.table)

    def row(self) -> tuple[torch.Tensor, list[int]]:
        """Vectors [N, hidden] of a whole row, and the ids that end it."""
        text = self.text()
        lower = self.random.random() < LOWER_SHARE
        before, after = self.processor.prompt(LOWER_CASE if lower else None)
        answer = self.processor.tokenizer(ctc_text(text) if lower else text, add_special_tokens=False)["input_ids"]
        answer.append(self.processor.end_token_id)
        parts = [self.table[before], self.positions(self.misheard(text)), self.table[after], self.table[answer]]
        return torch.cat(parts), answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", required=True)
    parser.add_argument("--language-model", required=True)
    parser.add_argument("--projector", required=True)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--tokens", type=int, default=600, help="of a step, at least")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--max-pass-seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
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
    teach(model, processor, arguments, lambda: save_packed_model(model, processor, arguments.output, BITS))


def teach(model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, arguments, save) -> None:
    """Trains the LLM but for its embeddings; the loss is that of the answers' tokens."""
    rows = Rows(model, processor, arguments.whisper, arguments.texts, arguments.seed)
    model.requires_grad_(False)
    weights = list(model.get_decoder().layers.parameters()) + list(model.get_decoder().norm.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.01)
    begin, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 15) * (1 - 0.95 * done)
        tokens, answered, total = 0, 0, 0.0
        while tokens < arguments.tokens:
            vectors, answer = rows.row()
            if len(vectors) > MAX_ROW:
                continue
            states = model.get_decoder()(inputs_embeds=vectors[None]).last_hidden_state[0, -len(answer) - 1 : -1]
            logits = model.get_output_embeddings()(states)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            (loss / arguments.tokens).backward()
            tokens, answered, total = tokens + len(vectors), answered + len(answer), total + loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        done = (time.monotonic() - begin) / (60 * arguments.minutes)
        if step % 5 == 0:
            print(f"step {step}  loss {total / answered:.3f}  {time.monotonic() - begin:.0f} s", flush=True)
        if step % 25 == 0 or done >= 1:
            save()


if __name__ == "__main__":
    main()
