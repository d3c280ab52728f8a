"""UNIQUE attention inside transformers: exactly sdpa where nothing is sparse, restored on exit, honest about misuse."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unique_asr.attention import (
    PagedCache,
    SparseAttentionConfig,
    TrainingAttentionConfig,
    huggingface,
    sparse_attention,
)
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.greedy import GreedyDecoder

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"],
}  # fmt: skip


@pytest.fixture
def batch():
    """Three prompts of different lengths, padded on the left."""
    torch.manual_seed(0)
    lengths = torch.tensor([150, 61, 118])
    mask = (torch.arange(150) >= 150 - lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 97, (3, 150)) * mask, "attention_mask": mask}


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True} | options
    return model.generate(**inputs, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("budget", [None, 1024])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 4}],
    ids=["greedy", "sampling", "beams", "prompt lookup"],
)
def test_a_budget_over_the_context_is_sdpa_bit_by_bit(llama, batch, budget, rows, options):
    if "prompt_lookup_num_tokens" in options and len(rows) > 1:
        pytest.skip("transformers looks up one sequence at a time")
    inputs = {name: value[rows] for name, value in batch.items()}
    expected = generate(llama, inputs, **options)
    with sparse_attention(llama, budget=budget) as sparse:
        output = generate(llama, inputs, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.logits, expected.logits))
    assert sparse.counters.sparse_steps == 0
    assert sparse.counters.share_of_pages_read == 1


def test_sparse_steps_read_less_and_change_little(llama, batch):
    inputs = {name: value[:1] for name, value in batch.items()}
    dense = generate(llama, inputs, max_new_tokens=2)
    with sparse_attention(llama, budget=128) as sparse:
        output = generate(llama, inputs, max_new_tokens=2)
    assert sparse.counters.steps == sparse.counters.sparse_steps == 1
    assert sparse.counters.pages_read == 3 * 3 * 16
    assert not torch.equal(output.logits[1], dense.logits[1])
    similarity = torch.cosine_similarity(output.logits[1], dense.logits[1])
    assert similarity > 0.8


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
def test_sparse_generation_runs(llama, batch, options):
    with sparse_attention(llama, budget=64) as sparse:
        output = generate(llama, batch, **options)
    assert output.sequences.shape[1] == 170
    assert sparse.counters.sparse_steps == sparse.counters.steps == 19
    assert torch.isfinite(torch.stack(output.logits)).all()


def test_a_padded_row_decodes_as_it_does_alone(llama, batch):
    """Padding by whole pages keeps the pages of the row, so selection and logits are the same."""
    row = batch["input_ids"][:1, 6:]
    padded = torch.cat([torch.zeros(1, 40, dtype=torch.long), row], dim=1)
    other = torch.randint(1, 97, padded.shape)
    mask = torch.ones_like(padded)
    mask[:, :40] = 0
    both = {"input_ids": torch.cat([padded, other]), "attention_mask": torch.cat([mask, torch.ones_like(mask)])}
    sparse_attention(llama, budget=64)
    alone = generate(llama, {"input_ids": row, "attention_mask": torch.ones_like(row)})
    together = generate(llama, both)
    assert torch.equal(together.sequences[0, 40:], alone.sequences[0])
    torch.testing.assert_close(
        torch.stack(together.logits)[:, 0], torch.stack(alone.logits)[:, 0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_a_chunked_prefill_equals_a_whole_one(llama, batch, rows, flash, monkeypatch):
    """When the causal mask of a chunk has to be built in slices, and row by row as FlashAttention reads them.

    On a CPU a mask stands for FlashAttention's own alignment; tests/gpu/test_decoding_gpu.py runs the kernel.
    """
    inputs = {name: value[rows] for name, value in batch.items()}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    sparse = sparse_attention(llama, budget=64)
    whole, chunked = sparse.cache(), sparse.cache()
    expected = llama(**inputs, position_ids=positions, past_key_values=whole, logits_to_keep=1).logits
    monkeypatch.setattr(huggingface, "MASK_ELEMENTS", 1000)
    monkeypatch.setattr(huggingface, "BATCHED_TOKENS", 70)  # of three chunks the last two go row by row
    monkeypatch.setattr(huggingface, "flash_takes", lambda *tensors: flash)
    for start in range(0, 150, 64):
        part = slice(start, start + 64)
        output = llama(
            inputs["input_ids"][:, part],
            attention_mask=inputs["attention_mask"][:, : start + 64],
            position_ids=positions[:, part],
            past_key_values=chunked,
            logits_to_keep=1,
        ).logits
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert chunked.layers[2].pages_done == whole.layers[2].pages_done == 18


def test_generate_goes_on_from_a_prefilled_cache(llama, batch):
    inputs = {name: value[:1] for name, value in batch.items()}
    sparse = sparse_attention(llama, budget=64)
    expected = generate(llama, inputs).sequences
    cache = sparse.cache(capacity=512)
    llama(inputs["input_ids"][:, :100], past_key_values=cache)
    assert torch.equal(generate(llama, inputs, past_key_values=cache).sequences, expected)


def test_no_mask_of_the_whole_prefill_is_built():
    mask = torch.ones(2, 5000, dtype=torch.bool)
    assert huggingface.unique_mask(2, 5000, 5000, attention_mask=mask) is None
    mask[0, :10] = False
    assert huggingface.unique_mask(2, 5000, 5000, attention_mask=mask).shape == (2, 1, 1, 5000)


def test_everything_is_put_back(llama, tmp_path):
    with sparse_attention(llama, budget=64, page_size=16) as sparse:
        assert llama.config._attn_implementation == "unique"
        assert sparse.config.page_size == 16
        llama.config.save_pretrained(tmp_path)
    assert llama.config._attn_implementation == "sdpa"
    assert "_prepare_cache_for_generation" not in vars(llama)
    assert "unique" not in (tmp_path / "config.json").read_text()
    sparse.restore()
    assert isinstance(llama.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2), torch.Tensor)


def test_the_inner_block_counts(llama, batch):
    with sparse_attention(llama, budget=1024) as outer:
        with sparse_attention(llama, budget=64) as inner:
            generate(llama, batch)
        assert (outer.counters.steps, inner.counters.sparse_steps) == (0, 19)
        generate(llama, batch)
        assert (outer.counters.steps, inner.counters.steps) == (19, 19)
    assert llama.config._attn_implementation == "sdpa"


def test_restored_after_an_error(llama):
    with pytest.raises(KeyError), sparse_attention(llama):
        raise KeyError
    assert llama.config._attn_implementation == "sdpa"


def test_a_config_and_overrides(llama):
    sparse = sparse_attention(llama, SparseAttentionConfig(budget=64), combine="share")
    assert (sparse.config.budget, sparse.config.combine) == (64, "share")


@pytest.mark.parametrize(
    ("kind", "configuration", "normalised"),
    [
        (Qwen2ForCausalLM, Qwen2Config, False),
        (Qwen3ForCausalLM, Qwen3Config, True),
        (Gemma3ForCausalLM, Gemma3TextConfig, True),
    ],
)
def test_heads_that_normalise_their_queries_share(kind, configuration, normalised):
    model = kind(configuration(**SMALL))
    chosen = "share" if normalised else "max"
    with sparse_attention(model) as sparse:
        assert (sparse.config.combine, sparse.cache().attention.combine) == (chosen, chosen)
    assert GreedyDecoder(model).cache.attention.combine == chosen
    assert BatchEngine(model).attention.combine == chosen
    assert sparse_attention(model, combine="max").config.combine == "max"
    assert sparse_attention(model, combine="share").config.combine == "share"
    assert sparse_attention(model, score="mean").config.combine == "max"
    model.config.sparse_attention = TrainingAttentionConfig().sparse.to_dict()  # as scripts/finetune.py leaves it
    assert sparse_attention(model).config.combine == "max"


def test_what_knows_no_model_is_the_paper(llama):
    assert PagedCache(llama.config).attention.combine == "max"
    assert TrainingAttentionConfig().sparse.combine == "max"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (lambda config: {"past_key_values": DynamicCache(config=config)}, "pass a PagedCache"),
        (lambda config: {"cache_implementation": "static"}, "leave it out"),
    ],
)
def test_a_cache_without_pages_is_refused(llama, options, named):
    sparse_attention(llama, budget=64)
    with pytest.raises(ValueError, match=named):
        llama.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, **options(llama.config))


def test_soft_capping_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 50}
    model = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    sparse_attention(model, budget=64)
    with pytest.raises(ValueError, match="soft-capping"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)


def test_sliding_and_full_layers_together():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, num_hidden_layers=4, **sizes, **window)).eval()
    prompt = torch.randint(0, 50, (1, 100))
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False)
    with sparse_attention(model, budget=1024):
        assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False), expected)
    with sparse_attention(model, budget=64) as sparse:
        model.generate(prompt, max_new_tokens=10, do_sample=False)
    assert sparse.counters.sparse_steps == 9
    assert sparse.counters.pages_read == 9 * 2 * 2 * 8


def test_the_encoder_of_a_speech_model_is_left_alone():
    torch.manual_seed(0)
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2AudioConfig(
        audio_config=audio | {"num_mel_bins": 8, "max_source_positions": 20},
        text_config=text | {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 60},
        audio_token_index=59,
    )
    model = Qwen2AudioForConditionalGeneration(config).eval()
    prompt = torch.randint(0, 50, (1, 100))
    prompt[0, 5:15] = 59
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "input_features": torch.randn(1, 8, 40),
        "feature_attention_mask": torch.ones(1, 40, dtype=torch.long),
    }
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    with sparse_attention(model, budget=1024):
        assert config.text_config._attn_implementation == "unique"
        assert config.audio_config._attn_implementation == "sdpa"
        assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), expected)
    with sparse_attention(model, budget=64) as sparse:
        model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert sparse.counters.sparse_steps == 9
    assert config.text_config._attn_implementation == "sdpa"


def test_training_goes_through(llama):
    sparse_attention(llama, budget=64)
    tokens = torch.randint(0, 97, (2, 100))
    llama(tokens, labels=tokens).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in llama.parameters())


def test_the_cache_works_without_the_context(llama, batch):
    llama.set_attn_implementation("unique")
    cache = PagedCache(llama.config, SparseAttentionConfig(budget=64))
    generate(llama, batch, past_key_values=cache)
    assert cache.counters.sparse_steps == 19
