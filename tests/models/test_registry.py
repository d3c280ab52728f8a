"""What a name means, and that one `load` finds all of them."""

import json

import pytest
import speech_models

from unique_asr.models import SHIPPED_MODELS, ModelError, SpeechLLMForConditionalGeneration, identify_model, load
from unique_asr.models.pretrained import KNOWN_MODELS, find
from unique_asr.models.pretrained import load as load_known_model


def test_a_shipped_model_is_known_by_its_name():
    entry = identify_model("default")
    assert (entry.kind, entry.languages, entry.takes_hotwords) == ("shipped", ("en",), False)
    assert identify_model(SHIPPED_MODELS["default"].folder).kind == "speech_llm"


@pytest.mark.parametrize(
    ("model_type", "kind"), [("qwen3_asr", "known"), ("unique_speech_llm", "speech_llm"), ("gpt2", "other")]
)
def test_a_folder_is_known_by_its_configuration(model_type, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    entry = identify_model(tmp_path)
    assert (entry.name, entry.kind) == (str(tmp_path), kind)
    assert entry.known_model is KNOWN_MODELS.get(model_type)
    assert entry.takes_hotwords == (kind == "known")
    assert bool(entry.languages) == (kind == "known")


def test_what_is_not_there_is_missing(tmp_path):
    assert identify_model(tmp_path / "none").kind == "missing"


def test_one_load_for_both_architectures(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert isinstance(load(tmp_path / "ours", "cpu")[0], SpeechLLMForConditionalGeneration)
    model, processor = speech_models.make("glmasr")
    model.save_pretrained(tmp_path / "glm")
    processor.save_pretrained(tmp_path / "glm")
    loaded, _ = load(tmp_path / "glm", "cpu")
    assert find(loaded) is KNOWN_MODELS["glmasr"]
    assert not loaded.training


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="describes gpt2, not unique_speech_llm"):
        load(tmp_path)
    with pytest.raises(ModelError, match="is no known speech LLM; see conf/model/"):
        load_known_model(tmp_path)
