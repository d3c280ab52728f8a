"""Two processes on a CPU, as launchers start them; a minute.

python -m pytest tests/training/test_processes.py -m slow
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from training_cases import LONG, ROOT

from unique_asr.models import load

pytestmark = pytest.mark.slow
STAGE = (
    "{name: adapt, steps: 3, seconds: [6, 8], windows: 2, train: {language_model: 1e-3}, ctc_weight: 0, "
    "llm_weight: 1, attention: {mode: soft, budget: 40}}"
)


@pytest.fixture
def start(tmp_path):
    """Trains a model in two processes; gives what they printed."""

    def run(model, processor, manifest, folder, *options):
        model.save_pretrained(tmp_path / "start")
        processor.save_pretrained(tmp_path / "start")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *(str(ROOT / "scripts" / "finetune.py"), f"init.model={tmp_path}/start", f"data.manifests=[{manifest}]"),
            *(f"stages=[{STAGE}]", "device=cpu", "log_every=1", f"output.dir={tmp_path}/{folder}", *options),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_processes_step_together_and_resume(speech_llm, write_manifest, tmp_path, start):
    given = *speech_llm(), write_manifest(LONG, seconds=8.0), "whole"
    printed = start(*given, "output.save_minutes=0")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert printed.count("adapt 3/3") == 1
    checkpoint = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=False)
    corpora = [state["material"]["corpus"]["state"] for state in checkpoint["random"]]
    assert len(corpora) == 2
    assert corpora[0] != corpora[1]
    assert "resumed at step 0 of the end" in start(*given, "resume=true")
    trained, _ = load(tmp_path / "whole" / "adapt", device="cpu")
    assert trained.config.sparse_attention["budget"] == 40


def test_processes_share_the_listening(listener, manifest, tmp_path, start):
    """Two recordings, one for each process; both learn from both."""
    model, processor = listener
    printed = start(model, processor, manifest, "heard")
    assert "h in 2 recordings" in printed
    assert len(torch.load(tmp_path / "heard" / "heard.pt")["sources"]["news"]) == 2
