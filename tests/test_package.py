"""The package as a whole: quick to import, every configuration composes, the distributions hold what they need."""

import inspect
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import unique_asr
from unique_asr.application.overrides import conf_folder
from unique_asr.attention import SparseAttentionConfig
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

ROOT = Path(__file__).parents[1]
CONF = conf_folder()
PROGRAMS = sorted(path.stem for path in CONF.glob("*.yaml"))
GROUPS = sorted(path.parent.name + "=" + path.stem for path in CONF.glob("*/*.yaml"))


def test_importing_is_quick():
    """Neither torch nor transformers, which take seconds."""
    modules = "import sys, unique_asr, unique_asr.application.cli"
    code = f"{modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_names():
    assert callable(unique_asr.transcribe)
    assert callable(unique_asr.sparse_attention)
    assert unique_asr.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'transribe'"):
        _ = unique_asr.transribe


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compose(program):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(program)


@pytest.mark.parametrize("choice", [choice for choice in GROUPS if choice.startswith(("model", "decoding", "output"))])
def test_groups_compose(choice):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("transcribe", [choice])


def test_options_are_those_of_the_code():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        unique, dense = (compose("transcribe", [f"attention={name}"]) for name in ("unique", "dense"))
    assert OmegaConf.to_container(unique.attention) == asdict(SparseAttentionConfig())
    assert OmegaConf.to_container(dense.attention) == asdict(SparseAttentionConfig(budget=None))
    parameters = {
        *inspect.signature(SpeechLLMTranscriber).parameters,
        *inspect.signature(SpeechLLMTranscriber.transcribe).parameters,
    }
    assert set(unique.decoding) <= parameters


@pytest.mark.slow
def test_distributions(tmp_path):
    """Kernels, configuration and weights lie inside the wheel; the sdist has all it takes to build and test."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = listed.splitlines()
    for name in tracked:
        assert name in in_sdist
        if name.startswith(("kernels/", "conf/")):
            assert f"unique_asr/{name}" in in_wheel
        elif name.startswith("unique_asr/"):
            assert name in in_wheel
    assert not any(name.startswith(("tests/", "kernels/", "conf/", "scripts/")) for name in in_wheel)


def test_every_bundled_weight_file_is_small_enough():
    files = list((ROOT / "unique_asr" / "pretrained").rglob("*"))
    sizes = [file.stat().st_size for file in files if file.is_file()]
    assert all(size <= 48_000_000 for size in sizes)
    assert sum(sizes) <= 150_000_000


def test_python_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
