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
    table = model.get_input_embeddings()
    device = audio[0].device
    rows, targets, places = [], [], []
    longest = max(
        len(before) + len(positions) + len(after)
        for before, positions, after in zip(batch.before, audio, batch.after, strict=True)
    )
    for row, (before, positions, after, labels) in enumerate(
        zip(batch.before, audio, batch.after, batch.labels, strict=True)
    ):
        text = table(torch.tensor([*before, *after], device=device))
        parts = torch.cat([text[: len(before)], positions.to(text.dtype), text[len(before) :]])
        end = row * longest + len(parts) - 1
        places.append(torch.arange(end - labels, end, device=device))
        targets.append(torch.tensor(after[-labels:], device=device))
        rows.append(nn.functional.pad(parts, (0, 0, 0, longest - len(parts))))
    states = model.get_decoder()(inputs_embeds=torch.stack(rows), use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(states.flatten(0, 1)[torch.cat(places)])
    return nn.functional.cross_entropy(logits.float(), torch.cat(targets)), len(rows) * longest
