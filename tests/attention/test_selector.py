"""The interface of what a step reads, with a small selector of this file's own."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from paged_layers import DIM, GROUP, HEADS, filled_layer

from unique_asr.attention import PagedCache, SparseAttentionConfig, TokenSelector, reference, sparse_attention
from unique_asr.attention.buffers import grow_buffer
from unique_asr.attention.page_selector import PageSelector
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.steps import attend_static, read_prompt, run_eager_step

SCALING = DIM**-0.5


@dataclass
class EveryOther(TokenSelector):
    """Reads every `stride`-th token from the first one on, and remembers which slot each token was written in."""

    name: ClassVar[str] = "every_other"
    buffer_names: ClassVar[tuple[str, ...]] = ("written",)
    stride: int = 2

    def configure(self, budget, page_size, sink_pages):
        super().configure(budget, page_size, sink_pages)
        self.calls = []
        if budget is not None and budget < 16:
            raise ValueError(f"a budget of {budget} is too small")

    def begin_sequence(self, keys):
        self.calls.append("begin")
        self.written = torch.zeros(*keys.shape[:3], 1)

    def resize(self, keys):
        self.written = grow_buffer(self.written, self.written.shape[2], keys.shape[2])

    def read_prompt(self, query, keys, position, scaling):
        self.calls.append(("prompt", tuple(query.shape), keys.shape[2]))
        self.written[:, :, keys.shape[2] - query.shape[3] : keys.shape[2]] = 1

    def observe(self, query, keys, position, last):
        self.calls.append("observe")
        self.written.index_fill_(2, last, 1)

    def select(self, query, keys, position, last):
        self.calls.append("select")
        return position % self.stride == 0

    def count_tokens(self, length, prompt=None):
        return -(-length // self.stride)


def configure(budget=64, **settings):
    return SparseAttentionConfig(budget=budget, selector=EveryOther(), **settings)


def run_prompt(layer, query):
    """Show the selector all tokens of the layer but one as a prompt, then that one as a decode step."""
    length = layer.length
    layer.length = length - 1
    read_prompt(layer, query.expand(-1, -1, length - 1, -1), SCALING)
    layer.length = length


def test_unique_is_the_default():
    assert SparseAttentionConfig().selector is None
    layer, _ = filled_layer(SparseAttentionConfig(), 20)
    assert isinstance(layer.selector, PageSelector)


def test_a_step_reads_the_tokens_that_the_selector_chooses():
    layer, query = filled_layer(configure(), 101)
    run_prompt(layer, query)
    output = run_eager_step(layer, query, SCALING)
    keys, values = (buffer[:, :, :101:2] for buffer in (layer.keys, layer.values))
    torch.testing.assert_close(output, reference.attend(reference.group_queries(query, HEADS), keys, values, SCALING))
    assert layer.selector.calls == ["begin", ("prompt", (1, HEADS, GROUP, 100, DIM), 100), "observe", "select"]
    assert layer.count_reads(101).pages_read == HEADS * 7  # 51 tokens in pages of 8


def test_a_dense_step_is_observed_and_left_to_dense_attention():
    layer, query = filled_layer(configure(), 40)
    run_prompt(layer, query)
    assert run_eager_step(layer, query, SCALING) is None
    assert layer.selector.calls[-1] == "observe"


def test_positions_count_from_the_first_token_of_a_row():
    layer, query = filled_layer(configure(), 100, batch=2)
    valid = torch.arange(100) >= torch.tensor([[0], [13]])
    read_prompt(layer, query.expand(-1, -1, 99, -1), SCALING, valid)
    output = run_eager_step(layer, query, SCALING, valid)
    keys, values = (buffer[1:, :, 13:100:2] for buffer in (layer.keys, layer.values))
    expected = reference.attend(reference.group_queries(query[1:], HEADS), keys, values, SCALING)
    torch.testing.assert_close(output[1:], expected)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 13])])
@pytest.mark.parametrize("length", [40, 100])
def test_a_static_step_is_the_eager_one(starts, length):
    layer, query = filled_layer(configure(), length, batch=2)
    valid = None if starts is None else torch.arange(length) >= starts[:, None]
    read_prompt(layer, query.expand(-1, -1, length - 1, -1), SCALING, valid)
    expected = run_eager_step(layer, query, SCALING, valid)
    layer.step = StaticStep(torch.tensor([length - 1]), length > 64, layer.config, layer.capacity, starts)
    output = attend_static(layer, query, SCALING)
    if expected is None:
        queries, mask = reference.group_queries(query, HEADS), None if valid is None else valid[:, None, None]
        keys, values = (buffer[:, :, :length] for buffer in (layer.keys, layer.values))
        expected = reference.attend(queries, keys, values, SCALING, mask)
    torch.testing.assert_close(output, expected)


def test_state_follows_the_slots_of_the_cache():
    layer, query = filled_layer(configure(), 101, batch=2)
    run_prompt(layer, query)
    run_eager_step(layer, query, SCALING)
    layer.shift(16)
    assert layer.selector.written[0, 0, 16:117].all()
    other, _ = filled_layer(layer.config, 37, batch=1)
    run_prompt(other, query[:1])
    run_eager_step(other, query[:1], SCALING)
    other.selector.written *= 2
    other.update_statistics()
    layer.copy_rows(torch.tensor([1]), other)
    assert (layer.selector.written[1, 0, 80:117] == 2).all()
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.selector.written.shape[0] == 1
    assert (layer.selector.written[0, 0, 80:117] == 2).all()
    before = layer.capacity
    layer.reserve(before + 1)
    layer.selector.prepare(layer.keys)
    assert layer.selector.written.shape[2] == layer.capacity > before


def test_a_cache_that_no_selector_has_seen_moves():
    layer, _ = filled_layer(configure(), 101, batch=2)
    layer.update_statistics()
    layer.shift(16)
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.selector.calls == []


def test_every_layer_has_a_selector_of_its_own(llama):
    cache = PagedCache(llama.config, configure())
    selectors = [layer.selector for layer in cache.paged_layers]
    assert len({id(each) for each in selectors}) == len(selectors) == 3
    assert all(selector == EveryOther() for selector in selectors)


def test_the_selector_is_no_plain_setting():
    config = configure(page_size=16)
    assert "selector" not in config.to_dict()
    assert SparseAttentionConfig(**config.to_dict()) == replace(config, selector=None)
    assert replace(config, budget=128).selector == EveryOther()
    assert hash(config) == hash(replace(config, selector=None))


def test_a_budget_that_the_selector_cannot_work_with_is_refused():
    with pytest.raises(ValueError, match="a budget of 8 is too small"):
        SparseAttentionConfig(budget=8, sink_pages=0, recent_pages=1, selector=EveryOther())


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_caches_with_and_without_a_selector_beside_each_other(llama, dense_layers):
    """The model is the same; each cache is read as its own configuration says."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 97, (1, 100))
    options = {"budget": 64, "dense_layers": dense_layers}
    logits = {}
    with sparse_attention(llama), torch.no_grad():
        for selector in (None, EveryOther(), None, EveryOther(stride=1)):
            cache = PagedCache(llama.config, SparseAttentionConfig(selector=selector, **options))
            llama(tokens[:, :-1], past_key_values=cache)
            output = llama(tokens[:, -1:], past_key_values=cache).logits
            logits.setdefault(None if selector is None else selector.stride, []).append(output)
            asked = ["select" in getattr(layer.selector, "calls", []) for layer in cache.paged_layers]
            assert asked == [selector is not None and index >= dense_layers for index in range(3)]
        dense = llama(tokens, past_key_values=PagedCache(llama.config, SparseAttentionConfig(budget=None))).logits
    assert torch.equal(*logits[None])
    assert not torch.allclose(logits[2][0], logits[None][0])
    torch.testing.assert_close(logits[1][0][:, -1], dense[:, -1], rtol=1e-3, atol=1e-3)  # it reads everything
