"""Switches of one model end in any order, and copies of a switched model are switched for themselves."""

import copy
import itertools
import pickle
import threading
from functools import partial

import pytest
import torch

from unique_asr.attention import DecodeStep, SparseAttentionConfig, sparse_attention, training_attention
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.huggingface import AttentionLoan
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING
from unique_asr.decoding.greedy import GreedyDecoder

PROMPT = torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(0))
SWITCHES = {
    "sparse": partial(sparse_attention, budget=64),
    "other budget": partial(sparse_attention, budget=72),
    "training": partial(training_attention, mode="soft", budget=64),
}
IMPLEMENTATIONS = {"sparse": "unique", "other budget": "unique", "training": "unique_training"}


def list_own(model):
    """List what modules of a model have of their own beside parameters, that a switch could have left."""
    return [
        (name, key)
        for name, module in model.named_modules()
        for key in vars(module)
        if key not in ("_is_hf_initialized", "_forward_pre_hooks_with_kwargs")
    ] + [module._forward_pre_hooks for module in model.modules() if module._forward_pre_hooks]


def generate(model, tokens=3):
    return model.generate(PROMPT, max_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_any_order(llama, order):
    """The newest that is still on decides, and the last one leaves the model as it was."""
    before, expected = list_own(llama), generate(llama)
    on = {name: switch(llama) for name, switch in SWITCHES.items()}
    for index in order:
        newest = list(on)[-1]
        assert llama.config._attn_implementation == IMPLEMENTATIONS[newest]
        assert (llama.model.layers[0].self_attn.__dict__.get("training_attentions") is not None) == ("training" in on)
        if newest != "training":
            steps = {name: each.counters.steps for name, each in on.items() if name != "training"}
            generate(llama)
            assert all(on[name].counters.steps == 2 * (name == newest) + steps[name] for name in steps)
        on.pop(list(SWITCHES)[index]).restore()
    assert llama.config._attn_implementation == "sdpa"
    assert list_own(llama) == before
    assert torch.equal(generate(llama), expected)


def test_two_trainings_end_in_any_order(llama):
    layer, before = llama.model.layers[0].self_attn, list_own(llama)
    first, second = (training_attention(llama, mode="soft", budget=budget) for budget in (64, 72))
    first.restore()
    assert layer.training_attentions == [second]
    llama(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    first.apply()
    second.restore()
    assert layer.training_attentions == [first]
    llama(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    first.restore()
    assert list_own(llama) == before


@pytest.mark.parametrize("name", SWITCHES)
def test_twice(llama, name):
    """`restore` twice, `with` twice, `with` after `restore`, and `restore` inside the block."""
    before = list_own(llama)
    switch = SWITCHES[name](llama)
    with switch:
        with switch:
            pass
        assert llama.config._attn_implementation == IMPLEMENTATIONS[name]
    assert llama.config._attn_implementation == "sdpa"
    with switch:
        assert llama.config._attn_implementation == IMPLEMENTATIONS[name]
        switch.restore()
        switch.restore()
        assert llama.config._attn_implementation == "sdpa"
    assert list_own(llama) == before


@pytest.mark.parametrize("name", SWITCHES)
def test_an_error_inside(llama, name):
    before = list_own(llama)
    with pytest.raises(KeyError), SWITCHES["training"](llama), SWITCHES[name](llama):
        raise KeyError
    assert list_own(llama) == before
    assert llama.config._attn_implementation == "sdpa"


def copy_by_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy_by_pickle])
def test_a_copy_of_a_switched_model(llama, make_copy):
    """It generates sparsely, counts for itself, and does not notice what becomes of the original."""
    with sparse_attention(llama, budget=64) as sparse:
        expected = generate(llama)
        other, others = make_copy((llama, sparse))
        alone = make_copy(llama)
    assert llama.config._attn_implementation == "sdpa"
    assert (sparse.counters.steps, others.counters.steps) == (2, 2)
    for model in (other, alone):
        assert torch.equal(generate(model), expected)
    assert (sparse.counters.steps, others.counters.steps) == (2, 4)
    others.restore()
    assert other.config._attn_implementation == "sdpa"
    assert list_own(other) == list_own(llama)
    assert torch.equal(generate(other), generate(llama))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy_by_pickle])
def test_a_copy_of_a_model_in_training(llama, make_copy):
    with training_attention(llama, mode="soft", budget=64) as training:
        expected = llama(PROMPT, labels=PROMPT, use_cache=False).loss
        other, others = make_copy((llama, training))
    assert torch.equal(other(PROMPT, labels=PROMPT, use_cache=False).loss, expected)
    others.restore()
    assert list_own(other) == list_own(llama)
    assert torch.equal(other(PROMPT, labels=PROMPT, use_cache=False).loss, llama(PROMPT, labels=PROMPT).loss)


