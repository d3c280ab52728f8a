"""The two losses: CTC of the projector's head, and next-token cross-entropy of the LLM on the transcript."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unique_asr.models import SpeechLLMForConditionalGeneration
from unique_asr.models.speech_llm.projector import Frames
from unique_asr.training.decoders import PlainDecoder
from unique_asr.training.speech_batches import SpeechBatch, send


def compute_ctc_loss(frames: Frames, batch: SpeechBatch) -> Tensor:
    """Negative log-likelihood of the CTC targets, a mean over their tokens.

    Items of several windows are left out, for the text of each window is unknown.

    Args:
        frames: of all windows of the batch, in order.
    """
    single = (batch.windows == 1).tolist()
    first = (batch.windows.cumsum(0) - batch.windows).tolist()
    rows = [row for row, alone in zip(first, single, strict=True) if alone]
    targets = [target for target, alone in zip(batch.ctc_targets, single, strict=True) if alone]
    lengths = batch.spans[rows, 1].clamp(max=frames.logits.shape[1])
    device = frames.logits.device
    logits = frames.logits if len(rows) == len(frames.logits) else frames.logits[send(torch.tensor(rows), device)]
    loss = nn.functional.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        send(torch.tensor([token for target in targets for token in target], dtype=torch.long), device),
        lengths,
        torch.tensor([len(target) for target in targets]),
        blank=frames.logits.shape[-1] - 1,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / max(sum(map(len, targets)), 1)


def compute_llm_loss(
    model: SpeechLLMForConditionalGeneration,
    audio: Sequence[Tensor],
    batch: SpeechBatch,
    shape: tuple[int, int] | None = None,
    decoder: Callable[..., Tensor] | None = None,
    mark_decoded: bool = False,
    slips: float = 0.0,
    page_size: int | None = None,
    slips_share: float = 1.0,
) -> tuple[Tensor, int]:
    """Cross-entropy of the transcripts' tokens, a mean over all of them.

    Args:
        audio: positions [M, text hidden] of each item.
        batch: the LLM's side of the same items.
        shape: rows and length that the LLM is given; items that do not fit are left out, but for the shortest
            where none fits. None: a row for each item. Rows are padded on the right, where causal
            attention never looks.
        decoder: called as `PlainDecoder`; None: the LLM's own.
        mark_decoded: tell the LLM which tokens inference decodes one by one, the transcript's; all others are prefill.
        slips: share of the tokens that the LLM reads of its own transcript that are replaced by others of it.
        page_size: items share rows, and each begins with a page, so that its pages are those of inference; the model
            has to read with `TrainingAttention`. None: one item a row.
        slips_share: share of the items that have slips.

    Returns:
        The loss and the number of tokens that the LLM read, padding included.

    Raises:
        ValueError: an item has more tokens than all rows together.
    """
    device = audio[0].device
    parts = list(zip(batch.before, audio, batch.after, batch.labels, strict=True))
    lengths = [len(before) + len(positions) + len(after) for before, positions, after, _ in parts]
    rows, longest = shape or (len(parts), max(lengths))
    places = pack_rows(lengths, rows, longest, page_size or longest)
    if not places:
        shortest = min(range(len(parts)), key=lengths.__getitem__)
        if lengths[shortest] > rows * longest:
            raise ValueError(
                f"an item has {lengths[shortest]} tokens, {batch.labels[shortest]} of them its transcript's, more than "
                f"the {rows * longest} of a step: raise the stage's `tokens`, or lower `seconds`"
            )
        rows, longest, places, decoder = 1, lengths[shortest], {shortest: (0, 0)}, None
    ids = torch.zeros(rows, longest, dtype=torch.long)
    heard, read, targets = [], [], []  # where the positions are; where the tokens before `targets` are; what to predict
    decoded = torch.zeros(rows, longest, dtype=torch.bool)
    starts = torch.zeros(rows, longest, dtype=torch.int)
    for item, (row, begin) in places.items():
        before, positions, after, labels = parts[item]
        first = begin + len(before)
        last = first + len(positions)
        end = last + len(after)
        ids[row, begin:first] = torch.tensor(before)
        ids[row, last:end] = torch.tensor(after)
        answer = ids[row, end - labels : end]
        targets.append(answer.clone())
        if slips and (slips_share == 1 or torch.rand(()).item() < slips_share):
            slipped = torch.rand(labels) < slips
            answer[slipped] = targets[-1][torch.randint(labels, (int(slipped.sum()),))]
        heard.append(torch.arange(first, last) + row * longest)
        read.append(torch.arange(end - labels - 1, end - 1) + row * longest)
        decoded[row, end - labels : end] = True
        starts[row, begin:] = begin
    read_at = torch.cat(read)
    targets = send(torch.cat(targets), device)
    embeds = model.get_input_embeddings()(send(ids, device)).flatten(0, 1)
    positions = torch.cat([parts[item][1] for item in places]).to(embeds.dtype)
    embeds = embeds.index_copy(0, send(torch.cat(heard), device), positions)
    decoder = decoder or PlainDecoder(model.get_decoder())
    inputs = [decoded, starts] if page_size else [decoded] if mark_decoded else []
    states = decoder(embeds.unflatten(0, (rows, longest)), *(send(values, device) for values in inputs))
    logits = model.get_output_embeddings()(states.flatten(0, 1)[send(read_at, device)])
    return nn.functional.cross_entropy(logits.float(), targets), rows * longest


def pack_rows(lengths: Sequence[int], rows: int, length: int, step: int) -> dict[int, tuple[int, int]]:
    """Put each item into the first row that has room.

    Args:
        lengths: tokens of each item.
        rows, length: of the batch, in rows and tokens.
        step: items begin at multiples of it.

    Returns:
        By the index of each item that fits, its row and its first token.
    """
    ends, places = [0] * rows, {}
    for item, tokens in enumerate(lengths):
        row = next((row for row, end in enumerate(ends) if end + tokens <= length), None)
        if row is not None:
            places[item] = row, ends[row]
            ends[row] += -(-tokens // step) * step
    return places
