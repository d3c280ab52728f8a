"""Jobs side by side: order, room, failures, going on after a stop; and that the published lists are jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, str(ROOT / "benchmarks" / "tools" / "run_jobs.py")]


def note(folder, text):
    """A command that appends a line to a file of its folder."""
    return [sys.executable, "-c", f"open({str(folder / 'notes')!r}, 'a').write({text!r} + '\\n')"]


def run(folder, jobs, *options):
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    command = [*RUN, "--output", str(folder / "jobs"), *options]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60)


def notes(folder):
    return (folder / "notes").read_text().split()


def test_jobs_wait_for_what_they_need_and_are_done_once(tmp_path):
    jobs = [
        {"name": "late", "command": note(tmp_path, "late"), "after": ["early", "middle"]},
        {"name": "middle", "command": note(tmp_path, "middle"), "after": ["early"]},
        {"name": "early", "command": note(tmp_path, "early")},
    ]
    assert run(tmp_path, jobs).returncode == 0
    assert notes(tmp_path) == ["early", "middle", "late"]
    assert run(tmp_path, jobs).returncode == 0
    assert notes(tmp_path) == ["early", "middle", "late"]


def test_a_failure_leaves_out_what_needs_it_alone(tmp_path):
    jobs = [
        {"name": "bad", "command": [sys.executable, "-c", "print('why'); raise SystemExit(3)"]},
        {"name": "needs", "command": note(tmp_path, "needs"), "after": ["bad"]},
        {"name": "other", "command": note(tmp_path, "other")},
    ]
    result = run(tmp_path, jobs)
    assert result.returncode == 1
    assert "FAILED bad" in result.stdout
    assert "left out needs" in result.stdout
    assert notes(tmp_path) == ["other"]
    assert "why" in (tmp_path / "jobs" / "bad.log").read_text()


def test_a_command_that_does_not_start_is_a_failure(tmp_path):
    jobs = [
        {"name": "bad", "command": [str(tmp_path / "missing")]},
        {"name": "needs", "command": note(tmp_path, "needs"), "after": ["bad"]},
        {"name": "other", "command": note(tmp_path, "other")},
    ]
    result = run(tmp_path, jobs)
    assert (result.returncode, result.stderr) == (1, "")
    assert "FAILED bad, cannot be started: " in result.stdout
    assert "left out needs" in result.stdout
    assert notes(tmp_path) == ["other"]


def test_room_of_a_gpu(tmp_path):
    """Two jobs of 40 GB share no GPU of 72; on two GPUs they run together."""
    script = (
        f"import os, time; note = lambda text: open({str(tmp_path / 'notes')!r}, 'a').write(text + '\\n'); "
        "note('+' + os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1); note('-')"
    )
    jobs = [{"name": name, "command": [sys.executable, "-c", script], "gigabytes": 40} for name in "ab"]
    assert run(tmp_path, jobs, "--gpus", "3").returncode == 0
    assert notes(tmp_path) == ["+3", "-", "+3", "-"]
    (tmp_path / "notes").unlink()
    jobs = [job | {"name": job["name"] * 2} for job in jobs]
    assert run(tmp_path, jobs, "--gpus", "0,1").returncode == 0
    assert sorted(notes(tmp_path)[:2]) == ["+0", "+1"]


def test_a_stop_ends_all_and_a_second_call_goes_on(tmp_path):
    wait = [sys.executable, "-c", "import time; time.sleep(100)"]
    jobs = [
        {"name": "first", "command": note(tmp_path, "first")},
        {"name": "long", "command": wait, "after": ["first"]},
    ]
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    process = subprocess.Popen(
        [*RUN, "--output", str(tmp_path / "jobs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdin.write(lines)
    process.stdin.close()
    while "started long" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    jobs[1]["command"] = note(tmp_path, "long")
    assert run(tmp_path, jobs).returncode == 0
    assert notes(tmp_path) == ["first", "long"]


@pytest.mark.parametrize(
    ("line", "named"), [({"name": "a", "command": [], "after": ["b"]}, "b"), ({"nam": "a"}, "nam"), (3, "3")]
)
def test_a_bad_job_is_named(tmp_path, line, named):
    result = run(tmp_path, [line])
    assert result.returncode == 2
    assert "jobs on standard input" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("long_form_jobs.py", ["eval.jsonl"]),
        ("text_jobs.py", ["model", "text.txt"]),
        (
            "sparsity_jobs.py",
            ["--train", "t", "--eval", "e", "--listener", "w", "--texts", "text.txt", "--language-model", "m"],
        ),
    ],
)
def test_the_published_lists_are_jobs(tmp_path, script, arguments):
    (tmp_path / "text.txt").write_text("A line.\n" * 20)
    command = [sys.executable, str(ROOT / "benchmarks" / "tools" / script), *arguments]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ).stdout
    jobs = [json.loads(line) for line in lines.splitlines()]
    names = [job["name"] for job in jobs]
    assert len(jobs) > 20
    assert len(set(names)) == len(names)
    seen = set()
    for job in jobs:
        assert seen.issuperset(job.get("after", [])), job["name"]
        assert (ROOT / job["command"][1]).is_file()
        seen.add(job["name"])
