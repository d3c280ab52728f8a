"""The two losses: CTC of the projector's head, and next-token cross-entropy of the LLM on the transcript."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unique_asr.models import SpeechLLMForConditionalGeneration
from unique_asr.models.projector import Frames

from .batches import Batch


def ctc_loss(frames: Frames, batch: Batch) -> Tensor:
    """Mean negative log-likelihood a target token, over the items of one window (texts of cut windows are unknown)."""
    single = (batch.windows == 1).tolist()
    first = (batch.windows.cumsum(0) - batch.windows).tolist()
    rows = [row for row, alone in zip(first, single, strict=True) if alone]
    targets = [target for target, alone in zip(batch.ctc_targets, single, strict=True) if alone]
    lengths = batch.spans[rows, 1].clamp(max=frames.logits.shape[1])
    log_probs = frames.logits[rows].float().log_softmax(-1).transpose(0, 1)
    loss = nn.functional.ctc_loss(
        log_probs,
        torch.tensor([token for target in targets for token in target], device=log_probs.device),
        lengths,
        torch.tensor([len(target) for target in targets]),
        blank=frames.logits.shape[-1] - 1,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / max(sum(map(len, targets)), 1)


def language_model_loss(
    model: SpeechLLMForConditionalGeneration, audio: list[Tensor], batch: Batch
) -> tuple[Tensor, int]:
    """Mean cross-entropy over the transcripts' tokens, and the number of tokens that the LLM read.

    audio: per item, its positions [M, text hidden]. Rows are padded on the right, where causal attention never looks.
    """
    device = audio[0].device
    lengths = [
        len(before) + len(positions) + len(after)
        for before, positions, after in zip(batch.before, audio, batch.after, strict=True)
    ]
    rows, longest = len(lengths), max(lengths)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    heard, read = [], []  # places of the positions, and of the tokens before those to predict, in the flat batch
    for row, (before, positions, after, labels) in enumerate(
        zip(batch.before, audio, batch.after, batch.labels, strict=True)
    ):
        first, last = len(before), len(before) + len(positions)
        ids[row, :first] = torch.tensor(before)
        ids[row, last : lengths[row]] = torch.tensor(after)
        heard.append(torch.arange(first, last) + row * longest)
        read.append(torch.arange(lengths[row] - labels - 1, lengths[row] - 1) + row * longest)
    read_at = torch.cat(read)
    targets = ids.flatten()[read_at + 1].to(device)
    embeds = model.get_input_embeddings()(ids.to(device)).flatten(0, 1)
    embeds = embeds.index_copy(0, torch.cat(heard).to(device), torch.cat(list(audio)).to(embeds.dtype))
    decoder = model.get_decoder()
    states = decoder(inputs_embeds=embeds.unflatten(0, (rows, longest)), use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(states.flatten(0, 1)[read_at.to(device)])
    return nn.functional.cross_entropy(logits.float(), targets), rows * longest
