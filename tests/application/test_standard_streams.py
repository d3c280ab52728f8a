"""Standard streams: whoever reads the output may leave, and the job goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, names

FAKE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from command_line import FakeTranscriber
from unique_asr.application import cli
cli.main(sys.argv[1:], lambda **settings: FakeTranscriber(**settings))
"""
DONE = ["talk.json", "talk.opus", "talk.srt", "talk.txt"]


def shell(line, program=None):
    """Run a line of bash, in which UNIQUE is the program; give its exit codes and standard error."""
    script = FAKE.format(root=str(ROOT), tests=str(Path(__file__).parents[1]))
    script = Path("program.py").write_text(program or script) and "program.py"
    line = line.replace("UNIQUE", f"{sys.executable} {script}") + '; echo "${PIPESTATUS[@]}" >codes'
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    codes = [int(code) for code in Path("codes").read_text().split()]
    for name in ("codes", "program.py"):
        Path(name).unlink()
    return codes, done.stderr


@pytest.mark.parametrize("reader", ["| true", "| head -1 >first", "2>&1 | true"])
@pytest.mark.parametrize("option", ["", "jsonl=true"])
def test_a_closed_pipe_ends_nothing(talk, reader, option):
    codes, err = shell(f"UNIQUE audio=talk.opus {option} {reader}")
    Path("first").unlink(missing_ok=True)
    assert codes == [0, 0]
    assert err in ("", "Loading default ...\n")
    assert names() == DONE


def test_help_into_a_closed_pipe(talk):
    for program in ("transcribe", "finetune", "evaluate", "generate"):
        codes, err = shell("UNIQUE --help | true", (ROOT / "scripts" / f"{program}.py").read_text())
        assert (codes, err) == ([0, 0], "")


def test_closed_streams(talk):
    codes, _ = shell("UNIQUE audio=talk.opus <&- >&- 2>&-")
    assert codes == [0]
    assert names() == DONE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_loses_no_file(talk):
    codes, err = shell("UNIQUE audio=talk.opus >/dev/full")
    assert codes == [1]
    assert err.endswith("error: standard output: cannot be written (No space left on device)\n")
    assert names() == DONE


def test_a_console_that_lacks_a_letter(talk):
    codes, _ = shell("PYTHONIOENCODING=ascii UNIQUE audio=talk.opus >shown")
    assert codes == [0]
    assert "[red]\\xe9[/red]" in Path("shown").read_text()
