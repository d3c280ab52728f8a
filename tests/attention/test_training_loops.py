"""Training through the page selection in the loops that people have: Trainer, accelerate, DDP, PEFT."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from unique_asr.attention import training_attention

SETTINGS = {"mode": "soft", "budget": 40}


def make_rows(count):
    """Rows of 60 tokens whose last 40 are the transcript, and a column that no model knows."""
    ids = torch.randint(1, 97, (count, 60), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :20] = -100
    return [{"input_ids": row, "labels": label, "duration": 1.0} for row, label in zip(ids, labels)]


def make_batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def find_gradients(model, rows, bf16=False):
    """Gradients of the plain loop, in which `decoded` is given: what every other loop has to give."""
    batch, model = make_batch(rows), copy.deepcopy(model).train()
    with training_attention(model, **SETTINGS), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch, decoded=batch["labels"] != -100, use_cache=False).loss
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}])
def test_the_trainer_of_transformers(llama, tmp_path, options):
    """One step of plain gradient descent moves the weights along these gradients."""
    rows = make_rows(2)
    gradients = find_gradients(llama, rows, options.get("bf16", False))
    before = copy.deepcopy(llama.state_dict())
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True, **options,
    )  # fmt: skip
    with training_attention(llama, **SETTINGS):
        Trainer(llama, arguments, train_dataset=rows).train()
    for name, value in llama.named_parameters():
        moved = (before[name] - value.detach()) / 1e-3
        assert torch.cosine_similarity(moved.flatten(), gradients[name].flatten(), dim=0) > 0.995, name
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("switch_first", [True, False])
def test_accelerate(llama, switch_first):
    """`prepare` replaces `forward`; the switch may come before or after it."""
    rows = make_rows(2)
    gradients = find_gradients(llama, rows, bf16=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    llama.train()
    if switch_first:
        handle = training_attention(llama, **SETTINGS)
    optimizer = torch.optim.SGD(llama.parameters(), 1e-3)
    model, optimizer = accelerator.prepare(llama, optimizer)
    if not switch_first:
        handle = training_attention(model, **SETTINGS)
    with handle:
        accelerator.backward(model(**make_batch(rows), use_cache=False).loss)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        found = llama.get_parameter(name).grad
        torch.testing.assert_close(found, gradients[name], rtol=1e-2, atol=1e-3)


def run_rank(rank, processes, model, rows, store, results):
    """One process of DDP: its share of the rows, the switch around the wrapped model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    wrapped = DistributedDataParallel(model.train())
    with training_attention(wrapped, **SETTINGS):
        wrapped(**make_batch(rows[rank::processes]), use_cache=False).loss.backward()
    if rank == 0:
        torch.save({name: value.grad for name, value in model.named_parameters()}, results)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ddp(llama, tmp_path, processes):
    """Its processes together have the gradients of the plain loop."""
    rows = make_rows(2)
    expected = find_gradients(llama, rows)
    arguments = processes, llama, rows, tmp_path / "store", tmp_path / "gradients.pt"
    if processes == 1:
        run_rank(0, *arguments)
    else:
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=processes)
    found = torch.load(tmp_path / "gradients.pt")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_data_parallel_copies_of_a_switched_model(llama):
    """The Trainer's way with several GPUs and one process: replicas share the switch."""
    batch = make_batch(make_rows(2))
    with training_attention(nn.DataParallel(llama), **SETTINGS):
        loss = nn.DataParallel(llama)(**batch, use_cache=False).loss
        assert torch.equal(loss, llama(**batch, use_cache=False).loss)


def test_peft_around_the_model(llama):
    """LoRA learns, and the switch takes the wrapped model."""
    from peft import LoraConfig, get_peft_model

    batch = make_batch(make_rows(2))
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"))
    with training_attention(model, **SETTINGS):
        masked = model(**batch, use_cache=False)
        masked.loss.backward()
    dense = model(**batch, use_cache=False)
    assert not torch.isclose(masked.logits[:, 50:], dense.logits[:, 50:], atol=1e-2).all()
    moved = [value.grad.abs().sum() > 0 for name, value in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 6
    assert all(moved)
