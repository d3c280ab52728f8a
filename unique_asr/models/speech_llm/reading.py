"""One reading of windows by Whisper's decoder, a token of every window at a time; on CUDA in a graph.

What the CTC head has heard, its spikes, keeps the decoder from ending early and from leaping ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from unique_asr.attention.cuda_graph import capture_graph

ALTERNATIVES = 8  # tokens that an expected embedding is over
MAX_UNHEARD_SPIKES = 6  # spikes of the CTC head that may lie between two tokens, and after the last one
MAX_REFUSALS = 4  # times that a window is kept from ending, at most
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

    def select(self, which: Tensor) -> Heard:
        """Select some of the windows."""
        return Heard(*(getattr(self, field.name)[which] for field in fields(self)))

    def replace(self, rows: Tensor, other: Heard, stop: int) -> Heard:
        """Replace windows `rows` [R] by those of `other`; what is shorter is padded with `stop`."""
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


class Reading:
    """One reading of W windows. Each step has the same shapes and reads nothing on the host, as a CUDA graph needs it.

    listener: the `Listener` whose decoder reads. spikes: whether the reading is told of the CTC head's spikes.
    capture: run the step in a CUDA graph.
    """

    def __init__(
        self, listener: nn.Module, windows: int, frames: int, limit: int, spikes: bool, capture: bool = False
    ) -> None:
        decoder = listener.decoder
        weight = decoder.embed_positions.weight
        device, width = weight.device, weight.shape[1]
        attention = decoder.layers[0].self_attn
        self.windows, self.spikes, self.capture = windows, spikes, capture
        self.decoder, self.prompt, self.stop, self.heads = decoder, listener.prompt, listener.stop, listener.heads
        self.attention_heads, self.size = attention.num_heads, attention.head_dim
        self.table = decoder.embed_tokens.weight.T.float()  # in 16 bits the end of a text often ties with a word
        self.allowed = torch.zeros(len(listener.pieces), device=device)
        self.allowed[self.stop + 1 :] = -torch.inf
        self.allowed[listener.suppressed] = -torch.inf
        self._graph: torch.cuda.CUDAGraph | None = None

        shape = windows, self.attention_heads, len(self.prompt) + limit, self.size
        self.own = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in decoder.layers]
        self.audio: list[tuple[Tensor, Tensor]] = []
        whole = {"dtype": torch.long, "device": device}
        self.position, self.count = torch.zeros(1, **whole), torch.zeros(1, **whole)
        self.token, self.refused = torch.zeros(windows, **whole), torch.zeros(windows, **whole)
        self.ended = torch.zeros(windows, dtype=torch.bool, device=device)
        self.latest = torch.zeros(windows, 2 * MAX_PERIOD, **whole)
        self.unheard, self.ahead = torch.zeros(windows, frames, **whole), torch.zeros((), **whole)
        self.left = torch.zeros(windows, 1, **whole)  # spikes after the last token
        self.unseen = torch.zeros(windows, frames, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(limit, windows, **whole)
        self.weights = torch.zeros(limit, windows, ALTERNATIVES, device=device)
        self.candidates = torch.zeros(limit, windows, ALTERNATIVES, **whole)
        self.hidden = weight.new_zeros(limit, windows, width)
        self.path = ForwardPath(windows, frames, limit, device)

    def begin(self, states: Tensor, unheard: Tensor | None, ahead: int | None) -> None:
        """Begin with encoder states [W' <= W, F, d]; windows beyond have ended."""
        real = len(states)
        self._hear(states)
        for state in (self.position, self.count, self.refused, self.left, self.path.best, self.unheard):
            state.zero_()
        self.latest.fill_(-1)
        self.ended.fill_(True)[:real] = False
        if unheard is not None:
            self.unheard[:real] = unheard
        self.ahead.fill_(self.unheard.shape[1] if ahead is None else ahead)  # all of them: no frame has two spikes
        self._look(self.unheard[:, :1])
        for asked in self.prompt[:-1]:
            self.token.fill_(asked)
            self._state()
        self.token.fill_(self.prompt[-1])

    def next(self) -> None:
        """Read one token of every window."""
        if not self.capture:
            self._step()
            return
        if self._graph is None:
            changed = self.position, self.count, self.token, self.refused, self.ended, self.latest, self.left
            self._graph = capture_graph(self._step, [*changed, self.unseen, self.path.best])
        self._graph.replay()

    def collect(self, windows: int, count: int) -> Heard:
        """Collect the first `count` tokens, all that were read, of the first `windows` windows."""
        tokens, weights, candidates, hidden = (
            values[:count, :windows].transpose(0, 1).clone()
            for values in (self.tokens, self.weights, self.candidates, self.hidden)
        )
        frames = self.path.trace_frames(count)[:windows]
        return Heard(tokens, weights, candidates, hidden, frames, (tokens != self.stop).sum(1))

    def _step(self) -> None:
        state, attention = self._state()
        logits = state.float() @ self.table + self.allowed
        if self.spikes:
            logits.masked_fill_(find_repeating(self.latest, logits.shape[1]), -torch.inf)
            early = (self.left[:, 0] > MAX_UNHEARD_SPIKES) & (logits.argmax(-1) == self.stop)
            early &= ~self.ended & (self.refused < MAX_REFUSALS)
            self.refused += early
            logits[:, self.stop].masked_fill_(early, -torch.inf)
        weights, candidates = logits.softmax(-1).topk(ALTERNATIVES)
        self.token.copy_(candidates[:, 0].masked_fill(self.ended, self.stop))
        self.ended |= self.token == self.stop
        self.path.add(self.count, attention.masked_fill(self.ended[:, None], 0.0), ~self.ended.all())
        if self.spikes:
            self.left.copy_(self.unheard.gather(1, self.path.last))
            self._look(self.left)
            self.latest.copy_(torch.cat([self.latest[:, 1:], self.token[:, None]], 1))
        for kept, new in (
            (self.tokens, self.token),
            (self.weights, weights),
            (self.candidates, candidates),
            (self.hidden, state),
        ):
            kept.index_copy_(0, self.count, new[None])
        self.count += 1

    def _look(self, left: Tensor) -> None:
        """Hide from the next steps what lies more than `ahead` spikes after the last token, which has `left` [W, 1]."""
        self.unseen.copy_((self.unheard > 0) & (self.unheard < left - self.ahead))

    def _state(self) -> tuple[Tensor, Tensor]:
        """Compute the decoder's last state [W, d] after `token`, and the attention [W, F] of its alignment heads."""
        decoder = self.decoder
        state = decoder.embed_tokens(self.token) * getattr(decoder, "embed_scale", 1.0)
        state = state + decoder.embed_positions.weight[self.position]
        later = torch.arange(self.own[0][0].shape[2], device=state.device) > self.position
        looks = []
        for layer, (keys, values), audio in zip(decoder.layers, self.own, self.audio, strict=True):
            normed = layer.self_attn_layer_norm(state)
            for kept, new in zip((keys, values), self._project(layer.self_attn, normed[:, None]), strict=True):
                kept.index_copy_(2, self.position, new)
            state = state + self._attend(layer.self_attn, normed, keys, values, later)[0]
            output, weights = self._attend(
                layer.encoder_attn, layer.encoder_attn_layer_norm(state), *audio, self.unseen[:, None, None]
            )
            looks.append(weights)
            state = state + output
            normed = layer.final_layer_norm(state)
            state = state + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        self.position += 1
        return decoder.layer_norm(state), torch.stack([looks[layer][:, head] for layer, head in self.heads]).mean(0)

    def _hear(self, states: Tensor) -> None:
        """Compute keys and values of the audio, in place where a graph holds their addresses."""
        audio = [self._project(layer.encoder_attn, states) for layer in self.decoder.layers]
        if not self.capture:
            self.audio = audio
            return
        if not self.audio:
            shape = self.windows, *audio[0][0].shape[1:]
            self.audio = [(keys.new_zeros(shape), values.new_zeros(shape)) for keys, values in audio]
        for kept, new in zip(self.audio, audio, strict=True):
            for one, other in zip(kept, new, strict=True):
                one[: len(states)] = other

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.attention_heads, self.size)).transpose(-3, -2)  # [W, heads, N, size]

    def _project(self, attention: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        # Contiguous: a product of several windows would copy them at every step.
        return self._split(attention.k_proj(states)).contiguous(), self._split(attention.v_proj(states)).contiguous()

    def _attend(
        self, attention: nn.Module, query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor
    ) -> tuple[Tensor, Tensor]:
        query = self._split(attention.q_proj(query)[:, None]) * self.size**-0.5
        scores = (query @ keys.transpose(-1, -2)).float().masked_fill(unseen, -torch.inf)
        weights = scores.softmax(-1)
        output = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(1)
        return attention.out_proj(output), weights[:, :, 0]


class ForwardPath:
    """The frames [W, N <= limit], none before that of the token before it, whose scores [W, F] have the largest sum."""

    def __init__(self, windows: int, frames: int, limit: int, device: torch.device | None = None) -> None:
        self.best = torch.zeros(windows, frames, device=device)  # the largest sum that ends in a frame
        # of each token: the frame of the token before
        self.sources = torch.zeros(limit, windows, frames, dtype=torch.int16, device=device)

    def add(self, at: Tensor, scores: Tensor, more: Tensor) -> None:
        """Add the scores [W, F] of token number `at` [1]; without `more`, nothing changes."""
        before, source = self.best.cummax(-1)
        self.sources.index_copy_(0, at, source[None].to(self.sources.dtype))
        self.best.copy_(torch.where(more, before + scores, self.best))

    @property
    def last(self) -> Tensor:
        """The frame of the last token [W, 1]."""
        return self.best.argmax(-1, keepdim=True)

    def trace_frames(self, count: int) -> Tensor:
        """Trace the best-path frames [W, count] of all `count` tokens."""
        path = [self.last]
        for source in reversed(self.sources[1:count].unbind()):
            path.append(source.gather(1, path[-1]).long())
        return torch.cat(path[::-1], 1)[:, :count]


def find_repeating(latest: Tensor, vocabulary: int) -> Tensor:
    """Find the tokens, bool [W, vocabulary], that would begin a third copy of the end of `latest` [W, L]."""
    period = torch.arange(1, MAX_PERIOD + 1, device=latest.device)
    place = torch.arange(latest.shape[1], device=latest.device)
    length = (2 * period).clamp(min=MIN_REPETITION)  # of the repetition [MAX_PERIOD]
    compared = place >= (latest.shape[1] - length + period)[:, None]  # [MAX_PERIOD, 2 * MAX_PERIOD]
    copied = latest[:, (place - period[:, None]).clamp(min=0)]
    again = (((latest[:, None] == copied) & (copied >= 0)) | ~compared).all(-1)  # [W, MAX_PERIOD]
    count = torch.zeros(len(latest), vocabulary, dtype=torch.int32, device=latest.device)
    return count.scatter_add_(1, latest[:, -period].clamp(min=0), again.int()) > 0
