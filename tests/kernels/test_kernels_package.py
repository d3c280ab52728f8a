"""The folder `kernels/` beside Hugging Face's package of that name, which transformers imports where it is."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FAKE_PACKAGE = '''
class Anything:
    """Stands for every class and function that transformers takes from this package."""
    def __init__(self, *args, **kwargs): ...
    def __call__(self, target): return target

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
'''

PROGRAM = """
import kernels, unique_asr.kernels
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
print(kernels.__file__, is_kernels_available(), *unique_asr.kernels.__path__, sep="\\n")
"""


def test_transformers_gets_its_own_kernels_from_the_repository_root(tmp_path):
    package, metadata = tmp_path / "kernels", tmp_path / "kernels-0.18.5.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(FAKE_PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    theirs, available, *ours = run.stdout.splitlines()
    assert Path(theirs).parent == package
    assert available == "True"
    assert str(ROOT / "kernels") in ours


def test_the_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
