"""The command behind scripts/finetune.py: what it says and how it ends."""

import subprocess
import sys

import pytest
from training_cases import ROOT, SEGMENTS

from unique_asr.training.cli import main


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs it in an empty folder; gives its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        return exit_.value.code, *capsys.readouterr()

    return run


def test_options_are_checked_before_anything_heavy_is_imported(tmp_path):
    program = (
        "import sys\nfrom unique_asr.training.cli import main\n"
        "try:\n    main(['nonsense=1'])\n"
        "finally:\n    print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: Could not override 'nonsense' (--help shows every option)\n"
    assert done.stdout == "[]\n"


def test_help_shows_the_options(command):
    code, out, _ = command("--help")
    assert not code
    assert out.startswith("Trains a speech LLM, or a language model on texts: unique-asr-finetune ")
    assert out.splitlines()[1] == "(in a checkout: python scripts/finetune.py)"
    assert "stages: []" in out


def test_what_is_wrong_is_one_line(command, tmp_path):
    for arguments, message in {
        (): "nothing to start from: give init.model, ",
        ("stages=[{name: a}]",): "stages: StageConfig.__init__() missing 2 required positional arguments",
        (f"init.model={tmp_path}/none (x)",): f"init.model={tmp_path}/none (x): ",
        ("init.model=none", "output.changes_only=true"): "output.changes_only needs packed weights to change, and ",
    }.items():
        code, _, errors = command("device=cpu", *arguments)
        assert code == 1
        assert errors.splitlines()[-1].startswith(f"error: {message}")


def test_it_trains(command, speech_llm, write_manifest, tmp_path):
    """With a folder whose name Hydra would not take as it is."""
    model, processor = speech_llm()
    start = tmp_path / "start (1), new"
    model.save_pretrained(start)
    processor.save_pretrained(start)
    stage = "{name: hear, steps: 1, windows: 2, seconds: [2, 3], train: {projector: 1e-3}}"
    code, out, errors = command(
        f"init.model={start}", f"data.manifests=[{write_manifest(SEGMENTS)}]", f"stages=[{stage}]", "device=cpu",
        "output.dir=out",
    )  # fmt: skip
    assert code == 0
    assert "error" not in errors
    assert "hear 1/1" in out
    assert (tmp_path / "out" / "hear" / "config.json").is_file()
