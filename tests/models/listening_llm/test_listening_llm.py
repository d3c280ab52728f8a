"""The listener and the model, of random weights: what is written, read and heard; loading what was saved."""

import numpy as np
import pytest
import torch

from unique_asr.models.listening_llm import ListeningLLMConfig, load_listening_llm
from unique_asr.models.listening_llm.listener import trace_path
from unique_asr.models.listening_llm.modeling import save_listening_llm
from unique_asr.models.loading import ModelError


def noise(seconds):
    return np.random.default_rng(1).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)


def test_words_have_increasing_times_inside_their_window(listening_llm):
    model, processor = listening_llm(beams=2, alternatives=1)
    listener = processor.make_listener(model)
    states = list(listener.listen([noise(11)], batch=2))
    speech = states[-1]
    assert speech.cuts[-1] == pytest.approx(11.0)
    assert len(speech.cuts) >= 2
    starts = [word.start for word in speech.words]
    assert starts == sorted(starts)
    assert all(0 <= word.start <= word.end <= 11.0 and 0 <= word.confidence <= 1 for word in speech.words)


def test_silence_is_not_heard(listening_llm):
    model, processor = listening_llm()
    *_, speech = processor.make_listener(model).listen([np.zeros(11 * 16000, np.float32)])
    assert (speech.words, speech.duration) == ([], 11.0)


def test_windows_are_heard_side_by_side_as_alone(listening_llm):
    model, processor = listening_llm()
    listener = processor.make_listener(model)
    windows = [noise(5), noise(3)]
    assert listener.hear(windows)[1] == listener.hear(windows[1:])[0]


def test_the_path_through_attention_goes_one_way():
    scores = torch.tensor([[[9.0, 0, 1, 0], [5.0, 0, 4, 0], [0, 6.0, 0, 3]]])
    assert trace_path(scores).tolist() == [[0, 2, 3]] or trace_path(scores).tolist() == [[0, 0, 1]]
    best = max(
        ((a, b, c) for a in range(4) for b in range(a, 4) for c in range(b, 4)),
        key=lambda path: sum(scores[0, token, frame].item() for token, frame in enumerate(path)),
    )
    assert trace_path(scores).tolist() == [list(best)]


def test_a_packed_model_is_the_model(listening_llm, tmp_path):
    model, processor = listening_llm()
    save_listening_llm(model, processor, tmp_path / "m", {})
    again, read = load_listening_llm(tmp_path / "m", "cpu", "float32")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float(), msg=name)
    assert again.config.to_dict()["window_seconds"] == 6.0
    assert read.prompt.marks == processor.prompt.marks
    assert again.listener.generation_config.eos_token_id == model.listener.generation_config.eos_token_id


def test_what_is_no_such_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded as a speech LLM") as error:
        load_listening_llm(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="search_seconds"):
        ListeningLLMConfig(search_seconds=20.0)
    with pytest.raises(ValueError, match="alternatives"):
        ListeningLLMConfig(beams=2, alternatives=2)
