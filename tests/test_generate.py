"""Text LLMs by pages: every family on a tiny model of its real class, chats, streaming, a file as context, GGUF."""

import io
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from unique_asr import generation
from unique_asr.attention import SparseAttentionConfig, sparse_attention
from unique_asr.generation import GenerationError, TextGenerator, find_rope_types
from unique_asr.models import ModelError

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 16
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if thinking %}<think>{% endif %}"
)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
             "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {  # configuration, its options, and the layers that are read by pages
    "Qwen3": ("Qwen3Config", {"head_dim": 8}, 4),
    "Llama": ("LlamaConfig", {}, 4),
    "SmolLM2": ("LlamaConfig", {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}, 4),
    "SmolLM3": ("SmolLM3Config", {"no_rope_layer_interval": 4}, 4),
    "Mistral": ("MistralConfig", {"sliding_window": None}, 4),
    "Ministral": ("MinistralConfig", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                      "head_dim": 8}, 2),
    "Gemma": ("GemmaConfig", {"head_dim": 8}, 4),
    "Gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8,
                                    "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
    "Phi": ("PhiConfig", {}, 4),
    "Phi3": ("Phi3Config", {}, 4),
    "Phi3 with LongRoPE": ("Phi3Config", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}, 4),
}  # fmt: skip


def make(family, tokenizer):
    torch.manual_seed(0)
    name, options, paged = FAMILIES[family]
    config = getattr(transformers, name)(vocab_size=len(tokenizer), **SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        readable = torch.tensor(
            [len(piece) == 1 and piece.isascii() for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        )
        model.get_output_embeddings().weight[~readable] = 0
    model.generation_config.eos_token_id = None
    return model, paged


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tokenizer):
    return *make(request.param, tokenizer), tokenizer


TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 2


def answer(model, tokenizer, **options):
    options = {"prefill_chunk": 25, "budget": 1024} | options
    generator = TextGenerator((model, tokenizer), **options)
    pieces, info = generator.generate(TEXT, max_new_tokens=NEW_TOKENS)
    return "".join(pieces), info


def plain(model, tokenizer, **options):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS, **options)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_a_budget_over_the_context_writes_what_generate_writes(family):
    model, _, tokenizer = family
    expected = plain(model, tokenizer)
    text, info = answer(model, tokenizer)
    assert text == expected
    assert len(set(expected)) > 2
    assert (info.tokens, info.stop_reason, info.sparsity["sparse_steps"]) == (NEW_TOKENS, "length", 0)
    assert answer(model, tokenizer, attention="dense")[0] == expected


def test_sparse_steps_are_counted_and_sliding_layers_left_alone(family):
    model, paged, tokenizer = family
    _, info = answer(model, tokenizer, budget=64)
    heads = model.config.num_key_value_heads
    assert info.sparsity["sparse_steps"] == NEW_TOKENS - 1
    assert info.sparsity["pages_read"] == (NEW_TOKENS - 1) * paged * heads * 8


def test_generate_itself_within_the_block(family):
    model, _, tokenizer = family
    if "longrope" in find_rope_types(model.config):
        pytest.skip("beyond the original length its generate drops the cache it is given; TextGenerator does not")
    expected = plain(model, tokenizer)
    with sparse_attention(model, budget=1024):
        assert plain(model, tokenizer) == expected
    with sparse_attention(model, budget=64) as sparse:
        plain(model, tokenizer)
    assert sparse.counters.sparse_steps == NEW_TOKENS - 1


def test_the_text_comes_in_pieces(tokenizer):
    model, _ = make("Llama", tokenizer)
    pieces, info = TextGenerator((model, tokenizer)).generate(TEXT, max_new_tokens=NEW_TOKENS)
    first = next(pieces)
    assert first
    assert info.tokens < NEW_TOKENS
    assert len(list(pieces)) > 2
    assert info.prompt_tokens > len(TEXT) / 2
    assert set(info.timings) == {"prefill", "decode"}


def test_the_prompt_is_a_chat_with_the_context_first(tokenizer):
    generator = TextGenerator(make("Llama", tokenizer)[:1] + (tokenizer,))
    ids = generator.encode_prompt("Why?", context="A book.", system="Be brief.", template_options={"thinking": True})
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA book.\n\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>"
    )
    assert tokenizer.decode(generator.encode_prompt("Once upon", chat=False)) == "Once upon"


def test_the_end_stops(tokenizer):
    model, _ = make("Llama", tokenizer)
    generator = TextGenerator((model, tokenizer))
    whole = "".join(generator.generate(TEXT, max_new_tokens=NEW_TOKENS)[0])
    generator.stop_ids = {tokenizer.convert_tokens_to_ids(whole[3])}
    pieces, info = generator.generate(TEXT, max_new_tokens=NEW_TOKENS)
    assert "".join(pieces) == whole[: whole.index(whole[3])]
    assert info.stop_reason == "end"


