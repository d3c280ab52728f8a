"""The fused attention of training on a GPU: exact against float64, in the loops of people, its time and memory.

python -m pytest tests/gpu/test_soft_mask_gpu.py -m gpu -s
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from unique_asr.kernels.soft_mask_attention import training_attention

from unique_asr.attention import huggingface_training, soft_mask
from unique_asr.attention.soft_mask import TrainingAttentionConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP32 = torch.bfloat16, torch.float32
# tokens, KV heads, group, dim, dtype, documents, settings
CASES = {
    "fp32": (1000, 2, 3, 64, FP32, None, {}),
    "bf16": (2000, 2, 2, 128, BF16, None, {}),
    "hard": (1003, 2, 4, 64, FP32, None, {"mode": "hard"}),
    "packed": (1500, 1, 3, 64, BF16, [700, 13, 3, 784], {"sink_pages": 2}),
    "pages of 16": (1500, 1, 2, 128, BF16, None, {"page_size": 16}),
    "wide": (900, 1, 1, 256, BF16, None, {}),
    "odd": (777, 1, 5, 80, FP32, None, {"tau": 0.2}),
}


def tensors(tokens, heads, group, dim, dtype, batch=1):
    torch.manual_seed(0)
    query = torch.randn(batch, tokens, heads * group, dim, device="cuda").transpose(1, 2)
    key = torch.randn(batch, heads, tokens, dim, device="cuda") + 2 * torch.randn(batch, heads, 1, dim, device="cuda")
    key += torch.randn(batch, heads, tokens // 8 + 1, dim, device="cuda").repeat_interleave(8, 2)[:, :, :tokens]
    value = torch.randn(batch, heads, tokens, dim, device="cuda")
    return [each.to(dtype).requires_grad_() for each in (query, key, value)]


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    """bf16 against float64 of the same bf16 numbers: a tenth of the rows may choose other pages where scores are close,
    so errors are means, relative to the mean size."""
    tokens, heads, group, dim, dtype, documents, settings = CASES[case]
    config = TrainingAttentionConfig.from_dict({"budget": 256, "queries": "all", "tau": 0.7, **settings})
    starts = None
    if documents:
        starts = [sum(documents[:i]) for i, length in enumerate(documents) for _ in range(length)]
        starts = torch.tensor([starts], device="cuda")
    ours = tensors(tokens, heads, group, dim, dtype)
    weight = torch.randn(ours[0].shape, device="cuda").to(dtype)
    output = training_attention(*ours, config, starts).transpose(1, 2)
    output.backward(weight)
    exact = [each.detach().double().requires_grad_() for each in ours]
    expected = soft_mask.attention(*exact, config, starts)
    expected.backward(weight.double())
    limit = 2e-2 if dtype == BF16 else 1e-3
    pairs = [(output, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(ours, exact))]
    for name, (got, want) in zip(("output", "query", "key", "value"), pairs):
        error = ((got.double() - want).abs().mean() / want.abs().mean()).item()
        print(f"  {case} {name}: {error:.1e}")
        assert error < limit, f"{name}: {error:.1e}"


def test_it_is_deterministic():
    config = TrainingAttentionConfig.from_dict({"budget": 256, "queries": "all"})
    found = []
    for _ in range(2):
        ours = tensors(4000, 4, 2, 64, BF16, batch=2)
        training_attention(*ours, config).square().sum().backward()
        found.append([each.grad for each in ours])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_a_compiled_model_under_checkpointing():
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=512)).cuda().to(BF16).train()
    ids = torch.randint(0, 512, (1, 1000), device="cuda")
    losses = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with huggingface_training.training_attention(model, mode="soft", budget=256, queries="all"):
            run = torch.compile(model) if compiled else model
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.float()
        losses.append((loss.item(), gradient.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def make_model(dtype=FP32):
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=512, initializer_range=0.1)
    return LlamaForCausalLM(config).to(dtype).train()


def make_rows(count, tokens=1000):
    """Rows of which the second half is the transcript."""
    ids = torch.randint(0, 512, (count, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]


def forbid_plain_pytorch(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("plain PyTorch ran where the kernel can")

    monkeypatch.setattr(huggingface_training, "attention", fail)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_over_float32_weights(monkeypatch, compiled):
    """What Trainer(bf16=True) does: rotary embeddings give float32 queries and keys beside bfloat16 values.

    The kernel's loss and gradients are those of plain PyTorch, as far as bfloat16 lets them.
    """
    batch = {name: torch.stack([row[name] for row in make_rows(2)]).cuda() for name in ("input_ids", "labels")}
    found = []
    for backend in ("torch", "auto"):
        model = make_model().cuda()
        if backend == "auto":
            forbid_plain_pytorch(monkeypatch)
        run = torch.compile(model) if compiled and backend == "auto" else model
        with (
            huggingface_training.training_attention(run, mode="soft", budget=256, tau=0.7, backend=backend),
            torch.autocast("cuda", BF16),
        ):
            loss = run(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), model.model.layers[0].self_attn.v_proj.weight.grad.flatten()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.98


def test_a_model_that_moves_after_the_switch(monkeypatch):
    """To the GPU: the kernel runs. Back to the CPU: plain PyTorch does."""
    rows = make_rows(1, 400)
    batch = {name: rows[0][name][None] for name in ("input_ids", "labels")}
    model = make_model()
    with huggingface_training.training_attention(model, mode="soft", budget=256, tau=0.7):
        here = model(**batch, use_cache=False).loss.item()
        with monkeypatch.context() as patch:
            forbid_plain_pytorch(patch)
            model.cuda()
            there = model(**{name: value.cuda() for name, value in batch.items()}, use_cache=False).loss.item()
        model.cpu()
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(here, rel=1e-4)
    assert there == pytest.approx(here, rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"torch_compile": True}], ids=str)
def test_the_trainer_of_transformers(tmp_path, monkeypatch, options):
    """With bf16=True it learns a row by heart, through the kernel."""
    forbid_plain_pytorch(monkeypatch)
    model, rows = make_model(), make_rows(1) * 60
    with huggingface_training.training_attention(model, mode="soft", budget=256):
        arguments = TrainingArguments(
            tmp_path, bf16=True, max_steps=60, per_device_train_batch_size=1, learning_rate=3e-3, logging_steps=1,
            save_strategy="no", report_to="none", **options,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_ddp_and_lora(tmp_path, monkeypatch):
    """One process of NCCL around a model with LoRA around the switched decoder, in bfloat16."""
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    forbid_plain_pytorch(monkeypatch)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
        model = DistributedDataParallel(get_peft_model(make_model(BF16).cuda(), lora))
        batch = {name: torch.stack([row[name] for row in make_rows(2)]).cuda() for name in ("input_ids", "labels")}
        with huggingface_training.training_attention(model, mode="soft", budget=256):
            model(**batch, use_cache=False).loss.backward()
        moved = [value.grad.abs().sum() > 0 for name, value in model.named_parameters() if "lora_B" in name]
        assert len(moved) == 4
        assert all(moved)
    finally:
        torch.distributed.destroy_process_group()


def test_a_sliding_window_beside_the_kernel():
    """Gemma 3: local layers by `sdpa`, the others by the kernel; dense as with the model's own attention."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "sliding_window": 128}
    config = Gemma3TextConfig(**shape, layer_types=["sliding_attention", "full_attention"])
    model = Gemma3ForCausalLM(config).cuda().to(BF16)
    batch = {name: torch.stack([row[name] for row in make_rows(2)]).cuda() for name in ("input_ids", "labels")}
    expected = model(**batch, use_cache=False).loss.item()
    with huggingface_training.training_attention(model, mode="dense"):
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(expected, rel=1e-2)
    with huggingface_training.training_attention(model, mode="soft", budget=256):
        model(**batch, use_cache=False).loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def measure(run):
    """Milliseconds of a forward and backward pass, and gigabytes at its peak."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(5):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 5, torch.cuda.max_memory_allocated() / 1e9


@pytest.mark.parametrize("dim", [64, 128])
def test_time_and_memory(dim):
    """Forward and backward at 32 K tokens, 16 query and 8 KV heads, bf16, against dense FlashAttention through SDPA."""
    query, key, value = tensors(32768, 8, 2, dim, BF16)
    weight = torch.randn_like(query)

    def dense():
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(weight)

    time, memory = measure(dense)
    print(f"\n  dim {dim}, dense: {time:.2f} ms, {memory:.2f} GB")
    quarter = torch.arange(32768, device="cuda")[None] >= 24576
    for name, settings, masked in (
        ("soft, all", {}, None),
        ("soft, the last quarter", {}, quarter),
        ("hard, all", {"mode": "hard"}, None),
    ):
        config = TrainingAttentionConfig.from_dict({"budget": 512, "queries": "all", **settings})

        def sparse(config=config, masked=masked):
            training_attention(query, key, value, config, masked=masked).transpose(1, 2).backward(weight)

        for each in (query, key, value):
            each.grad = None
        own, used = measure(sparse)
        print(f"  {name}: {own:.2f} ms ({own / time:.2f} x), {used:.2f} GB ({used / memory:.2f} x)")
        assert used < 1.2 * memory
