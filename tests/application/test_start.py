"""Programs show life before they import what takes seconds, and their summary counts these seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "nomads.opus"
# In the place of PyTorch: it says that it is imported, and ends the process.
TORCH = "import os\nos.write(2, b'torch is imported\\n')\nos._exit(9)\n"
PROGRAMS = {
    "scripts/transcribe.py": ([f"audio={SAMPLE}", "output.dir=out"], "Loading default ..."),
    "scripts/finetune.py": (["init.model=default"], "Loading PyTorch and transformers ..."),
    "scripts/evaluate.py": (["data.manifest=none.jsonl"], "Loading PyTorch and transformers ..."),
    "scripts/generate.py": (["model=none", "prompt=Why?"], "Loading none ..."),
    "-m unique_asr.app": (["jobs=jobs", "port=null"], "Starting the page ..."),
    "-m unique_asr.server": (["port=0"], "Starting the server ..."),
}


@pytest.fixture
def start(tmp_path):
    """Runs a program in an empty folder, with a stand-in for PyTorch; gives exit code and lines."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)

    def run(program, *arguments):
        module = program.removeprefix("-m ")
        path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, *(["-m", module] if module != program else [ROOT / program]), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines()

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_shows_life_before_it_imports_torch(program, start):
    arguments, sign = PROGRAMS[program]
    code, lines = start(program, *arguments)
    assert lines[0] == sign
    assert (code, lines[-1]) == (9, "torch is imported")


def test_other_processes_of_a_training_keep_quiet(start, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert start("scripts/finetune.py", "init.model=default") == (9, ["torch is imported"])


def test_the_page_needs_no_torch_until_it_is_there(tmp_path):
    program = (
        "import sys\nfrom unique_asr.app import page, store, worker, limits\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_summary_counts_imports(tmp_path):
    """Of a process, whose imports are a second or more; what `main` does for another program counts from its call."""
    program = (
        "import sys, time\nsys.path.insert(0, 'tests')\nimport unique_asr\ntime.sleep(2)\n"
        "from command_line import FakeTranscriber\nfrom unique_asr.application.cli import main\n"
        f"options = ['audio={SAMPLE}', 'output.dir={tmp_path}', 'output.overwrite=true']\n"
        "sys.argv = ['transcribe.py', *options]\n"
        "for arguments in (None, options):\n"
        "    try:\n        main(arguments, FakeTranscriber)\n    except SystemExit:\n        pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = [float(found) for found in re.findall(r"of audio in 00:(\d\d\.\d)", done.stdout)]
    assert len(seconds) == 2, done.stdout + done.stderr
    assert seconds[0] >= 2 > seconds[1]
