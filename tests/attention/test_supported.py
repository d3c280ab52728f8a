"""Which decoders of transformers work: the table of docs/sparse-attention.md, derived from tiny random models.

Each class either decodes sparsely, and with a large budget like its own attention, or is refused by name.
"""

import re

import pytest
import torch
import transformers
from decoder_models import CLASSES, KINDS, VOCABULARY, make_decoder
from manual import DOCS, page

from unique_asr.attention import PagedCache, SparseAttentionConfig, sparse_attention, training_attention
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.decoding.greedy import GreedyDecoder

ALL, PARTLY = "every layer reads pages", "layers with full attention read pages, the others stay as they are"
REFUSED = {  # a piece of the message: what the table says
    "does not let its attention be switched": "its attention cannot be switched",
    "has no full-attention layer": "no layer has full attention",
    "caches more than keys and values": "it caches more than keys and values",
    "has soft-capping": "soft-capping or sink logits",
    "has sink logits": "soft-capping or sink logits",
    "decodes with keys that no PagedCache holds": "it attends to other keys than it caches",
    "attends to other values than it caches": "it attends to other values than it caches",
    "has a mask for each head": "a mask for each head",
    "is not causal": "its attention is not causal by itself",
    "has cross-attention": "cross-attention",
    "uses cache of its own": "a cache of its own",
}


def read_table():
    """Read which row of the table names each class."""
    text = page(DOCS / "sparse-attention.md").partition("## Which models")[2]
    rows = re.findall(r"^\| ([^`|]+) \| (`.*) \|$", text, re.MULTILINE)
    found = [(name, row) for row, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(found) == len(dict(found)), "a class has two rows"
    return dict(found)


def shorten(class_name):
    return class_name.removesuffix("ForCausalLM")


TABLE = read_table()
PROMPT = torch.randint(1, VOCABULARY, (1, 90), generator=torch.Generator().manual_seed(0))


def generate(model):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    return model.generate(PROMPT, return_dict_in_generate=True, **options).logits


def find_row(model):
    """Decode, and return the row that the table should have."""
    expected = generate(model)
    try:
        with sparse_attention(model, budget=1024) as sparse:
            layers = sparse.make_cache().layers
            found = generate(model)
        assert sparse.counters.steps >= 3
        with sparse_attention(model, budget=64) as sparse:
            generate(model)
    except ValueError as error:
        assert model.config._attn_implementation not in ("unique", "unique_training")
        return "refused: " + next(row for piece, row in REFUSED.items() if piece in str(error))
    torch.testing.assert_close(found, expected)
    assert sparse.counters.sparse_steps == sparse.counters.steps >= 3
    return ALL if all(isinstance(layer, PagedLayer) for layer in layers) else PARTLY


@pytest.fixture(scope="module")
def of_the_table():
    """Whether this is the version of transformers that the table is of: others make some classes in other ways."""
    version = re.search(r"transformers (\d+\.\d+)", page(DOCS / "sparse-attention.md"))[1]
    if not transformers.__version__.startswith(version + "."):
        pytest.skip(f"the table is of transformers {version}")


@pytest.mark.usefixtures("of_the_table")
@pytest.mark.parametrize("name", [name for name in KINDS if shorten(name) in TABLE])
def test_the_table_says_what_each_class_does(name):
    assert TABLE[shorten(name)] == find_row(make_decoder(KINDS[name]))


@pytest.mark.parametrize("name", [name for name in KINDS if TABLE.get(shorten(name)) in (ALL, PARTLY)])
def test_each_class_that_decodes_sparsely_trains(name):
    """With mode=dense as with its own attention."""
    model = make_decoder(KINDS[name])
    losses = [model(PROMPT, labels=PROMPT, use_cache=False).loss]
    for mode in ("dense", "soft"):
        with training_attention(model, mode=mode, budget=64, queries="all"):
            losses.append(model(PROMPT, labels=PROMPT, use_cache=False).loss)
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[2].isfinite()
    losses[2].backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


@pytest.mark.usefixtures("of_the_table")
def test_the_table_is_complete():
    assert set(TABLE) == {shorten(name) for name in CLASSES.values()}


def test_a_loop_with_a_cache_of_its_own_is_refused(llama):
    """It would decode densely, and the counters say nothing."""
    with sparse_attention(llama, budget=64) as sparse:
        cache = llama(PROMPT).past_key_values
        with pytest.raises(ValueError, match=rf"pass {CACHE_ARGUMENT}=sparse.make_cache\(\)"):
            llama(PROMPT[:, :1], past_key_values=cache)
        assert str(sparse.counters).startswith("no decode step yet")
        cache = sparse.make_cache()
        for tokens in (PROMPT, PROMPT[:, :1]):
            llama(tokens, past_key_values=cache)
    assert sparse.counters.sparse_steps == 1
    assert isinstance(cache, PagedCache)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["deepseek_v3", "jetmoe", "diffllama"])
def test_engines_refuse_them_too(kind, static):
    """A static step shows the attention function its new key alone, so these would attend to nothing else."""
    model = make_decoder(kind)
    decoder = GreedyDecoder(model, SparseAttentionConfig(budget=64), static=static)

    def decode():
        decoder.prefill(model.get_input_embeddings()(PROMPT))
        list(decoder.tokens(max_new_tokens=3, stop_ids=set()))

    with pytest.raises(ValueError, match=r"other values than it caches|no PagedCache holds"):
        decode()


def test_an_encoder_decoder_is_refused():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 97, "max_position_embeddings": 64}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    with pytest.raises(ValueError, match="has no text decoder"):
        sparse_attention(model)
    assert model.config._attn_implementation == "sdpa"
