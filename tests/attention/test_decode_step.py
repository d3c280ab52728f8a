"""A whole decode step of a model, static and compiled."""

import pytest
import torch
from paged_layers import DEVICE, record_calls

from unique_asr.attention import (
    DecodeStep,
    PagedCache,
    SparseAttentionConfig,
    sparse_attention,
)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(
    "attention", [{"statistics_dtype": "int8", "dense_layers": 1}, {"super_page_size": 16, "combine": "share"}], ids=str
)
def test_a_batch_by_static_steps(llama, name, attention, monkeypatch):
    """`DecodeStep` on a padded batch gives the tokens of generate, over the end of the budget and of a page."""
    calls = record_calls(monkeypatch, "sparse_step")
    llama.to(DEVICE)
    torch.manual_seed(0)
    starts = torch.tensor([0, 45], device=DEVICE)
    mask = (torch.arange(102, device=DEVICE) >= starts[:, None]).long()
    ids = torch.randint(1, 97, (2, 102), device=DEVICE) * mask
    with sparse_attention(llama, budget=104, backend=name, **attention) as sparse:
        expected = llama.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 102:]
        cache = sparse.make_cache(capacity=256)
        positions = (torch.arange(102, device=DEVICE) - starts[:, None]).clamp(min=0)
        output = llama(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        step = DecodeStep(llama, cache, batch=2, starts=starts)
        step.choose(output.logits[:, -1])
        tokens = [step.result[0].tolist()]
        for _ in range(4):
            step.run()
            tokens.append(step.result[0].tolist())
    assert torch.tensor(tokens).T.tolist() == expected.tolist()
    assert sparse.counters.sparse_steps == 2 * 2
    if name == "triton":
        # two steps; on CUDA the first one's warm-up and capture
        assert len(calls) == 2 * (3 - attention.get("dense_layers", 0))


def test_a_compiled_step_is_one_graph(llama):
    """Whatever the length: a recompilation a step would cost seconds each."""
    torch._dynamo.reset()
    llama.set_attn_implementation("unique")
    tokens = {}
    for compiled in (False, True):
        cache = PagedCache(llama.config, SparseAttentionConfig(budget=64, backend="torch"))
        step = DecodeStep(llama, cache, capture=False)
        if compiled:
            graphs = []

            def count(graph, inputs, graphs=graphs):
                graphs.append(graph)
                return graph.forward

            step._model = torch.compile(llama, fullgraph=True, dynamic=False, backend=count)
        with torch.no_grad():
            step.choose(llama(torch.arange(1, 91)[None], past_key_values=cache).logits[:, -1])
        tokens[compiled] = []
        for _ in range(6):
            step.run()
            tokens[compiled].append(step.result[0].item())
    assert tokens[True] == tokens[False]
    assert len(graphs) == 1
