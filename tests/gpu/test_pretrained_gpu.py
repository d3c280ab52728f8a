"""Speech LLMs of real shapes and random weights on a GPU: captured steps, and memory as estimated. pytest -m gpu"""

from types import SimpleNamespace

import pytest
import torch
import transformers

from unique_asr.decoding.memory import read_shape
from unique_asr.models.pretrained import KNOWN_MODELS
from unique_asr.models.pretrained.pass_memory import estimate_pass_memory, estimate_pass_tokens
from unique_asr.transcribers.pretrained import PretrainedTranscriber

pytestmark = pytest.mark.gpu
QWEN2_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
SHAPES = {  # configuration class and what differs from its defaults
    "moss_transcribe_diarize": ("MossTranscribeDiarizeConfig", {}),
    "voxtral": ("VoxtralConfig", {"audio_token_id": 24}),
    "vibevoice_asr": ("VibeVoiceAsrConfig", {"text_config": QWEN2_7B}),
}


def make(name):
    kind, options = SHAPES[name]
    if not hasattr(transformers, kind):
        pytest.skip("this transformers does not know it")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = getattr(transformers, KNOWN_MODELS[name].model_class)._from_config(
            getattr(transformers, kind)(**options), dtype=torch.bfloat16
        )
    return model.eval(), SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))


def embeds_of(known_model, model, seconds):
    size = model.config.get_text_config(decoder=True).hidden_size
    return 0.02 * torch.randn(1, int(known_model.tokens_a_second * seconds), size, dtype=model.dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [10, 30])
@pytest.mark.parametrize("name", list(SHAPES))
def test_memory_is_as_estimated(name, minutes):
    known_model, (model, processor) = KNOWN_MODELS[name], make(name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    transcriber = PretrainedTranscriber((model, processor), budget=512)
    tokens = estimate_pass_tokens(known_model, 60 * minutes)
    features = [embeds_of(known_model, model, 60 * minutes)[0]]  # as they come from the encoder, kept beside the prompt
    transcriber.decoder.reserve(tokens)
    transcriber.decoder.prefill(torch.cat(features)[None].clone())
    list(transcriber.decoder.tokens(32))
    expected = estimate_pass_memory(
        known_model, 60 * minutes, read_shape(model), transcriber.attention, tokens=tokens
    ).total
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", list(SHAPES))
def test_captured_steps_of_a_whole_speech_llm(name):
    known_model, (model, processor) = KNOWN_MODELS[name], make(name)
    embeds = embeds_of(known_model, model, 120)
    written = []
    for capture in (True, False):
        transcriber = PretrainedTranscriber((model, processor), budget=512)
        transcriber.decoder.step.capture = capture
        transcriber.decoder.reserve(4096)
        transcriber.decoder.prefill(embeds)
        written.append(list(transcriber.decoder.tokens(16)))
        assert transcriber.decoder.counters.sparse_steps == 15
    assert written[0] == written[1]
