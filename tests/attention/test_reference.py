"""The method against its definition, written out with loops in float64."""

import math

import pytest
import torch
from paged_layers import DIM, GROUP, HEADS, filled_layer

from unique_asr.attention import SparseAttentionConfig, reference
from unique_asr.attention.scores import SCORES
from unique_asr.attention.steps import attend_to_pages


def page_score(name, query, keys, scale):
    """The score of one page for one query head, from the definition: query [D], keys [n, D] in float64."""
    mean = keys.mean(0)
    if name == "mean":
        return query @ mean
    if name == "unique":
        std = math.sqrt(sum((key - mean) @ (key - mean) for key in keys) / len(keys))
        return query @ mean + scale * query.norm() * std
    if name == "quest":
        return torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum()
    variance = (keys - mean).square().mean(0)
    return query @ mean + scale * (query.square() @ variance) / math.sqrt(len(query))


def expected_step(config, query, keys, values, first=0):
    """One sparse step of a row and KV head: query [G, D], keys and values [N, D] -> [G, D], tokens read."""
    size, length = config.page_size, len(keys)
    newest = (length - 1) // size
    pages = range(first // size, newest)
    spans = [range(max(first, page * size), (page + 1) * size) for page in pages]
    scores = torch.stack(
        [torch.stack([page_score(config.score, q, keys[list(span)], config.scale) for span in spans]) for q in query]
    )
    if config.combine == "max":
        group = scores.amax(0)
    else:
        group = (scores / math.sqrt(DIM)).softmax(-1).mean(0)
    forced = set(list(pages)[: config.sink_pages]) | set(range(newest - config.recent_pages + 1, newest))
    order = sorted(range(len(pages)), key=lambda index: (pages[index] not in forced, -group[index].item(), index))
    chosen = sorted(order[: config.pages - 1])
    tokens = [token for index in chosen for token in spans[index]] + list(range(max(first, newest * size), length))
    weights = (query @ keys[tokens].T / math.sqrt(DIM)).softmax(-1)
    return weights @ values[tokens], tokens


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize(
    ("length", "page_size", "budget", "sink_pages", "recent_pages"),
    [
        (63, 8, 32, 1, 2),
        (100, 8, 24, 0, 1),
        (200, 16, 64, 2, 2),
        (257, 32, 128, 1, 1),
        (264, 8, 64, 1, 4),
        (75, 8, 8, 0, 1),
    ],
)
def test_a_step_is_the_definition(score, combine, length, page_size, budget, sink_pages, recent_pages):
    config = SparseAttentionConfig(budget, page_size, score, 0.5, combine, sink_pages, recent_pages)
    layer, query = filled_layer(config, length)
    output = attend_to_pages(layer, query, DIM**-0.5)
    for head in range(HEADS):
        keys, values = layer.keys[0, head, :length].double(), layer.values[0, head, :length].double()
        queries = query[0, head * GROUP : (head + 1) * GROUP, 0].double()
        expected, tokens = expected_step(config, queries, keys, values)
        assert len(tokens) <= budget
        torch.testing.assert_close(output[0, head].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["max", "share"])
@pytest.mark.parametrize("first", [5, 16, 60, 90])
def test_a_padded_row_reads_its_own_tokens(combine, first):
    """The second row is padded on the left by `first` tokens of garbage; its sink is the first page with a token."""
    config = SparseAttentionConfig(budget=32, combine=combine)
    length = 100
    layer, query = filled_layer(config, length, batch=2)
    layer.keys[1, :, :first] = 1e4
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, :first] = False
    output = attend_to_pages(layer, query, DIM**-0.5, valid)
    for row, start in ((0, 0), (1, first)):
        for head in range(HEADS):
            keys, values = layer.keys[row, head, :length].double(), layer.values[row, head, :length].double()
            queries = query[row, head * GROUP : (head + 1) * GROUP, 0].double()
            expected, _ = expected_step(config, queries, keys, values, start)
            torch.testing.assert_close(output[row, head].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_statistics_of_a_partial_page_count_only_its_tokens(score):
    keys = torch.randn(2, HEADS, 21, DIM)
    statistics = reference.page_statistics(keys, 8, SCORES[score])
    tail = reference.page_statistics(keys[:, :, 16:], 8, SCORES[score])
    padded = torch.cat([keys, torch.full((2, HEADS, 3, DIM), 9.0)], dim=2)
    valid = torch.arange(24).expand(2, -1) < 21
    for whole, part, masked in zip(statistics, tail, reference.page_statistics(padded, 8, SCORES[score], valid)):
        assert whole.shape[2] == 3
        torch.testing.assert_close(whole[:, :, 2:], part)
        torch.testing.assert_close(whole, masked)


def test_top_pages_are_exact_and_prefer_the_earlier_of_equal_scores():
    torch.manual_seed(0)
    scores = torch.randint(-3, 3, (4, 3, 500)).float()
    scores[0, 0, ::7] = torch.inf
    scores[1, :, 100:] = -torch.inf
    scores[2] *= 0.0  # both zeros
    for count in (1, 5, 63, 499, 500):
        expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
        assert torch.equal(reference.top_pages(scores, count), expected)


def test_the_last_pages_and_the_sink_are_read_whatever_their_scores():
    config = SparseAttentionConfig(budget=64, sink_pages=2, recent_pages=3)
    scores = torch.full((1, 1, 40), 5.0)
    scores[..., [0, 1, 38, 39]] = -5.0
    pages = reference.top_pages(reference.force_pages(scores, config, newest=40), config.pages - 1)
    assert pages.tolist() == [[[0, 1, 2, 3, 4, 38, 39]]]


def test_a_short_query_is_heard_if_the_heads_share():
    """What Gemma 3 does: the page that one head attends to, below all pages of a head whose query is longer."""
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 50 * 8, 64)
    wanted = 12 * torch.nn.functional.normalize(torch.randn(64), dim=0)
    keys[0, 0, 17 * 8 : 18 * 8] = wanted + 0.1 * torch.randn(8, 64)
    queries = torch.stack([32 * torch.nn.functional.normalize(torch.randn(64), dim=0), 8 * wanted / 12])[None, None]
    mass = (queries @ keys.transpose(-1, -2) / 8).softmax(-1).unflatten(-1, (-1, 8)).sum(-1)
    assert mass[0, 0, 1, 17] > 0.99

    score = SCORES["unique"]
    scores = score.scores(queries, reference.page_statistics(keys, 8, score), 0.5)
    chosen = {how: reference.combine_group(scores, how, 1 / 8) for how in ("max", "share")}
    assert 17 in reference.top_pages(scores[:, :, 1], 1)
    assert 17 not in reference.top_pages(chosen["max"], 8)
    assert 17 in reference.top_pages(chosen["share"], 8)
