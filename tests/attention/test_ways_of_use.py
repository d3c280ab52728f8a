"""Models as people hold them: in inference mode or not, wrapped for training, and with what PEFT puts before a text."""

import itertools

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from unique_asr.attention import DecodeStep, SparseAttentionConfig, sparse_attention
from unique_asr.attention.cache import CACHE_ARGUMENT
from unique_asr.evaluation.methods import METHODS

PROMPT = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(0))
MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad}


def read(model, tokens, cache):
    return model(tokens, **{CACHE_ARGUMENT: cache}).logits[:, -1]


def decode(model, sparse, first, second, static):
    """Read a prompt in one mode, drop a row and go on in the other one, beyond the room, and take back some steps."""
    with first():
        cache = sparse.make_cache(capacity=96)
        tokens = [read(model, PROMPT, cache).argmax(-1, keepdim=True)]
        tokens.append(read(model, tokens[-1], cache).argmax(-1, keepdim=True))
        cache.batch_select_indices(torch.tensor([1]))
        tokens[-1] = tokens[-1][1:]
        step = DecodeStep(model, cache)
    for mode in (second, first, second):
        with mode():
            for _ in range(3):
                if static:
                    step.token.copy_(tokens[-1])
                    step.run()
                    tokens.append(step.token.clone())
                else:
                    tokens.append(read(model, tokens[-1], cache).argmax(-1, keepdim=True))
            cache.crop(-1)
            step.reserve(cache.capacity + 1)
            cache.reorder_cache(torch.tensor([0]))
    return torch.cat([each[-1:] for each in tokens]).flatten().tolist()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_inference_mode_beside_no_grad(llama, method, static):
    """What one writes the other writes on."""
    selector = METHODS[method]() if method else None
    config = SparseAttentionConfig(budget=64, score="mean" if method else "unique", selector=selector)
    with sparse_attention(llama, config) as sparse:
        found = [decode(llama, sparse, *modes, static) for modes in itertools.product(MODES.values(), repeat=2)]
    assert all(tokens == found[-1] for tokens in found)
    assert sparse.counters.sparse_steps > 0


def generate(model, **options):
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("settings", [PrefixTuningConfig, PromptTuningConfig, LoraConfig])
def test_peft(llama, settings):
    """With a large budget its own tokens; else the prefix is read by pages like any text."""
    options = {} if settings is LoraConfig else {"num_virtual_tokens": 24}
    model = get_peft_model(llama, settings(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name or "lora_" in name:
                parameter.normal_(std=0.5)
    expected = generate(model)
    with sparse_attention(model, budget=1024) as sparse:
        found = generate(model)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (sparse.counters.steps, sparse.counters.sparse_steps) == (5, 0)
    with sparse_attention(model, budget=64) as sparse:
        generate(model)
        length = 90 + options.get("num_virtual_tokens", 0)
    assert sparse.counters.sparse_steps == sparse.counters.steps == 5
    assert sparse.counters.pages_total == 2 * 3 * 3 * sum(-(-(length + step) // 8) for step in range(1, 6))
    assert torch.equal(generate(model)[1], expected[1])


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap_twice(model):
    return DistributedDataParallel(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("wrap", [DistributedDataParallel, wrap_twice], ids=["DDP", "DDP of a compiled model"])
def test_a_wrapped_model(llama, process_group, wrap):
    wrapped = wrap(llama)
    expected = generate(llama)
    with sparse_attention(wrapped, budget=1024):
        assert torch.equal(generate(llama)[1], expected[1])
    with sparse_attention(wrapped, budget=64) as sparse:
        assert sparse.make_cache().attention.combine == "max"
        generate(llama)
    assert sparse.counters.sparse_steps == 5
    assert llama.config._attn_implementation == "sdpa"
