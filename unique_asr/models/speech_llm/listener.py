"""Positions that Whisper's decoder hears: one for each token that it would write of a window.

A frame-synchronous head (CTC) has to learn from the training speech what Whisper learned from 680,000 hours. Its own
decoder knows it: greedily decoded, each token's final state becomes a position of the LLM, beside its expected
embedding over the most likely tokens, in the LLM's own pieces. The LLM still reads one sequence for the whole
recording, and writes the text. LLMs on the states of an ASR model's decoder: arXiv 2310.06434 (Whispering LLaMA),
2408.16542 (SALSA).
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from unique_asr.models.speech_llm.projector import Frames, Positions
from unique_asr.models.speech_llm.reading import MAX_UNHEARD_SPIKES, Heard, Reading

PIECES = 4  # tokens of the LLM that one of Whisper's may be cut into; what is beyond is left out
TOKENS_A_SPIKE, MORE_TOKENS = 1.5, 8  # a window has at most so many tokens a spike, and so many more
MAX_MISMATCH = 4  # missed spikes or surplus tokens of a window; with more of them it is read again,
LOOKAHEAD_SPIKES = 40, 20  # each time seeing only so many spikes after the last token, about 12 and 6 s
MAX_CAPTURED_WINDOWS = 32  # windows of a CUDA graph; their keys and values stay, 37 MB each with Whisper base


class Listener(nn.Module):
    """Whisper's decoder, with what it takes to decode.

    prompt: the token ids that ask for a transcript; stop: the id that ends one, after which come ids that are no text;
    heads: [layer, head] pairs whose cross-attention follows the audio; suppressed: ids that are never written.
    """

    def __init__(
        self,
        config: WhisperConfig,
        prompt: Sequence[int],
        stop: int,
        heads: Sequence[Sequence[int]],
        suppressed: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.decoder = WhisperDecoder(config)
        self.prompt, self.stop, self.heads = list(prompt), stop, [tuple(pair) for pair in heads]
        self.suppressed = [token for token in suppressed if token != stop]
        self._captured = _CapturedReading()
        # Whisper's tokens in the LLM's pieces; -1 where there are fewer.
        self.register_buffer("pieces", torch.full((config.vocab_size, PIECES), -1, dtype=torch.int32))

    def embed_expected(self, weights: Tensor, candidates: Tensor, embeddings: Tensor) -> Tensor:
        """Average the LLM's embeddings over weighted candidates, both [M, A] -> [M, text hidden]."""
        pieces = self.pieces[
            candidates
        ].long()  # [M, A, PIECES]; transformers 5.17 makes floats of them in 32-bit modules
        real = pieces >= 0
        share = weights / real.sum(-1).clamp_min(1)
        return torch.einsum(
            "map,maph->mh", (share[..., None] * real).to(embeddings.dtype), embeddings[pieces.clamp_min(0)]
        )

    def hear(self, frames: Frames, spans: Tensor, stack_factor: int) -> tuple[Heard, Tensor, Tensor]:
        """Decode windows; also give the stacked frame [W, N] of each token and which tokens lie in spans [W, 2]."""
        heard = self(frames.states, unheard=count_spikes_after(frames.logits).repeat_interleave(stack_factor, 1))
        places, spans = heard.frames // stack_factor, spans.to(heard.frames.device)
        return heard, places, (heard.tokens != self.stop) & (places >= spans[:, :1]) & (places < spans[:, 1:])

    def make_positions(self, frames: Frames, spans: Tensor, stack_factor: int, embeddings: Tensor) -> Positions:
        """Make a position of each token that `hear` keeps; embeddings: the LLM's table."""
        heard, places, keep = self.hear(frames, spans, stack_factor)
        expected = self.embed_expected(heard.weights[keep], heard.candidates[keep], embeddings)
        return Positions(expected, heard.hidden[keep].to(expected.dtype), places[keep], keep.sum(1))

    @torch.no_grad()
    def forward(self, states: Tensor, limit: int | None = None, unheard: Tensor | None = None) -> Heard:
        """Decode encoder states [W, F, d]; limit: tokens of a window, by default as many as Whisper allows.

        unheard: [W, F' <= F], the CTC head's spikes after each frame, the last for all beyond. Whisper at times ends in
        the middle of a window, leaps to a later place or repeats itself, above all without its own times. Where the
        spikes tell of that, the window is read again with less of it in sight, and the best reading stays. None: as
        Whisper.
        """
        if unheard is None:
            return self._read(states, limit)
        beyond = unheard[:, -1:].expand(-1, states.shape[1] - unheard.shape[1])
        unheard = torch.cat([unheard, beyond], 1)
        heard = self._read(states, limit, unheard)
        amiss = self.count_mismatches(heard, unheard)
        for ahead in LOOKAHEAD_SPIKES:
            again = (amiss > MAX_MISMATCH).nonzero().flatten()
            if len(again) == 0:
                break
            other = self._read(states[again], limit, unheard[again], ahead)
            worth = self.count_mismatches(other, unheard[again])
            better = worth < amiss[again]
            heard = heard.replace(again[better], other.select(better), self.stop)
            amiss[again] = torch.minimum(amiss[again], worth)
        return heard

    def count_mismatches(self, heard: Heard, unheard: Tensor) -> Tensor:
        """Count the missed spikes and surplus tokens of each window [W]; unheard: spikes after each frame, [W, F]."""
        real = heard.tokens != self.stop
        edges = nn.functional.pad(unheard.gather(1, heard.frames) * real, (0, 1))  # spikes after each token
        between = torch.cat([unheard[:, :1], edges[:, :-1]], 1) - edges
        most = TOKENS_A_SPIKE * unheard[:, 0] + MORE_TOKENS
        return (between - MAX_UNHEARD_SPIKES).clamp(min=0).sum(1) + (heard.counts - most).clamp(min=0)

    @torch.no_grad()
    def _read(
        self, states: Tensor, limit: int | None = None, unheard: Tensor | None = None, ahead: int | None = None
    ) -> Heard:
        """Read windows once, seeing `ahead` spikes after the last token; unheard: spikes after each frame, [W, F]."""
        positions = self.decoder.embed_positions.weight
        states = states.to(positions.dtype)
        limit = min(limit or len(positions) // 2, len(positions) - len(self.prompt))
        with self._captured.lock:
            reading = self._prepare_reading(states, limit, unheard is not None)
            reading.begin(states, unheard, ahead)
            for done in range(limit):
                reading.next()
                if bool(reading.ended.all()):
                    return reading.collect(len(states), done)
            return reading.collect(len(states), limit)

    def _prepare_reading(self, states: Tensor, limit: int, spikes: bool) -> Reading:
        """Make a reading, or on CUDA take the captured one if it is large enough."""
        windows, frames = states.shape[:2]
        if states.device.type != "cuda" or windows > MAX_CAPTURED_WINDOWS or not spikes:
            return Reading(self, windows, frames, limit, spikes)
        made_of = frames, limit, *(parameter.data_ptr() for parameter in self.decoder.parameters())
        held = self._captured.reading
        if held is None or held.windows < windows or self._captured.made_of != made_of:
            self._captured.reading = held = None  # its memory is free for the new one
            held = Reading(self, 1 << (windows - 1).bit_length(), frames, limit, spikes, capture=True)
            self._captured.reading, self._captured.made_of = held, made_of
        return held


def count_spikes_after(logits: Tensor) -> Tensor:
    """Count the spikes after each frame, [W, T], of CTC logits [W, T, C + 1] with the blank last."""
    best = logits.argmax(-1)
    new = nn.functional.pad(best[:, 1:] != best[:, :-1], (1, 0), value=True)
    spikes = ((best != logits.shape[-1] - 1) & new).long()
    return spikes.sum(1, keepdim=True) - spikes.cumsum(1)


class _CapturedReading:
    """The reading of a listener's CUDA graph, which is not copied with the listener."""

    def __init__(self) -> None:
        self.lock = Lock()  # one at a time
        self.reading: Reading | None = None
        self.made_of: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _CapturedReading, ()
