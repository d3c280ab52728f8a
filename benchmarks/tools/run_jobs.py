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

POLL = 0.2  # s between two looks at the jobs


@dataclass(frozen=True)
class CommandJob:
    """A line of standard input."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()  # names of jobs that have to be done before
    gigabytes: float = 10.0  # of GPU memory


@dataclass
class RunningJob:
    """A process, its GPU as CUDA_VISIBLE_DEVICES names it, and when it began (`time.monotonic`)."""

    process: subprocess.Popen
    gpu: str
    began: float


class JobSchedule:
    """Which jobs wait, run, are done, and cannot be done.

    Args:
        jobs: the most important first.
        gpus: as CUDA_VISIBLE_DEVICES names them.
        room: gigabytes of a GPU for all of its jobs together.
        output: folder of the logs, and of a file for each job that is done.

    Raises:
        ValueError: a job comes after one that does not exist.
    """

    def __init__(self, jobs: list[CommandJob], gpus: list[str], room: float, output: Path) -> None:
        names = {job.name for job in jobs}
        for job in jobs:
            if unknown := set(job.after) - names:
                raise ValueError(f"{job.name} comes after {', '.join(sorted(unknown))}, which is no job")
        self.gpus, self.room, self.output = gpus, room, output
        self.marks = output / "done"
        self.marks.mkdir(parents=True, exist_ok=True)
        self.done = {job.name for job in jobs if (self.marks / job.name).exists()}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: dict[CommandJob, RunningJob] = {}
        self.failed: set[str] = set()

    def step(self) -> bool:
        """Note what ended and start what can be started; returns whether anything is left to do."""
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
            elif self.done.issuperset(job.after) and (gpu := self.choose_gpu(job)) is not None:
                self.waiting.remove(job)
                self.start(job, gpu)
        return bool(self.waiting or self.running)

    def choose_gpu(self, job: CommandJob) -> str | None:
        """Choose the emptiest GPU; None if the job does not fit there. A job larger than the room fits an empty one."""
        taken = dict.fromkeys(self.gpus, 0.0)
        for other, run in self.running.items():
            taken[run.gpu] += other.gigabytes
        gpu = min(taken, key=taken.get)
        return gpu if not taken[gpu] or taken[gpu] + job.gigabytes <= self.room else None

    def start(self, job: CommandJob, gpu: str) -> None:
        """Start a job; one whose command does not exist has failed."""
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
        self.running[job] = RunningJob(process, gpu, time.monotonic())
        say(f"started {job.name} on GPU {gpu}")

    def stop(self) -> None:
        """End all jobs that run."""
        for run in self.running.values():
            if run.process.poll() is None:
                os.killpg(run.process.pid, signal.SIGTERM)


def read_job(line: str) -> CommandJob:
    """Read a line of JSON. Raises ValueError or TypeError if it is no job."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f"{line.strip()} is no job")
    if "/" in str(fields.get("name")):
        raise ValueError(f"name {fields['name']!r}: it names a file, so leave out the /")
    return CommandJob(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="0", help="as CUDA_VISIBLE_DEVICES names them")
    parser.add_argument("--gigabytes", type=float, default=72.0, help="of a GPU, for all of its jobs together")
    parser.add_argument("--output", type=Path, default=Path("outputs/jobs"))
    arguments = parser.parse_args()
    try:
        jobs = [read_job(line) for line in sys.stdin if line.strip()]
        schedule = JobSchedule(jobs, arguments.gpus.split(","), arguments.gigabytes, arguments.output)
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