def test_a_method_that_somebody_replaced_meanwhile_stays(llama):
    def replaced(*args, **kwargs):
        raise KeyError

    with sparse_attention(llama, budget=64):
        llama._prepare_cache_for_generation = replaced
    assert llama._prepare_cache_for_generation is replaced


def decode(kind, model, static, budget=64):
    decoder = kind(model, SparseAttentionConfig(budget=budget), static=static)
    sequence = decoder if kind is GreedyDecoder else decoder.new_sequence()
    sequence.prefill(model.get_input_embeddings()(PROMPT).detach())
    tokens = []
    for token in sequence.tokens(4):
        if token is PENDING:
            decoder.step()
        else:
            tokens.append(token)
            yield
    assert sequence.counters.sparse_steps == (3 if budget < 90 else 0)
    assert sequence.counters.steps == 3
    yield tokens


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", [GreedyDecoder, BatchEngine])
def test_a_decoder_leaves_the_model_as_it_was(llama, kind, static):
    """Made in a block and used after it, beside another decoder, and between two tokens the model is its owner's."""
    before, expected = list_own(llama), generate(llama, 4)
    *_, alone = decode(kind, llama, static)
    *_, dense = decode(kind, llama, static, budget=1024)
    assert dense == expected[0, 90:].tolist()
    with sparse_attention(llama, budget=64):
        first, second = decode(kind, llama, static), decode(kind, llama, static)
        next(first)
    for _ in range(3):
        next(first)
        next(second)
        assert llama.config._attn_implementation == "sdpa"
        assert torch.equal(generate(llama, 4), expected)
    assert next(first) == alone
    next(second)
    assert next(second) == alone
    assert list_own(llama) == before


def test_threads_share_a_model(llama):
    """The last one to leave puts the attention back."""
    loans, inside, done = [AttentionLoan(llama, "unique") for _ in range(2)], threading.Event(), threading.Event()

    def hold():
        with loans[1]:
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    with loans[0]:
        thread.start()
        assert inside.wait(10)
    assert llama.config._attn_implementation == "unique"
    done.set()
    thread.join()
    assert llama.config._attn_implementation == "sdpa"


def test_a_cache_that_outlives_its_block(llama):
    """A loop is warned, as its steps are dense and not counted; a static step would attend to nothing else."""
    with sparse_attention(llama, budget=64) as sparse, torch.no_grad():
        cache = sparse.make_cache()
        step = DecodeStep(llama, cache)
        step.choose(llama(PROMPT, **{CACHE_ARGUMENT: cache}).logits[:, -1])
        step.run()
    with pytest.raises(ValueError, match="use the cache within the block"):
        step.run()
    llama(PROMPT[:, :1], **{CACHE_ARGUMENT: cache})
    with pytest.warns(UserWarning, match="use the cache within the block"):
        llama(PROMPT[:, :1], **{CACHE_ARGUMENT: cache})
    assert sparse.counters.steps == 1


@pytest.mark.parametrize("switch", [sparse_attention, training_attention])
@pytest.mark.parametrize(
    "wrong", ["x", None, torch.nn.Linear(2, 2), torch.nn.Sequential, torch.nn.DataParallel], ids=str
)
def test_what_is_no_model_is_refused(switch, wrong):
    with pytest.raises(ValueError, match="give a model of transformers"):
        switch(wrong)


@pytest.mark.parametrize("switch", [sparse_attention, training_attention])
def test_what_is_no_configuration_is_refused(llama, switch):
    with pytest.raises(ValueError, match="AttentionConfig, or fields"):
        switch(llama, 512)


@pytest.mark.parametrize("switch", [sparse_attention, training_attention])
@pytest.mark.parametrize("layers", [3, 99])
def test_dense_layers_leave_one(llama, layers, switch):
    with pytest.raises(ValueError, match=r"LlamaConfig has 3 layers.*at most 2"):
        switch(llama, dense_layers=layers)
    switch(llama, dense_layers=layers, budget=None).restore()
    switch(llama, dense_layers=2).restore()


def test_a_cache_with_gradients_can_be_copied(llama):
    with sparse_attention(llama, budget=64) as sparse:
        cache = sparse.make_cache()
        tokens = torch.arange(1, 91)[None]
        llama(tokens, **{CACHE_ARGUMENT: cache})
        llama(tokens[:, :1], **{CACHE_ARGUMENT: cache})
        assert cache.layers[0].keys.requires_grad
        copied = copy.deepcopy(cache)
        assert not copied.layers[0].keys.requires_grad
        logits = [llama(tokens[:, :1], **{CACHE_ARGUMENT: each}).logits for each in (cache, copied)]
    torch.testing.assert_close(*logits)
