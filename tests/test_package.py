"""The package as a whole: quick to import, every configuration composes, the distributions hold what they need."""

import ast
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {  # of imports, where the names differ
    "PIL": "pillow", "faster_whisper": "faster-whisper", "flashinfer": "flashinfer-python", "hydra": "hydra-core",
    "silero_vad": "silero-vad",
}  # fmt: skip
IMPORTED_BY_TRANSFORMERS = {"librosa"}
GROUPS = sorted(path.parent.name + "=" + path.stem for path in CONF.glob("*/*.yaml"))


def test_importing_is_quick():
    """Neither torch nor transformers, which take seconds."""
    modules = "import sys, unique_asr, unique_asr.application.cli"
    code = f"{modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


COMMAND = """
import sys
from {module} import {function} as main
try:
    main()
except SystemExit as stop:
    slow = {{"gradio", "librosa", "numba", "torch", "transformers"}}
    print("exit code", stop.code, sorted(slow & sys.modules.keys()))
"""


@pytest.fixture(params=PROJECT["scripts"])
def command(request, tmp_path):
    """Runs one of the console commands; gives its standard output, with exit code and slow imports, and error."""
    module, function = PROJECT["scripts"][request.param].split(":")
    code = COMMAND.format(module=module, function=function)

    def run(*arguments):
        process = [sys.executable, "-c", code, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert list(tmp_path.iterdir()) == []
        return done.stdout, done.stderr

    return run


def test_commands_check_options_before_they_import_what_takes_seconds(command):
    out, err = command("nonsense=1")
    assert out == "exit code 2 []\n"
    assert err.startswith("error: Could not override 'nonsense'")
    assert err.count("\n") == 1


def test_commands_show_their_options_at_once(command):
    out, err = command("--help")
    assert "device: auto" in out
    assert out.endswith("exit code 0 []\n")
    assert err == ""


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unique-asr", ["audio=none.wav"], "error: none.wav: no such file\n"),
        ("unique-asr", ["audio=none.wav", "attention.page_size=7"], "error: attention.page_size is 7"),
        ("unique-asr-app", ["folders=[none]"], "error: folders: "),
        ("unique-asr-server", ["models=[]"], "error: models: "),
        ("unique-asr-generate", ["model=m", "prompt=Why?", "context=none.txt"], "error: context=none.txt"),
    ],
)
def test_what_is_not_there_is_said_at_once(name, arguments, message, tmp_path):
    module, function = PROJECT["scripts"][name].split(":")
    process = [sys.executable, "-c", COMMAND.format(module=module, function=function), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr.startswith(message)
    assert done.stdout in ("exit code 1 []\n", "exit code 2 []\n")


def test_scores_are_those_of_the_configuration():
    """It has their names, so that it needs no torch."""
    from unique_asr.attention import configuration, scores

    assert tuple(scores.SCORES) == configuration.SCORES


def test_public_names_of_attention():
    import unique_asr.attention

    assert all(getattr(unique_asr.attention, name) for name in unique_asr.attention.__all__)


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
    assert OmegaConf.to_container(unique.attention) == SparseAttentionConfig().to_dict()
    assert OmegaConf.to_container(dense.attention) == SparseAttentionConfig(budget=None).to_dict()
    parameters = {
        *inspect.signature(SpeechLLMTranscriber).parameters,
        *inspect.signature(SpeechLLMTranscriber.transcribe).parameters,
    }
    assert set(unique.decoding) <= parameters


def distributions(requirements):
    """Names of requirements such as `torch>=2.11,<2.16`."""
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def imported(path):
    """Distributions that a module imports: those it cannot be imported without, and all."""
    tree = ast.parse(path.read_text())
    in_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    required, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"unique_asr"}
        names = {DISTRIBUTIONS.get(package, package) for package in packages}
        found |= names
        required |= set() if id(node) in in_functions else names
    return required, found


def test_what_is_imported_is_declared():
    """And what is declared is imported. What an extra brings is imported inside of functions alone."""
    declared = distributions(PROJECT["dependencies"])
    extras = distributions(line for lines in PROJECT["optional-dependencies"].values() for line in lines)
    used = set()
    for folder in ("unique_asr", "app", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            required, found = imported(path)
            assert required <= declared, path
            assert found <= declared | extras, path
            used |= found
    assert declared - used == IMPORTED_BY_TRANSFORMERS


def test_tests_skip_nothing_that_the_dev_extra_lacks():
    """Packages of pytest.importorskip; data sets of the hub and Ray are the exceptions, which are large."""
    declared = distributions([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    for path in (ROOT / "tests").rglob("test_*.py"):
        packages = {name.partition(".")[0] for name in re.findall(r'importorskip\("([\w.]+)"', path.read_text())}
        assert {DISTRIBUTIONS.get(package, package) for package in packages} <= declared | {"datasets", "ray"}, path


def test_torch_and_torchaudio_of_the_container_are_those_of_the_package():
    pinned = re.findall(r'"(torch(?:audio)?>=[^"]+)"', (ROOT / "Dockerfile").read_text())
    assert pinned == [line for line in PROJECT["dependencies"] if line.startswith("torch")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_distributions(built):
    """Kernels, page, configuration and weights lie inside the wheel; the sdist has all it takes to build and test."""
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    left_out = re.compile(r"unique_asr/benchmark/|conf/benchmark\.yaml|app/.*\.png")  # the benchmark needs a checkout
    for name in listed.splitlines():
        assert name in in_sdist
        inside = name if name.startswith("unique_asr/") else f"unique_asr/{name}"
        shipped = name.startswith(("unique_asr/", "kernels/", "conf/", "app/")) and not left_out.match(name)
        assert (inside in in_wheel) == shipped, name
    others = {name for name in in_wheel if not name.startswith("unique_asr/")}
    assert all(".dist-info/" in name for name in others)


@pytest.mark.slow
def test_the_wheel_transcribes_outside_of_the_checkout(built, tmp_path):
    """In a virtual environment of its own, which sees the packages of this one, but not the checkout."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv" / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", built[0]], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after what has been installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    clip = ROOT / "tests" / "data" / "nomads.opus"
    run(programs / "unique-asr", f"audio={clip}", "output.dir=.", "output.format=txt")
    assert len((tmp_path / "nomads.txt").read_text().split()) > 10
    code = "from unique_asr.app import page; from unique_asr.kernels import paging as kernel; "
    code += "print(page.__file__, kernel.__file__)"
    assert all(place.startswith(str(tmp_path)) for place in run(programs / "python", "-c", code).split())
    for name in PROJECT["scripts"]:
        assert "device: auto" in run(programs / name, "--help")


def test_every_bundled_weight_file_is_small_enough():
    files = list((ROOT / "unique_asr" / "pretrained").rglob("*"))
    sizes = [file.stat().st_size for file in files if file.is_file()]
    assert all(size <= 48_000_000 for size in sizes)
    assert sum(sizes) <= 150_000_000


def test_python_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
