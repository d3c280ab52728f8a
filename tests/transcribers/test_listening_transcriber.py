"""A recording through a tiny ListeningLLM of random weights: whatever it writes, nothing that was heard is missing."""

import numpy as np
import pytest

from unique_asr.models.listening_llm.modeling import save_listening_llm
from unique_asr.transcribers import make_transcriber
from unique_asr.transcribers.base import PipelineError
from unique_asr.transcribers.listening_llm import ListeningTranscriber


@pytest.fixture(scope="module")
def folder(listening_llm, tmp_path_factory):
    model, processor = listening_llm()
    path = tmp_path_factory.mktemp("models") / "listening"
    save_listening_llm(model, processor, path, {})
    return path


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(0, 0.1, 11 * 16000).astype(np.float32)


def test_a_folder_is_transcribed(folder, noise):
    transcriber = make_transcriber(folder, device="cpu", budget=64)
    assert isinstance(transcriber, ListeningTranscriber)
    stages = set()
    segments, info = transcriber.transcribe(noise, progress=lambda stage, done, total: stages.add(stage))
    words = [word for segment in segments for word in segment.words]
    assert words
    assert [word.start for word in words] == sorted(word.start for word in words)
    assert all(0 <= word.start <= word.end <= 11.0 for word in words)
    assert info.coverage == 1.0
    assert info.duration == pytest.approx(11.0)
    assert info.sparsity["steps"] > 0
    assert {"encode", "prefill", "decode"} <= stages
    assert {"load", "encode", "prefill", "decode"} <= set(info.timings)


def test_what_was_heard_can_be_written_again(folder, noise):
    transcriber = make_transcriber(folder, device="cpu")
    segments, _ = transcriber.transcribe(noise)
    expected = [segment.text for segment in segments]
    *_, heard = transcriber.listener.listen([noise])
    again, info = transcriber.transcribe_encoded(heard)
    assert [segment.text for segment in again] == expected
    assert info.stop_reason


def test_hotwords_are_read_and_a_prompt_is_refused(folder, noise):
    transcriber = make_transcriber(folder, device="cpu")
    segments, info = transcriber.transcribe(noise, hotwords="Bergson, Ivar")
    list(segments)
    assert info.settings["hotwords"] == "Bergson, Ivar"
    with pytest.raises(PipelineError, match="takes no prompt"):
        transcriber.transcribe(noise, prompt="lower case")


def test_an_empty_recording_is_one_line(folder):
    with pytest.raises(PipelineError, match="no samples"):
        list(make_transcriber(folder, device="cpu").transcribe(np.zeros(0, np.float32))[0])


def test_evaluation_scores_the_model_and_its_listener(folder, noise, tmp_path):
    import json

    import soundfile

    from unique_asr.evaluation.cli import main

    soundfile.write(tmp_path / "a.wav", noise, 16000)
    row = {"audio_filepath": "a.wav", "duration": 11.0, "source": "noise", "text": "it was a noise"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main(
            [f"data.manifest={tmp_path / 'm.jsonl'}", f"model.name_or_path={folder}", "listener=true", "device=cpu",
             "attention.budget=64", f"output.dir={output}"]
        )  # fmt: skip
    assert not exit_.value.code
    assert "listener" in "".join(path.read_text() for path in output.glob("*.md"))
