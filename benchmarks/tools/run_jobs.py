"""Run jobs side by side on some GPUs, the first of the list first; what is done is not done again.

    python benchmarks/tools/long_form_jobs.py eval.jsonl | python benchmarks/tools/run_jobs.py \\
        --gpus 0,1,2,3 --output outputs/jobs

A job is a line of JSON on standard input: `name`, `command` (a list), and, if need be, `after` (names of jobs that have
to be done before) and `gigabytes` (of GPU memory that it may take). It sees one GPU; OUTPUT/NAME.log is what it prints.
One that fails stops those that need it and no other. Ctrl-C or SIGTERM ends all; a second call goes on, as OUTPUT/done
names what was done. Exit code 0 if every job is done.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2  # seconds


@dataclass(frozen=True)
class Job:
    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    gigabytes: float = 10.0


@dataclass
class Running:
    process: subprocess.Popen
    gpu: str
    began: float


class Schedule:
    """Which jobs wait, run, are done, and cannot be done."""

    def __init__(self, jobs: list[Job], gpus: list[str], room: float, output: Path) -> None:
        names = {job.name for job in jobs}
        for job in jobs:
            if unknown := set(job.after) - names:
                raise ValueError(f"{job.name} comes after {', '.join(sorted(unknown))}, which is no job")
        self.gpus, self.room, self.output = gpus, room, output
        self.marks = output / "done"
        self.marks.mkdir(parents=True, exist_ok=True)
        self.done = {job.name for job in jobs if (self.marks / job.name).exists()}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: dict[Job, Running] = {}
        self.failed: set[str] = set()

    def step(self) -> bool:
        """Take note of what ended, and start what can be; whether anything is left to do."""
        for job, (code, run) in {job: (run.process.poll(), run) for job, run in self.running.items()}.items():
            if code is None:
                continue
            del self.running[job]
            (self.failed if code else self.done).add(job.name)
            if not code:
                (self.marks / job.name).touch()
            say(f"{'FAILED' if code else 'done'} {job.name}, {time.monotonic() - run.began:.0f} s")
        for job in list(self.waiting):
            if self.failed.intersection(job.after):
                self.waiting.remove(job)
                self.failed.add(job.name)
                say(f"left out {job.name}")
            elif self.done.issuperset(job.after) and (gpu := self.place(job)) is not None:
                self.waiting.remove(job)
                self.start(job, gpu)
        return bool(self.waiting or self.running)

    def place(self, job: Job) -> str | None:
        """The emptiest GPU, if the job fits it: a job larger than the room fits an empty one."""
        taken = dict.fromkeys(self.gpus, 0.0)
        for other, run in self.running.items():
            taken[run.gpu] += other.gigabytes
        gpu = min(taken, key=taken.get)
        return gpu if not taken[gpu] or taken[gpu] + job.gigabytes <= self.room else None

    def start(self, job: Job, gpu: str) -> None:
        try:
            with open(self.output / f"{job.name}.log", "a") as log:
                process = subprocess.Popen(
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
                )  # fmt: skip
        except (OSError, ValueError, IndexError) as error:
            self.failed.add(job.name)
            say(f"FAILED {job.name}, cannot be started: {error}")
            return
        self.running[job] = Running(process, gpu, time.monotonic())
        say(f"started {job.name} on GPU {gpu}")

    def stop(self) -> None:
        for run in self.running.values():
            if run.process.poll() is None:
                os.killpg(run.process.pid, signal.SIGTERM)


def read_job(line: str) -> Job:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f"{line.strip()} is no job")
    if "/" in str(fields.get("name")):
        raise ValueError(f"name {fields['name']!r}: it names a file, so leave out the /")
    return Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="0", help="as CUDA_VISIBLE_DEVICES names them")
    parser.add_argument("--gigabytes", type=float, default=72.0, help="of a GPU, for all of its jobs together")
    parser.add_argument("--output", type=Path, default=Path("outputs/jobs"))
    arguments = parser.parse_args()
    try:
        jobs = [read_job(line) for line in sys.stdin if line.strip()]
        schedule = Schedule(jobs, arguments.gpus.split(","), arguments.gigabytes, arguments.output)
    except (ValueError, TypeError) as error:
        parser.error(f"jobs on standard input: {error}")

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        while schedule.step():
            time.sleep(POLL)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    finally:
        schedule.stop()
    say(f"{len(schedule.done)} done, {len(schedule.failed)} not")
    sys.exit(bool(schedule.failed))


if __name__ == "__main__":
    main()
