"""Positions that Whisper's decoder hears: one for each token that it would write of a window.

A frame-synchronous head (CTC) has to learn from the training speech what Whisper learned from 680,000 hours. Its own
decoder knows it: greedily decoded, each token's final state becomes a position of the LLM, beside its expected
embedding over the most likely tokens, in the LLM's own pieces. The LLM still reads one sequence for the whole
recording, and writes the text. LLMs on the states of an ASR model's decoder: arXiv 2310.06434 (Whispering LLaMA),
2408.16542 (SALSA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .projector import Frames, Positions

PIECES = 4  # tokens of the LLM that one of Whisper's may be cut into; what is beyond is left out
ALTERNATIVES = 8  # tokens that an expected embedding is over
UNHEARD = 6  # spikes of the CTC head that may lie between two tokens, and after the last one
TOKENS_A_SPIKE, MORE_TOKENS = 1.5, 8  # a window has at most so many tokens a spike, and so many more
REFUSALS = 4  # times that a window is kept from ending, at most
TOLERATED = 4  # spikes or tokens of a window that may be amiss; with more of them it is read again,
AHEAD = 40, 20  # each time with so many spikes after the last token in sight, about 12 and 6 s
MAX_PERIOD = 12  # tokens of a repetition of which no third copy may begin
MIN_REPETITION = 8  # tokens that its copies have together, at least


@dataclass
class Heard:
    """What was decoded of W windows, at most N tokens each.

    tokens [W, N] of Whisper's vocabulary, `stop` from the end on; weights [W, N, A] and candidates [W, N, A]: the most
    likely tokens of each step; hidden [W, N, d]: the decoder's last states; frames [W, N]: the encoder frame that each
    token was read from, never before that of the token before it; counts [W]: tokens of each window.
    """

    tokens: Tensor
    weights: Tensor
    candidates: Tensor
    hidden: Tensor
    frames: Tensor
    counts: Tensor

    def rows(self, which: Tensor) -> Heard:
        """Some of the windows."""
        return Heard(*(getattr(self, field.name)[which] for field in fields(self)))

    def replace(self, rows: Tensor, other: Heard, stop: int) -> Heard:
        """Windows `rows` [R] are those of `other`; what is shorter ends in `stop`."""
        length = max(self.tokens.shape[1], other.tokens.shape[1])
        parts = {}
        for field in fields(self):
            one, new = getattr(self, field.name), getattr(other, field.name)
            if one.ndim > 1:
                fill = stop if field.name == "tokens" else 0
                one, new = (
                    nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]), value=fill)
                    for x in (one, new)
                )
            parts[field.name] = one.index_copy(0, rows, new)
        return Heard(**parts)


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
        # Whisper's tokens in the LLM's pieces; -1 where there are fewer.
        self.register_buffer("pieces", torch.full((config.vocab_size, PIECES), -1, dtype=torch.int32))

    def expected(self, weights: Tensor, candidates: Tensor, embeddings: Tensor) -> Tensor:
        """weights, candidates [M, A]; embeddings: the LLM's table -> [M, text hidden]."""
        pieces = self.pieces[
            candidates
        ].long()  # [M, A, PIECES]; transformers 5.17 makes floats of them in 32-bit modules
        real = pieces >= 0
        share = weights / real.sum(-1).clamp_min(1)
        return torch.einsum(
            "map,maph->mh", (share[..., None] * real).to(embeddings.dtype), embeddings[pieces.clamp_min(0)]
        )

    def hear(self, frames: Frames, spans: Tensor, stack_factor: int) -> tuple[Heard, Tensor, Tensor]:
        """What is heard in windows, as frames of `stack_factor` of the encoder's: the frames [W, N] of the tokens, and
        which tokens [W, N] were read from the frames [start, end) of their window; spans [W, 2].
        """
        heard = self(frames.states, unheard=spikes_after(frames.logits).repeat_interleave(stack_factor, 1))
        places, spans = heard.frames // stack_factor, spans.to(heard.frames.device)
        return heard, places, (heard.tokens != self.stop) & (places >= spans[:, :1]) & (places < spans[:, 1:])

    def positions(self, frames: Frames, spans: Tensor, stack_factor: int, embeddings: Tensor) -> Positions:
        """A position for each token that `hear` keeps; embeddings: the LLM's table."""
        heard, places, keep = self.hear(frames, spans, stack_factor)
        expected = self.expected(heard.weights[keep], heard.candidates[keep], embeddings)
        return Positions(expected, heard.hidden[keep].to(expected.dtype), places[keep], keep.sum(1))

    @torch.no_grad()
    def forward(self, states: Tensor, limit: int | None = None, unheard: Tensor | None = None) -> Heard:
        """states [W, F, d] of the encoder; limit: tokens of a window at most, by default as many as Whisper allows.

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
        amiss = self.amiss(heard, unheard)
        for ahead in AHEAD:
            again = (amiss > TOLERATED).nonzero().flatten()
            if len(again) == 0:
                break
            other = self._read(states[again], limit, unheard[again], ahead)
            worth = self.amiss(other, unheard[again])
            better = worth < amiss[again]
            heard = heard.replace(again[better], other.rows(better), self.stop)
            amiss[again] = torch.minimum(amiss[again], worth)
        return heard

    def amiss(self, heard: Heard, unheard: Tensor) -> Tensor:
        """What is wrong with each reading [W]: spikes that it leaves out, more than `UNHEARD` at a time, and tokens
        that are too many; unheard: spikes after each frame, [W, F].
        """
        real = heard.tokens != self.stop
        edges = nn.functional.pad(unheard.gather(1, heard.frames) * real, (0, 1))  # spikes after each token
        between = torch.cat([unheard[:, :1], edges[:, :-1]], 1) - edges
        most = TOKENS_A_SPIKE * unheard[:, 0] + MORE_TOKENS
        return (between - UNHEARD).clamp(min=0).sum(1) + (heard.counts - most).clamp(min=0)

    def _read(
        self, states: Tensor, limit: int | None = None, unheard: Tensor | None = None, ahead: int | None = None
    ) -> Heard:
        """One reading, in which the decoder sees `ahead` spikes after its last token, and the silence after all speech,
        without which it writes noise. unheard: spikes after each frame, [W, F]; given them, it may not end early nor
        repeat itself for long.
        """
        positions, states = self.decoder.embed_positions.weight, states.to(self.decoder.embed_positions.weight.dtype)
        table = self.decoder.embed_tokens.weight.T.float()  # in 16 bits the end of a text often ties with a word
        limit = min(limit or len(positions) // 2, len(positions) - len(self.prompt))
        memory = _Memory(self.decoder, states, len(self.prompt) + limit)
        windows, device = len(states), states.device
        allowed = torch.zeros(len(self.pieces), device=device)
        allowed[self.stop + 1 :] = -torch.inf
        allowed[self.suppressed] = -torch.inf
        ended = torch.zeros(windows, dtype=torch.bool, device=device)
        refused, path = torch.zeros(windows, dtype=torch.long, device=device), ForwardPath()
        unseen = left = None
        if ahead is not None:
            unseen = (unheard > 0) & (unheard < unheard[:, :1] - ahead)
        for asked in self.prompt:
            state, attention = memory.step(torch.full((windows,), asked, device=device), unseen)
        latest = torch.full((windows, 2 * MAX_PERIOD), -1, device=device)
        found: list[tuple[Tensor, ...]] = []
        for _ in range(limit):
            logits = state.float() @ table + allowed
            if left is not None:
                logits.masked_fill_(repeating(latest, logits.shape[1]), -torch.inf)
                early = (left[:, 0] > UNHEARD) & (logits.argmax(-1) == self.stop) & ~ended & (refused < REFUSALS)
                refused += early
                logits[:, self.stop].masked_fill_(early, -torch.inf)
            weights, candidates = logits.softmax(-1).topk(ALTERNATIVES)
            token = candidates[:, 0].masked_fill(ended, self.stop)
            ended = ended | (token == self.stop)
            if bool(ended.all()):
                break
            heard = torch.stack([attention[layer][:, head] for layer, head in self.heads]).mean(0)
            path.add(heard.masked_fill(ended[:, None], 0.0))
            found.append((token, weights, candidates, state))
            if unheard is not None:
                left = unheard.gather(1, path.last)
                if ahead is not None:
                    unseen = (unheard > 0) & (unheard < left - ahead)
                latest = torch.cat([latest[:, 1:], token[:, None]], 1)
            state, attention = memory.step(token, unseen)
        if not found:
            return _nothing(states)
        tokens, weights, candidates, hidden = (torch.stack(each, 1) for each in zip(*found, strict=True))
        return Heard(tokens, weights, candidates, hidden, path.frames(), (tokens != self.stop).sum(1))


def spikes_after(logits: Tensor) -> Tensor:
    """Of CTC logits [W, T, C + 1], the blank last: the spikes after each frame, [W, T]."""
    best = logits.argmax(-1)
    new = nn.functional.pad(best[:, 1:] != best[:, :-1], (1, 0), value=True)
    spikes = ((best != logits.shape[-1] - 1) & new).long()
    return spikes.sum(1, keepdim=True) - spikes.cumsum(1)


def repeating(latest: Tensor, vocabulary: int) -> Tensor:
    """Of the latest tokens [W, 2 * MAX_PERIOD], -1 where there are fewer: the tokens, bool [W, vocabulary], that would
    begin a third copy of what they end with twice.
    """
    period = torch.arange(1, MAX_PERIOD + 1, device=latest.device)
    place = torch.arange(latest.shape[1], device=latest.device)
    length = (2 * period).clamp(min=MIN_REPETITION)  # of the repetition [MAX_PERIOD]
    compared = place >= (latest.shape[1] - length + period)[:, None]  # [MAX_PERIOD, 2 * MAX_PERIOD]
    copied = latest[:, (place - period[:, None]).clamp(min=0)]
    again = (((latest[:, None] == copied) & (copied >= 0)) | ~compared).all(-1)  # [W, MAX_PERIOD]
    count = torch.zeros(len(latest), vocabulary, dtype=torch.int32, device=latest.device)
    return count.scatter_add_(1, latest[:, -period].clamp(min=0), again.int()) > 0


class ForwardPath:
    """The frames [W, N], none before that of the token before it, whose scores [W, F] have the largest sum."""

    def __init__(self) -> None:
        self.best: Tensor | None = None  # [W, F], the largest sum that ends in a frame
        self.sources: list[Tensor] = []  # [W, F] of each token but the first: the frame of the token before

    def add(self, scores: Tensor) -> None:
        """Of the next token."""
        if self.best is None:
            self.best = scores.float()
            return
        before, source = self.best.cummax(-1)
        self.sources.append(source)
        self.best = before + scores

    @property
    def last(self) -> Tensor:
        """The frame of the last token [W, 1]."""
        return self.best.argmax(-1, keepdim=True)

    def frames(self) -> Tensor:
        path = [self.last]
        for source in reversed(self.sources):
            path.append(source.gather(1, path[-1]))
        return torch.cat(path[::-1], 1)


def _nothing(states: Tensor) -> Heard:
    windows, ids = len(states), {"dtype": torch.long, "device": states.device}
    none = torch.zeros(windows, 0, ALTERNATIVES, **ids)
    return Heard(
        none[..., 0], none.float(), none, states[:, :0], torch.zeros(windows, 0, **ids), torch.zeros(windows, **ids)
    )


class _Memory:
    """Keys and values of a decoder, in place; `step` runs one token of every window."""

    def __init__(self, decoder: WhisperDecoder, states: Tensor, capacity: int) -> None:
        self.decoder, self.length = decoder, 0
        first = decoder.layers[0].self_attn
        self.heads, self.size = first.num_heads, first.head_dim
        self.audio = [self._project(layer.encoder_attn, states) for layer in decoder.layers]
        shape = len(states), self.heads, capacity, self.size
        self.own = [(states.new_empty(shape), states.new_empty(shape)) for _ in decoder.layers]

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.heads, self.size)).transpose(-3, -2)  # [W, heads, N, size]

    def _project(self, attention: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        # Contiguous: a product of several windows would copy them at every step.
        return self._split(attention.k_proj(states)).contiguous(), self._split(attention.v_proj(states)).contiguous()

    def _attend(
        self, attention: nn.Module, query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        query = self._split(attention.q_proj(query)[:, None]) * self.size**-0.5
        scores = (query @ keys.transpose(-1, -2)).float()
        if unseen is not None:
            scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        weights = scores.softmax(-1)
        output = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(1)
        return attention.out_proj(output), weights[:, :, 0]

    def step(self, token: Tensor, unseen: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """token [W] -> last state [W, d], and each layer's attention over the encoder's frames [W, heads, F].

        unseen: bool [W, F], frames that the step does not see.
        """
        decoder, at = self.decoder, self.length
        state = decoder.embed_tokens(token) * getattr(decoder, "embed_scale", 1.0) + decoder.embed_positions.weight[at]
        self.length += 1
        heard = []
        for layer, (keys, values), audio in zip(decoder.layers, self.own, self.audio, strict=True):
            normed = layer.self_attn_layer_norm(state)
            new = self._project(layer.self_attn, normed[:, None])
            keys[:, :, at], values[:, :, at] = new[0][:, :, 0], new[1][:, :, 0]
            output, _ = self._attend(layer.self_attn, normed, keys[:, :, : at + 1], values[:, :, : at + 1])
            state = state + output
            output, weights = self._attend(layer.encoder_attn, layer.encoder_attn_layer_norm(state), *audio, unseen)
            heard.append(weights)
            state = state + output
            normed = layer.final_layer_norm(state)
            state = state + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return decoder.layer_norm(state), heard
