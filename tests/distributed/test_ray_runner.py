"""Archives with Ray: options, the summary, and a cluster of two workers of which one is killed in the middle."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import DATA, ROOT, FakeTranscriber, names
from omegaconf import OmegaConf

from unique_asr.application.display import ConsoleDisplay
from unique_asr.application.jobs import OutputError, find_recordings, plan
from unique_asr.distributed import cli
from unique_asr.distributed.ledger import RecordingLog
from unique_asr.distributed.ray_runner import choose_resources, collect, mark_shared_folder
from unique_asr.transcript import TranscriptionInfo
from unique_asr.writers import read_transcript

RAY_IS_ABSENT = 'runner=ray: needs the package ray (pip install "ray[data]"); runner=local goes without'


def options(device="auto", **changes):
    return OmegaConf.create({"device": device, "ray": {"workers": None, "gpus": None, "cpus": 1, **changes}})


def cluster(*machines):
    nodes = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in machines]
    return SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])


@pytest.mark.parametrize(
    ("machines", "changes", "resources"),
    [
        ([(8, 0)], {}, (8, 0, 1)),
        ([(8, 0)], {"cpus": 3}, (2, 0, 3)),
        ([(8, 2), (8, 4), (4, 0)], {}, (6, 1, 1)),
        ([(8, 2), (2, 1)], {"gpus": 0.25}, (10, 0.25, 1)),
        ([(8, 2)], {"device": "cpu"}, (8, 0, 1)),
        ([(8, 2)], {"workers": 1}, (1, 1, 1)),
        ([(1, 0)], {"workers": 4, "gpus": 1}, (4, 1, 1)),  # a cluster that grows
    ],
)
def test_workers_that_a_cluster_has_room_for(machines, changes, resources):
    chosen = choose_resources(cluster(*machines), options(**changes))
    assert (chosen["workers"], chosen["gpus"], chosen["cpus"]) == resources


def test_no_room_for_a_worker():
    with pytest.raises(ValueError, match=r"ray.gpus=1 ray.cpus=4: no machine of the cluster has as many; give less"):
        choose_resources(cluster((8, 0), (2, 1)), options(gpus=1, cpus=4))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("ray.workers=0", "ray.workers=0: give a number, 1 or more"),
        ("ray.workers=1.5", "ray.workers=1.5: give a number, 1 or more"),
        ("ray.gpus=-1", "ray.gpus=-1: give a number, 0 or more"),
        ("ray.gpus=1.5", "ray.gpus=1.5: give a share of one GPU, or a whole number"),
        ("ray.cpus=null", "ray.cpus=None: give a number, 0 or more"),
        ("runner=spark", "runner=spark: choose from local, ray"),
        ("audio=-", "audio=-: the workers cannot read standard input; save it to a file, or use runner=local"),
    ],
)
def test_options_that_do_not_fit(talk, capsys, option, message):
    given = {"audio": "talk.opus", "runner": "ray", **dict([option.split("=")])}
    with pytest.raises(SystemExit) as stop:
        cli.main([f"{name}={value}" for name, value in given.items()])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert names() == ["talk.opus"]


def test_without_ray(talk, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["audio=talk.opus", "runner=ray"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {RAY_IS_ABSENT}\n"


def test_results_are_shown_and_counted(talk, capsys):
    for name in "abcd":
        shutil.copy(talk, f"{name}.opus")
    jobs = plan(find_recordings("[abcd].opus"))
    done = RecordingLog([("summary", (TranscriptionInfo("a.opus", duration=7200.0), 60.0, [Path("/x/a.txt")]))], 7200.0)
    kept = RecordingLog([("kept", ("b.opus", [Path("/x/b.txt")]))])
    failed = RecordingLog([("error", ("c.opus: no", "c.opus"))], failed=True)
    rows = ({"number": n, "log": pickle.dumps(log), "fatal": ""} for n, log in enumerate((done, kept, failed)))
    outcome = collect(rows, jobs, ConsoleDisplay())
    out, err = capsys.readouterr()
    assert (outcome.durations, outcome.failed) == ([7200.0], 2)
    assert out.startswith("a.opus: 2:00:00.0 of audio in 01:00.0, RTFx 120.0")
    assert out.endswith("; a.txt\n")
    assert "keeping b.txt" in err
    assert "error: c.opus: no" in err
    assert "error: d.opus: its worker died 3 times" in err
    assert re.search(
        r"recordings: 1 transcribed, 1 kept, 2 failed; 2.00 h of audio in 00:00.\d, \S+ h a second\n$", err
    )


def test_what_makes_all_fail_is_said_once(talk, capsys):
    shutil.copy(talk, "a.opus")
    jobs = plan(find_recordings("."))
    rows = ({"number": n, "log": pickle.dumps(None), "fatal": "model=none: no such folder"} for n in range(2))
    assert collect(rows, jobs, ConsoleDisplay()).failed == 2
    assert capsys.readouterr().err.count("model=none: no such folder") == 1


def test_the_folder_of_transcripts_is_marked(talk):
    with mark_shared_folder(plan(find_recordings("."))) as marker:
        assert marker is None  # what lies beside a recording is where it is
    with mark_shared_folder(plan(find_recordings("."), "out")) as marker:
        assert marker.parent == talk.parent / "out"
        assert marker.exists()
    assert names("out") == []
    with (
        pytest.raises(OutputError, match=r"cannot be made .*; output.dir=FOLDER writes elsewhere"),
        mark_shared_folder(plan(find_recordings("."), "talk.opus/out")),
    ):
        pass


class Mortal(FakeTranscriber):
    """Takes its time, and notes on disk what it does; its process is killed at some recordings, once or always."""

    def transcribe(self, audio, **options):
        segments, info = super().transcribe(audio, **options)
        name = Path(audio.name).name

        def live():
            for segment in segments:
                time.sleep(0.05)
                if segment.id == 2 and (name == "always.opus" or (name == "once.opus" and not note("killed", name))):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield segment
            note("done", name, str(os.getpid()))

        note("begun", name)
        return live(), info


def note(*words):
    """Append a line to the log; return whether it was there before."""
    line = " ".join(words) + "\n"
    path = Path("log")
    before = path.exists() and line in path.read_text()
    with path.open("a") as file:
        file.write(line)
    return before


def load(**settings):
    return Mortal(**settings)


COMMAND = """
import sys
from test_ray_runner import cli, load
cli.main(sys.argv[1:], load)
"""


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Starts the command on a folder of recordings, with two workers."""
    pytest.importorskip("ray", reason='pip install "ray[data]": the tests of the cluster need it')
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d", "once"):
        shutil.copy(DATA / "nomads.opus", f"{name}.opus")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)

    def start(*arguments):
        command = [sys.executable, "-c", COMMAND, "runner=ray", "ray.workers=2", "ray.cpus=0.5", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def noted(kind):
    """Names of recordings, as often as they were."""
    return sorted(line.split()[1] for line in Path("log").read_text().splitlines() if line.startswith(kind))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_worker_is_killed_in_the_middle(archive, batch):
    """Nothing is lost, and nothing done twice but for the half of a recording that its worker died at."""
    Path("bad.mp3").touch()
    code, out, err = finish(archive("audio=.", "output.format=[txt,json]", f"batch={batch}"))
    assert code == 1, err
    names_done = [f"{name}.opus" for name in ("a", "b", "c", "d", "once")]
    assert noted("done") == names_done
    assert noted("begun") == sorted([*names_done, "once.opus"])
    assert len({line.split()[2] for line in Path("log").read_text().splitlines() if line.startswith("done")}) >= 2
    texts = {Path(name).with_suffix(".txt").read_text() for name in names_done}
    assert len(texts) == 1
    assert all(len(read_transcript(Path(name).with_suffix(".json")).segments) == 4 for name in names_done)
    assert not [name for name in names() if "partial" in name or name.startswith(".")]
    assert sorted(re.findall(r"^(\S+): 00:09.1 of audio in", out, re.MULTILINE)) == names_done
    assert len(out.splitlines()) == 5
    assert "error: bad.mp3: the file is empty\n" in err
    assert "recordings: 5 transcribed, 0 kept, 1 failed; 0.0126 h of audio in " in err
    assert len(err.splitlines()) == 2, err  # and nothing of Ray's own

    code, out, err = finish(archive("audio=[a.opus,b.opus,c.opus,d.opus,once.opus]", "output.format=[txt,json]"))
    assert (code, out) == (0, "")
    assert "recordings: 0 transcribed, 5 kept, 0 failed" in err
    assert noted("done") == names_done


@pytest.mark.slow
def test_a_recording_that_kills_every_worker(archive):
    shutil.copy("a.opus", "always.opus")
    code, out, err = finish(archive("audio=.", "output.dir=out", "output.format=txt", "jsonl=true"))
    assert code == 1, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["audio"] for event in events if event["event"] == "error"] == ["always.opus"]
    assert sorted(event["audio"] for event in events if event["event"] == "done") == noted("done")
    assert [name for name in names("out") if "partial" not in name] == ["a.txt", "b.txt", "c.txt", "d.txt", "once.txt"]
    assert noted("begun").count("always.opus") == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_all(archive, number):
    process = archive("audio=.", "output.format=txt")
    while not Path("log").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_cluster_that_does_not_answer(archive):
    code, _, err = finish(archive("audio=.", "ray.address=127.0.0.1:1"))
    assert code == 2
    assert err.startswith("error: ray.address=127.0.0.1:1: no Ray cluster answers (")
    assert err.count("\n") == 1
