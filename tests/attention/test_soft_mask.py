"""Training through the page selection, in plain PyTorch: against the definition in loops."""

import math

import pytest
import torch

from unique_asr.attention.soft_mask import TrainingAttentionConfig, attention, page_statistics


def config(**values):
    return TrainingAttentionConfig.from_dict({"budget": 40, "queries": "all", "tau": 0.7, **values})


def inputs(tokens=117, batch=2, heads=2, group=3, dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(batch, heads * group, tokens, dim, dtype=dtype)
    key = torch.randn(batch, heads, tokens, dim, dtype=dtype) + 2 * torch.randn(batch, heads, 1, dim, dtype=dtype)
    value = torch.randn(batch, heads, tokens, dim, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (query, key, value)]


def documents(*rows):
    """`starts` [B, N] of documents of these lengths."""
    return torch.tensor([[sum(row[:i]) for i, length in enumerate(row) for _ in range(length)] for row in rows])


def expected_row(query, key, value, b, h, t, start, settings):
    """The output of one query, in loops, from the words of the paper."""
    sparse, size = settings.sparse, settings.sparse.page_size
    group = query.shape[1] // key.shape[1]
    kv, own, first = h // group, t // size, start // size
    scores = {}
    for page in range(first, own):
        keys = key[b, kv, max(page * size, start) : (page + 1) * size]
        mean = keys.mean(0)
        std = keys.var(0, unbiased=False).sum().sqrt()
        heads = [query[b, kv * group + g, t] for g in range(group)]
        each = torch.stack([q @ mean + sparse.scale * q.norm() * std for q in heads])
        if sparse.combine == "max":
            scores[page] = each.max()
        else:
            scores[page] = each * query.shape[-1] ** -0.5
    if sparse.combine == "share" and scores:
        shares = torch.stack(list(scores.values())).softmax(0).mean(1)
        scores = dict(zip(scores, shares))
    gate = dict.fromkeys(range(first, own + 1), 0.0)
    if len(scores) > sparse.pages - 1:
        forced = {p for p in scores if p < first + sparse.sink_pages or p > own - sparse.recent_pages}
        free = {p: s.item() for p, s in scores.items() if p not in forced}
        ranked = sorted(free.values(), reverse=True)
        chosen = sparse.pages - 1 - len(forced)
        theta = (ranked[chosen - 1] + ranked[chosen]) / 2
        temperature = settings.tau * torch.tensor(list(free.values())).std(unbiased=False).item()
        for page, score in free.items():
            if settings.mode == "hard":
                gate[page] = 0.0 if score > theta else -math.inf
            else:
                gate[page] = -math.log1p(math.exp(-(score - theta) / temperature))
    bias = torch.tensor([gate[j // size] for j in range(start, t + 1)], dtype=query.dtype)
    weights = (key[b, kv, start : t + 1] @ query[b, h, t] * query.shape[-1] ** -0.5 + bias).softmax(0)
    return weights @ value[b, kv, start : t + 1]


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_rows_are_what_the_paper_says(mode, combine):
    settings = config(mode=mode, combine=combine, sink_pages=1, recent_pages=2)
    query, key, value = inputs()
    starts = documents([117], [13, 3, 2, 80, 19])
    got = attention(query, key, value, settings, starts, slice_tokens=0)
    with torch.no_grad():
        for b, h, t in [
            (0, 0, 0),
            (0, 5, 46),
            (0, 1, 116),
            (1, 2, 14),
            (1, 3, 17),
            (1, 4, 70),
            (1, 0, 97),
            (1, 5, 116),
        ]:
            start = int(starts[b, t])
            torch.testing.assert_close(got[b, h, t], expected_row(query, key, value, b, h, t, start, settings))


def test_gradients_are_those_of_finite_differences_with_the_threshold_held():
    """Of a soft row by its score: theta, temperature and norm are constants, so they are frozen by hand here."""
    settings = config(mode="soft", budget=32)
    query, key, value = inputs(tokens=41, batch=1, heads=1, group=2, dim=4)
    loss = attention(query, key, value, settings, slice_tokens=0)[:, :, -1].square().sum()
    (gradient,) = torch.autograd.grad(loss, query)
    dense = attention(query, key, value, config(mode="dense"), slice_tokens=0)[:, :, -1].square().sum()
    (without,) = torch.autograd.grad(dense, query)
    assert gradient[:, :, :-1].count_nonzero() == 0
    assert not torch.allclose(gradient, without)
    mean, std = page_statistics(key.detach(), torch.zeros(1, 41, dtype=torch.int), 8)
    q = query.detach()[0, :, -1]
    scores = (q @ mean[0, 0, :5].T + 0.5 * q.norm(dim=-1, keepdim=True) * std[0, 0, :5]).amax(0)
    free = scores[1:4]
    theta, temperature = free.sort(descending=True).values[:2].mean(), 0.7 * free.std(unbiased=False)
    norm = q.norm(dim=-1, keepdim=True)

    def output(moved):
        score = (moved @ mean[0, 0, :5].T + 0.5 * norm * std[0, 0, :5]).amax(0)
        gate = torch.zeros(6, dtype=torch.float64)
        gate[1:4] = torch.nn.functional.logsigmoid((score[1:4] - theta) / temperature)
        logits = moved @ key.detach()[0, 0].T / 2 + gate.repeat_interleave(8)[:41]
        return (logits.softmax(-1) @ value.detach()[0, 0]).square().sum()

    assert output(q).item() == pytest.approx(loss.item(), rel=1e-9)
    numeric = torch.zeros_like(q)
    for place in range(q.numel()):
        step = torch.zeros_like(q).view(-1)
        step[place] = 1e-6
        step = step.view_as(q)
        numeric.view(-1)[place] = (output(q + step) - output(q - step)) / 2e-6
    torch.testing.assert_close(gradient[0, :, -1], numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_slices_change_nothing(mode):
    settings = config(mode=mode)
    starts = documents([117], [50, 67])
    masked = torch.rand(2, 117, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[:, 60:90] = False
    results = []
    for slice_tokens in (0, 7, 50, None):
        tensors = inputs()
        output = attention(*tensors, settings, starts, masked, slice_tokens=slice_tokens)
        output.square().sum().backward()
        results.append([output, *(tensor.grad for tensor in tensors)])
    for other in results[1:]:
        for got, want in zip(other, results[0]):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_is_not_masked_and_what_fits_the_budget_is_dense():
    tensors = inputs()
    dense = attention(*tensors, config(mode="dense"))
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(dense, expected)
    assert torch.equal(attention(*tensors, config(mode="soft", budget=120)), dense)
    masked = torch.zeros(2, 117, dtype=torch.bool)
    masked[:, 100:] = True
    for mode in ("soft", "hard"):
        some = attention(*tensors, config(mode=mode), masked=masked)
        torch.testing.assert_close(some[:, :, :100], dense[:, :, :100])
        assert not torch.isclose(some[:, :, 100:], dense[:, :, 100:]).all(-1).any()
        every = attention(*tensors, config(mode=mode))
        torch.testing.assert_close(every[:, :, :40], dense[:, :, :40])  # the budget holds these contexts


def test_a_packed_document_is_itself_wherever_pages_line_up():
    query, key, value = inputs(tokens=150, batch=1)
    settings = config(mode="soft")
    packed = attention(query, key, value, settings, documents([64, 86]))
    alone = attention(query[:, :, 64:], key[:, :, 64:], value[:, :, 64:], settings)
    torch.testing.assert_close(packed[:, :, 64:], alone)


def test_softness_goes_to_hard():
    tensors = inputs()
    hard = attention(*tensors, config(mode="hard"))
    torch.testing.assert_close(attention(*tensors, config(mode="soft", tau=1e-5)), hard, rtol=1e-3, atol=1e-3)
    warm = attention(*tensors, config(mode="soft", tau=1e5))
    assert not torch.allclose(warm, hard, atol=1e-2)


def test_equal_keys_have_finite_gradients():
    query, key, value = inputs()
    key = torch.ones_like(key).requires_grad_()
    attention(query, key, value, config(mode="soft")).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))


def test_settings_that_make_no_sense_are_named():
    for values, message in {
        "mode": ({"mode": "firm"}, "choose one of dense, soft, hard"),
        "tau": ({"tau": 0}, "attention.tau is 0"),
        "score": ({"score": "quest"}, "training knows unique and mean"),
        "budget": ({"budget": 24}, "training needs a page more"),
        "unknown": ({"temperature": 1}, "attention has no temperature"),
    }.values():
        with pytest.raises(ValueError, match=message):
            config(**values)
