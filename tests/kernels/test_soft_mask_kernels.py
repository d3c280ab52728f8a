"""The fused attention of training, forward and backward, against autograd of the plain definition in float64."""

import pytest
import torch
from unique_asr.kernels.soft_mask_attention import (
    masked_attention,
    masked_attention_backward,
    page_thresholds,
    training_attention,
)

from unique_asr.attention import huggingface_training, soft_mask
from unique_asr.attention.soft_mask import TrainingAttentionConfig

CASES = {  # batch, tokens, KV heads, group, dim, documents, share of masked queries, settings
    "plain": (1, 150, 2, 2, 16, None, None, {}),
    "odd": (2, 143, 1, 3, 24, None, None, {"tau": 0.2}),
    "hard": (1, 149, 2, 1, 16, None, None, {"mode": "hard"}),
    "packed": (2, 150, 1, 2, 16, [[150], [13, 3, 2, 90, 42]], None, {"sink_pages": 2}),
    "long": (2, 330, 1, 2, 16, [[330], [20, 310]], None, {}),  # tiles that need no masks
    "long, decoded": (1, 400, 1, 3, 16, None, 0.02, {"queries": "decoded", "sink_pages": 0}),
    "decoded": (1, 170, 1, 4, 16, None, 0.4, {"queries": "decoded"}),
    "mean": (1, 160, 1, 2, 16, None, None, {"score": "mean", "sink_pages": 0, "recent_pages": 1, "budget": 32}),
    "large pages": (1, 280, 1, 2, 16, None, None, {"page_size": 16, "budget": 96}),
    "dense": (1, 70, 1, 2, 16, [[30, 40]], None, {"mode": "dense"}),
    "short": (1, 37, 1, 2, 16, None, None, {}),
}


def make(batch, tokens, heads, group, dim, documents, share, settings, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    query = torch.randn(batch, tokens, heads * group, dim).transpose(1, 2)  # the strides that models give
    key = torch.randn(batch, heads, tokens, dim) + 2 * torch.randn(batch, heads, 1, dim)
    key += torch.randn(batch, heads, tokens // 8 + 1, dim).repeat_interleave(8, 2)[:, :, :tokens]
    value = torch.randn(batch, heads, tokens, dim)
    rows = None
    if documents:
        rows = [[sum(row[:i]) for i, length in enumerate(row) for _ in range(length)] for row in documents]
        rows = torch.tensor(rows, device=device)
    masked = None if share is None else torch.rand(batch, tokens, device=device) < share
    if masked is not None:
        masked[:, : tokens // 3] = False
    config = TrainingAttentionConfig.from_dict({"budget": 40, "queries": "all", "tau": 0.7, **settings})
    tensors = [each.to(device, dtype) for each in (query, key, value)]
    return tensors, config, rows, masked


def gradients(function, tensors, weight):
    tensors = [each.detach().requires_grad_() for each in tensors]
    output = function(*tensors)
    (output * weight.to(output.dtype)).sum().backward()
    return output.detach(), *(each.grad for each in tensors)


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    tensors, config, starts, masked = make(*CASES[case])
    weight = torch.randn(tensors[0].shape)
    exact = [each.double() for each in tensors]
    want = gradients(lambda *qkv: soft_mask.attention(*qkv, config, starts, masked, slice_tokens=0), exact, weight)
    got = gradients(lambda *qkv: training_attention(*qkv, config, starts, masked).transpose(1, 2), tensors, weight)
    for name, ours, theirs in zip(("output", "query", "key", "value"), got, want):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_equal_scores_share_the_gradient():
    """Two heads of a group that are the same query: the maximum is both, as autograd's is."""
    tensors, config, _, _ = make(*CASES["plain"])
    tensors[0] = tensors[0][:, ::2].repeat_interleave(2, dim=1)
    weight = torch.randn(tensors[0].shape)
    want = gradients(lambda *qkv: soft_mask.attention(*qkv, config, slice_tokens=0), tensors, weight)
    got = gradients(lambda *qkv: training_attention(*qkv, config).transpose(1, 2), tensors, weight)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_slices_of_rows_change_nothing(monkeypatch):
    from unique_asr.kernels import soft_mask_thresholds

    (query, key, _), config, _, _ = make(*CASES["odd"])
    ones = torch.ones(1, 143, dtype=torch.uint8)
    numbers = 8, config.sparse.pages - 1, 0.5, 1, 2, 0.7
    whole = page_thresholds(query, key, torch.zeros(1, 143, dtype=torch.int32), ones, *numbers)
    monkeypatch.setattr(soft_mask_thresholds, "SCRATCH", 2 * 21 * 32)
    parts = page_thresholds(query, key, torch.zeros(1, 143, dtype=torch.int32), ones, *numbers)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts))


def test_a_model_trains_through_the_kernel(llama):
    """The same gradients as in plain PyTorch, and again under checkpointing."""
    llama.model.layers = llama.model.layers[:1]
    ids = torch.randint(1, 97, (1, 50), generator=torch.Generator().manual_seed(0))
    found = []
    for backend, checkpointing in (("torch", False), ("triton", False), ("triton", True)):
        llama.zero_grad()
        if checkpointing:
            llama.train().gradient_checkpointing_enable({"use_reentrant": False})
        with huggingface_training.training_attention(llama, mode="soft", budget=32, queries="all", backend=backend):
            llama(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: value.grad for name, value in llama.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-4)
        assert torch.equal(found[1][name], found[2][name])


def test_the_operators_are_traceable():
    """Fake tensors have the shapes and strides of real ones, so that torch.compile keeps the model in one graph."""
    tensors, config, starts, _ = make(*CASES["packed"])
    starts, masked = starts.int(), torch.ones(1, 150, dtype=torch.uint8)
    numbers = config.sparse.page_size, config.sparse.pages - 1, 0.5, 2, 2, 0.7
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(page_thresholds, (*tensors[:2], starts, masked, *numbers), **checks)
    rows = page_thresholds(*tensors[:2], starts, masked, *numbers)
    inputs, numbers = (*tensors, *rows, starts), (0.25, 8, 0.5, 2, 2, False)
    torch.library.opcheck(masked_attention, (*inputs, *numbers), **checks)
    output, peaks = masked_attention(*inputs, *numbers)
    torch.library.opcheck(masked_attention_backward, (output, *inputs, output, peaks, *numbers), **checks)


def test_a_compiled_model_is_one_graph(llama):
    llama.model.layers = llama.model.layers[:1]
    ids = torch.randint(1, 97, (1, 48))
    with huggingface_training.training_attention(llama, mode="soft", budget=32, queries="all", backend="triton"):
        explained = torch._dynamo.explain(llama)(input_ids=ids, labels=ids, use_cache=False)
    torch._dynamo.reset()
    assert explained.graph_break_count == 0
