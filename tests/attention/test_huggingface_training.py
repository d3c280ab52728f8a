"""Training through the page selection inside transformers: masks, gradients, and what is refused."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from unique_asr.attention import sparse_attention
from unique_asr.attention.huggingface_training import make_starts_mask, training_attention


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
