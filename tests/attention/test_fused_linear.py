"""Linear layers of one input as one product: the same outputs, weights, names and files."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from unique_asr.attention.fused_linear import fuse_linears

IDS = torch.arange(1, 31).unsqueeze(0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_outputs_weights_and_names_stay(model, tmp_path):
    expected = model(IDS).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert fuse_linears(model) == 4  # of two layers
    torch.testing.assert_close(model(IDS).logits, expected)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_one_product_holds_the_weights(model):
    fuse_linears(model)
    attention = model.model.layers[0].self_attn
    product = attention.q_proj.product
    assert attention.k_proj.product is product
    assert product.weight.shape == (48 + 16 + 16, 48)
    product.weight.zero_()
    assert not attention.v_proj.weight.any()  # a view: no weight is kept twice
    assert fuse_linears(model) == 0


def test_any_order_of_calls(model):
    first, second = torch.randn(2, 3, 48)
    attention = model.model.layers[1].self_attn
    names = ("v_proj", "q_proj", "k_proj")
    expected = [getattr(attention, name)(vectors) for vectors in (first, second) for name in names]
    fuse_linears(model)
    found = [getattr(attention, name)(vectors) for vectors in (first, second) for name in names]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_one_product_is_left_alone():
    module = nn.Module()
    module.gate_proj, module.up_proj = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
    assert fuse_linears(module) == 0
    module.up_proj = nn.Sequential(nn.Linear(4, 6))
    assert fuse_linears(module) == 0
