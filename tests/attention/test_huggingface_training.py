"""Training through the page selection inside transformers: masks, gradients, and what is refused."""

import copy
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from decoder_models import make_decoder
from transformers import Qwen3Config, Qwen3ForCausalLM

from unique_asr.attention import sparse_attention
from unique_asr.attention.huggingface_training import (
    find_kernel,
    make_starts_mask,
    training_attention,
    training_attention_forward,
)
from unique_asr.attention.soft_mask import TrainingAttentionConfig, attention


def tokens_of(count, seed=0):
    return torch.randint(1, 97, (2, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_through_it(llama, checkpointing):
    ids = tokens_of(90)
    decoded = torch.arange(90).expand(2, -1) >= 60
    gradients = []
    for _ in range(2):
        llama.zero_grad()
        llama.train()
        if checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        with training_attention(llama, mode="soft", budget=40):
            llama(input_ids=ids, labels=ids, decoded=decoded, use_cache=False).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in llama.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(value.isfinite().all() for value in gradients[0].values())
    llama.zero_grad()
    llama.gradient_checkpointing_disable()
    with training_attention(llama, mode="soft", budget=40):
        llama(input_ids=ids, labels=ids, decoded=decoded, use_cache=False).loss.backward()
    for name, value in llama.named_parameters():
        torch.testing.assert_close(value.grad, gradients[0][name], rtol=1e-4, atol=1e-6)
    assert llama.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "training_attention") for module in llama.modules())