def test_what_cannot_work_is_said_in_one_line(tokenizer, byte_tokenizer, tmp_path):
    model, _ = make("Llama", tokenizer)
    with pytest.raises(GenerationError, match="use unique or dense"):
        TextGenerator((model, tokenizer), attention="fast")
    with pytest.raises(GenerationError, match="no chat template; use chat=false"):
        TextGenerator((model, byte_tokenizer())).generate("Why?", chat=True)
    with pytest.raises(ModelError, match="no such file"):
        TextGenerator(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="cannot be loaded as a text LLM"):
        TextGenerator(tmp_path)
    long_rope, _ = make("Phi3 with LongRoPE", tokenizer)
    _, info = TextGenerator((long_rope, tokenizer)).generate("Why?", max_new_tokens=50)
    assert "change at 64 tokens" in info.warnings[0]
    _, info = TextGenerator((model, tokenizer)).generate("x" * 1000, max_new_tokens=500)
    assert "more than the 1024" in info.warnings[0]


@pytest.fixture
def gguf(tmp_path):
    """A tiny Llama in a GGUF file, with a tokenizer of bytes."""
    writer_module = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    path = tmp_path / "tiny model.gguf"
    writer = writer_module.GGUFWriter(path, "llama")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "th", "the", "<|end|>"]
    hidden, heads, feed, layers = 32, 4, 48, 2
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)

    def matrix(name, *shape):
        writer.add_tensor(name, (rng.standard_normal(shape) * 0.3).astype(np.float32))

    matrix("token_embd.weight", len(tokens), hidden)
    matrix("output.weight", len(tokens), hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for part, shape in {
            "attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden),
            "attn_output": (hidden, hidden), "ffn_gate": (feed, hidden), "ffn_up": (feed, hidden),
            "ffn_down": (hidden, feed),
        }.items():  # fmt: skip
            matrix(f"blk.{layer}.{part}.weight", *shape)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def script(*arguments):
    main = runpy.run_path(str(ROOT / "scripts" / "generate.py"))["main"]
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


def test_the_script_reads_a_gguf_file_and_a_book(gguf, tmp_path, capsys):
    book = tmp_path / "a book, (1984).txt"
    book.write_text(TEXT * 3, encoding="utf-8")
    options = f"context={book}", "max_new_tokens=12", "attention.budget=64", "device=cpu"
    assert script(f"model={gguf}", "prompt=Why, and (how) many = 13?", *options) == 0
    printed = capsys.readouterr()
    assert len(printed.out) > 4
    assert "11 of 11 steps sparse" in printed.err
    assert script(f"model={gguf}", "prompt=Why, and (how) many = 13?", *options, "quiet=true") == 0
    assert capsys.readouterr().out == printed.out


def test_loading_shows_life(gguf, capsys, monkeypatch):
    """At once, and then now and then: a large file takes a minute."""
    monkeypatch.setattr("unique_asr.application.display.SIGN_OF_LIFE", 0.05)
    load = generation.load_text_model

    def load_slowly(*arguments):
        time.sleep(0.2)
        return load(*arguments)

    monkeypatch.setattr(generation, "load_text_model", load_slowly)
    assert script(f"model={gguf}", "prompt=Why?", "max_new_tokens=2", "device=cpu") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"Loading {gguf} ...", f"Loading {gguf} ... 0 s"]
    assert script(f"model={gguf}", "prompt=Why?", "max_new_tokens=2", "device=cpu", "quiet=true") == 0
    assert "Loading" not in capsys.readouterr().err


def test_a_closed_pipe_ends_the_script_without_a_word(gguf):
    line = f"{sys.executable} {ROOT}/scripts/generate.py 'model={gguf}' prompt=Why? device=cpu quiet=true | true"
    done = subprocess.run(
        ["bash", "-c", f'{line}; exit "${{PIPESTATUS[0]}}"'], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_reads_standard_input_and_reports_mistakes(gguf, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert script(f"model={gguf}", "prompt=-", "max_new_tokens=3", "chat=false", "device=cpu") == 0
    assert "3 written" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert script(f"model={gguf}", "prompt=-") == 1
    assert capsys.readouterr().err == "error: prompt=-: standard input is closed; pipe a text into it\n"
    assert script("prompt=Why?") == 2
    assert "usage:" in capsys.readouterr().err
    assert script(f"model={gguf}", "prompt=Why?", f"context={tmp_path}/none.txt") == 1
    assert "none.txt" in capsys.readouterr().err
    assert script(f"model={tmp_path}/none.gguf", "prompt=Why?") == 1
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("understood", [True, False])
def test_a_gemma_file_whose_texts_have_no_beginning_is_refused(understood, tmp_path, monkeypatch):
    class GemmaTokenizer:
        bos_token_id = 2

        def __call__(self, text):
            return SimpleNamespace(input_ids=[2, 7] if understood else [7])

    path = tmp_path / "gemma.gguf"
    path.touch()
    monkeypatch.setattr(generation.AutoTokenizer, "from_pretrained", lambda *_, **__: GemmaTokenizer())
    if understood:
        assert isinstance(generation.load_text_tokenizer(path), GemmaTokenizer)
        return
    with pytest.raises(ModelError, match=r"model=.*gemma.gguf: transformers .* reads this file's tokenizer wrongly"):
        generation.load_text_tokenizer(path)


def test_settings_of_the_cache_reach_it(tokenizer):
    model, _ = make("Llama", tokenizer)
    attention = SparseAttentionConfig(budget=64, page_size=16, score="mean")
    _, info = answer(model, tokenizer, attention=attention)
    assert info.sparsity["pages_read"] == (NEW_TOKENS - 1) * 4 * 2 * 4
