"""On a GPU: training steps as CUDA graphs. python -m pytest tests/gpu/test_training_gpu.py -m gpu"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unique_asr.attention.huggingface_training import training_attention
from unique_asr.training.corpus import Corpus, Source, TrainingUtterance
from unique_asr.training.decoders import GraphedDecoder, PlainDecoder
from unique_asr.training.listening import CLEAN
from unique_asr.training.speech_material import SpeechMaterial
from unique_asr.training.stages import StageConfig
from unique_asr.training.text_material import TextMaterial
from unique_asr.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_graphs_of_masked_steps_give_the_gradients_of_plain_ones():
    """Dense and soft at once; hard, captured after the weights were in other memory and back, as when a stage saves.

    And of packed rows: one graph, whatever begins where.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(**shape, num_key_value_heads=1, vocab_size=64)
    model = LlamaForCausalLM(config).cuda().to(torch.bfloat16).train()
    plain = copy.deepcopy(model)
    handles = [training_attention(each, mode="dense", budget=128) for each in (model, plain)]
    graphed, eager = GraphedDecoder(model.get_decoder(), handles[0]), PlainDecoder(plain.get_decoder())
    decoded = torch.arange(600, device="cuda").expand(2, -1) >= 300

    def step(mode, *starts):
        embeds = torch.randn(2, 600, 192, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn_like(embeds)
        for handle in handles:
            handle.config = replace(handle.config, mode=mode)
        gradients = []
        for run, llm in ((graphed, model), (eager, plain)):
            llm.zero_grad(set_to_none=True)
            (run(embeds, decoded, *starts) * weight).sum().backward()
            gradients.append([parameter.grad.float() for parameter in llm.model.layers.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 2e-2 * theirs.norm()

    for mode in ("dense", "soft", "soft", "dense"):
        step(mode)
    for parameter in model.parameters():
        short = parameter.data
        parameter.data = short.float()
        parameter.data = short
    for mode in ("dense", "soft", "hard", "hard", "soft"):
        step(mode)
    token, before = torch.arange(600, device="cuda"), len(graphed.graphs)
    for mode in ("dense", "soft", "hard"):
        for length in (200, 344, 600):
            step(mode, (token // length * length).int().expand(2, -1).contiguous())
    assert len(graphed.graphs) == before + 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", [None, {"mode": "soft", "hard_last": 0.4}, {"mode": "hard", "queries": "all"}])
def test_stages_as_graphs_have_the_losses_of_plain_ones(byte_tokenizer, tmp_path, attention, checkpointing):
    """Soft and then hard, with validations and saves on the way, which put the weights into other memory and back."""
    path, tokenizer, losses = tmp_path / "text.txt", byte_tokenizer(), {}
    path.write_text("".join(f"the cat number {n} sat on the mat of the cat number {n * n % 97}\n" for n in range(400)))
    shape = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(**shape, num_key_value_heads=1, vocab_size=len(tokenizer), tie_word_embeddings=True)
    if attention:
        attention = {"budget": 128, **attention}
    stage = StageConfig("adapt", 10, {"language_model": 1e-3}, tokens=2048, lengths=[1024], attention=attention,
                        checkpointing=checkpointing)  # fmt: skip
    for graphs in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).cuda().eval()
        saved = []
        trainer = Trainer(
            model, TextMaterial(model, tokenizer, [path]), tmp_path / str(graphs), cuda_graphs=graphs, log_every=1,
            log=lambda line: None, save=saved.append, save_minutes=0.0, validate=lambda stage: {"llm": 1.0},
            validate_steps=3,
        )  # fmt: skip
        trainer.run([stage])
        assert len(saved) == 11
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
        rows = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
        losses[graphs] = [row["loss"] for row in rows if "loss" in row]
    print(losses)
    assert losses[False][-1] < 0.9 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


@pytest.mark.parametrize("attention", [None, {"mode": "soft", "hard_last": 0.4}, {"mode": "hard", "queries": "all"}])
def test_packed_stages_as_graphs_have_the_losses_of_plain_ones(speech_llm, tmp_path, attention):
    """Rows that hold other items at every step, by one graph a mode."""
    attention = attention and {"budget": 40, **attention}
    stage = StageConfig("adapt", 10, {"language_model": 3e-3}, seconds=(2.0, 9.0), ctc_weight=0.0, llm_weight=1.0,
                        tokens=1024, pack=True, warmup=0.0, attention=attention)  # fmt: skip
    losses = {}
    for graphs in (False, True):
        model, processor = speech_llm()
        model.cuda()
        torch.manual_seed(0)
        audio = torch.randint(-3000, 3000, (60 * 16000,), dtype=torch.int16).cuda()
        utterances = [
            TrainingUtterance(
                second * 16000, (second + 1) * 16000, f"the cat number {second}", f"The cat number {second}."
            )
            for second in range(60)
        ]
        corpus = Corpus([Source("noise", audio, [utterances], 1.0)], seed=0)
        trainer = Trainer(
            model, SpeechMaterial(model, processor, corpus, CLEAN), tmp_path / str(graphs), cuda_graphs=graphs,
            log_every=1, log=lambda line: None,
        )  # fmt: skip
        trainer.run([stage])
        rows = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
        losses[graphs] = [row["loss"] for row in rows]
    print(losses)
    assert losses[False][-1] < 0.9 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