def test_hard_rows_are_those_of_sparse_decoding(llama):
    """The logits of a decoded token are what the sparse decode step gives, which is another implementation."""
    ids = tokens_of(93)[:1]
    with training_attention(llama, mode="hard", budget=40), torch.no_grad():
        decoded = torch.arange(93)[None] >= 60
        trained = llama(input_ids=ids, decoded=decoded, use_cache=False).logits
    with sparse_attention(llama, budget=40) as sparse, torch.no_grad():
        cache = sparse.make_cache()
        logits = [llama(input_ids=ids[:, :60], past_key_values=cache).logits]
        logits += [llama(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(60, 93)]
    assert sparse.counters.sparse_steps == 33
    torch.testing.assert_close(trained, torch.cat(logits, dim=1), rtol=1e-4, atol=1e-4)


def test_padding_and_packing_reach_the_attention(llama):
    llama.double()
    ids = tokens_of(80)
    settings = {"mode": "soft", "budget": 40, "queries": "all"}
    with training_attention(llama, **settings), torch.no_grad():
        alone = llama(input_ids=ids[:1], use_cache=False).logits
        mask = torch.ones(2, 96, dtype=torch.long)
        mask[0, :16] = 0
        padded = torch.cat([torch.zeros(2, 16, dtype=torch.long), ids], dim=1)
        positions = (torch.arange(96) - 16).clamp(min=0).expand(2, -1)
        left = llama(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        right = torch.cat([ids[:1], torch.zeros(1, 16, dtype=torch.long)], dim=1)
        right = llama(input_ids=right, attention_mask=mask[:1].flip(1), use_cache=False).logits
        positions = torch.cat([torch.arange(80), torch.arange(80)])[None]
        packed = llama(input_ids=ids.flatten()[None], position_ids=positions, use_cache=False).logits
        second = llama(input_ids=ids[1:], use_cache=False).logits
    torch.testing.assert_close(left[:1, 16:], alone)
    torch.testing.assert_close(right[:, :80], alone)
    torch.testing.assert_close(packed[:, :80], alone)
    torch.testing.assert_close(packed[:, 80:], second)


def test_starts():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    assert make_starts_mask(1, 6, 6, attention_mask=mask).flatten().tolist() == [0, 1, 2, 2, 2, 5]
    assert make_starts_mask(1, 6, 6) is None


def test_another_model_with_lora(llama):
    """Gradients reach an adapter on the queries and the keys."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "pad_token_id": 0}
    model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    with training_attention(model.base_model.model, mode="soft", budget=40, queries="all"):
        model(input_ids=tokens_of(70), labels=tokens_of(70), use_cache=False).loss.backward()
    moved = {name: value.grad.abs().sum() > 0 for name, value in model.named_parameters() if "lora_B" in name}
    assert len(moved) == 4
    assert all(moved.values())


def test_misuse_is_named(llama):
    ids = tokens_of(60)
    with training_attention(llama, mode="soft", budget=40), pytest.raises(ValueError, match="pass labels="):
        llama(input_ids=ids, use_cache=False)
    everything = training_attention(llama, mode="soft", budget=40, queries="all")
    with everything, pytest.raises(ValueError, match="reads whole sequences"):
        llama.generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids))


# What the mask is for


def test_labels_say_which_queries_are_masked(llama):
    """A trainer passes labels and drops what `forward` does not name."""
    ids = tokens_of(80)
    labels = ids.clone()
    labels[:, :50] = -100
    with training_attention(llama, mode="soft", budget=40), torch.no_grad():
        derived = llama(input_ids=ids, labels=labels, use_cache=False).logits
        given = llama(input_ids=ids, decoded=labels != -100, use_cache=False).logits
        other = llama(input_ids=ids, labels=labels, decoded=torch.ones_like(ids).bool(), use_cache=False).logits
    with training_attention(llama, mode="dense", budget=40), torch.no_grad():
        dense = llama(input_ids=ids, labels=labels, use_cache=False).logits
    assert torch.equal(derived, given)
    torch.testing.assert_close(derived[:, :50], dense[:, :50], rtol=1e-3, atol=1e-3)
    assert not torch.isclose(derived[:, 50:], dense[:, 50:], atol=1e-2).all()
    assert not torch.isclose(other[:, 45:50], dense[:, 45:50], atol=1e-2).all()
    assert not llama._forward_pre_hooks


def test_a_model_that_cannot_be_told_is_refused():
    model = make_decoder("stablelm")
    ids = tokens_of(60)
    with training_attention(model, mode="soft", budget=40), pytest.raises(ValueError, match="does not hand them"):
        model(input_ids=ids, labels=ids, use_cache=False)


def test_labels_of_another_length_are_refused(llama):
    ids = tokens_of(60)
    with training_attention(llama, mode="soft", budget=40), pytest.raises(ValueError, match="59 values a row for 60"):
        llama(input_ids=ids, decoded=ids[:, :59] > 0, use_cache=False)


def block_diagonal(dtype):
    blocks = torch.block_diag(torch.ones(30, 30), torch.ones(30, 30)).tril().bool()[None, None]
    return blocks if dtype == torch.bool else torch.zeros(1, 1, 60, 60).masked_fill(~blocks, -torch.inf)


@pytest.mark.parametrize(
    "mask",
    [
        block_diagonal(torch.bool),
        block_diagonal(torch.float32),
        torch.ones(1, 1, 1, 60, dtype=torch.bool),
        torch.zeros(1, 1, 1, 60),
        torch.ones(1, 1, 60, 60, dtype=torch.int),
    ],
    ids=["blocks", "blocks, added", "padding", "padding, added", "integers"],
)
@pytest.mark.parametrize("mode", ["dense", "soft"])
def test_masks_of_others_are_refused(llama, mask, mode):
    """They would be read as the first token of each query."""
    handle = training_attention(llama, mode=mode, budget=40, queries="all")
    with handle, pytest.raises(ValueError, match=r"attention_mask is torch\."):
        llama(input_ids=tokens_of(60)[:1], attention_mask=mask, use_cache=False)


def test_padding_between_tokens_is_refused(llama):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 30] = 0
    with training_attention(llama, mode="dense"), pytest.raises(ValueError, match="padding between tokens"):
        llama(input_ids=tokens_of(60), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama4_text"])
def test_local_layers_stay_as_they_are(kind):
    """With and without documents in a row; what a compiled model does, which cannot look at masks, is the same."""
    model = make_decoder(kind)
    ids, positions = tokens_of(70)[:1], torch.cat([torch.arange(30), torch.arange(40)])[None]
    for more in ({}, {"position_ids": positions}):
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False, **more).logits
            with training_attention(model, mode="dense", budget=40):
                found = model(input_ids=ids, use_cache=False, **more).logits
                compiled = torch.compile(model, backend="eager")(input_ids=ids, use_cache=False, **more).logits
            torch._dynamo.reset()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(compiled, expected)


def test_local_layers_are_not_masked_by_pages():
    """A window longer than the budget: decoding reads it densely."""
    model = make_decoder("gemma3_text")
    handle = training_attention(model, mode="soft", budget=40, queries="all")
    assert [handle.is_sparse(layer) for layer in range(2)] == [False, True]


def test_an_encoder_is_refused():
    model = make_decoder("bert")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with training_attention(model, mode="dense"), pytest.raises(ValueError, match="is not causal"):
        model(input_ids=tokens_of(20), use_cache=False)


# Where and in what it is computed


def test_the_kernel_is_that_of_the_queries_device():
    """Not of the model's when it was switched."""
    assert find_kernel("auto", torch.device("cpu")) is None
    assert find_kernel("torch", torch.device("cuda")) is None
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert find_kernel("triton", torch.device("cpu")).__name__.endswith("soft_mask_attention")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_over_float32_weights(llama, backend):
    """Rotary embeddings give float32 queries and keys beside 16-bit values. The interpreter knows float16 only."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs under Triton's interpreter")
    llama.model.layers = llama.model.layers[:1]
    ids = tokens_of(60)[:1]
    found = []
    for autocast in (False, True):
        llama.zero_grad()
        with (
            training_attention(llama, mode="soft", budget=32, backend=backend),
            torch.autocast("cpu", torch.float16, enabled=autocast),
        ):
            loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), llama.model.layers[0].self_attn.k_proj.weight.grad.clone()])
    torch.testing.assert_close(found[1][0].float(), found[0][0], rtol=1e-2, atol=1e-2)
    assert torch.cosine_similarity(found[1][1].flatten(), found[0][1].flatten(), dim=0) > 0.98


def test_scores_under_autocast_are_those_of_float32():
    """Which pages a hard mask keeps does not depend on the precision of autocast, given the same keys."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 120, 16).bfloat16() for heads in (4, 2, 2))
    settings = TrainingAttentionConfig.from_dict({"mode": "hard", "budget": 40, "queries": "all"})
    expected = attention(query, key, value, settings)
    module = SimpleNamespace(layer_idx=0, is_causal=True)
    module.training_attentions = [SimpleNamespace(config=settings, is_sparse=lambda layer, window: True)]
    with torch.autocast("cpu", torch.bfloat16):
        found = training_attention_forward(module, query.float(), key.float(), value, None)[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.transpose(1, 2), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(llama, reentrant):
    ids = tokens_of(70)
    labels = ids.clone()
    labels[:, :30] = -100
    gradients = []
    for checkpointing in (False, True):
        llama.train().zero_grad()
        if checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with training_attention(llama, mode="soft", budget=40):
            llama(input_ids=ids, labels=labels).loss.backward()
        gradients.append([value.grad.clone() for value in llama.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_is_one_graph_and_learns_the_same(llama):
    """In plain PyTorch; tests/kernels has the same of the kernel."""
    llama.model.layers = llama.model.layers[:2]
    ids = tokens_of(60)
    gradients = []
    for compiled in (False, True):
        llama.zero_grad()
        model = torch.compile(llama, backend="aot_eager", fullgraph=True) if compiled else llama
        with training_attention(model, mode="soft", budget=40):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([value.grad.clone() for value in llama.parameters()])
    torch._dynamo.reset()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_copies_and_pickles_of_a_switched_model(llama):
    """A copy has a switch of its own; restoring one leaves the other alone."""
    ids = tokens_of(60)
    handle = training_attention(llama, mode="soft", budget=40)
    expected = llama(input_ids=ids, labels=ids, use_cache=False).loss
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(other(input_ids=ids, labels=ids, use_cache=False).loss, expected)
        other.model.layers[0].self_attn.training_attentions[-1].restore()
        assert not any(hasattr(module, "training_attention") for module in other.modules())
        assert not other._forward_pre_hooks
        assert torch.equal(llama(input_ids=ids, labels=ids, use_cache=False).loss, expected)
    handle.restore()
    assert not llama._forward_pre_hooks
