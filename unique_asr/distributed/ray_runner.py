"""`runner=ray`: Ray Data gives recordings to workers, starts dead ones again, and says how each recording ended.

Files of transcripts are written by the workers, with the session of the command line: what is there already is kept, so
that a recording that is given out again, after its worker died, is neither lost nor done twice. A ledger, which is an
actor, outlives the workers.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig

from unique_asr.application.cli import read_batch, read_limits
from unique_asr.application.display import ConsoleDisplay, format_time
from unique_asr.application.jobs import STDIN, Job, OutputError
from unique_asr.application.session import Outcome, Output, TranscriptionSettings
from unique_asr.distributed.ledger import Ledger, RecordingLog
from unique_asr.distributed.worker import ArchiveWorker, give_up
from unique_asr.remote import is_uri

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber

MAX_BLOCKS = 10_000  # what Ray Data plans; more recordings share blocks
ANSWER_SECONDS = 10.0  # that a cluster may take to answer
NOTE_SECONDS = 60.0  # between two lines about the progress, where there is no bar
BAR = "Recordings"  # what it counts


def transcribe_with_ray(
    config: DictConfig,
    jobs: Sequence[Job],
    settings: TranscriptionSettings,
    output: Output,
    display: ConsoleDisplay,
    load: Callable[..., Transcriber],
) -> Outcome:
    """Transcribe jobs on a Ray cluster; a recording that fails does not stop the others.

    Args:
        config: with the options `ray.*`, `fetch.*`, `batch` and `debug`.
        display: is told how each recording ended, in the order in which they end.
        load: makes the transcriber of each worker; has to be picklable.

    Raises:
        ValueError: if Ray is not installed or answered by no cluster, or an option does not fit.
    """
    batch, limits = read_batch(config), read_limits(config)
    jobs = list(jobs)
    if any(job.audio == STDIN for job in jobs):
        raise ValueError("audio=-: the workers cannot read standard input; save it to a file, or use runner=local")
    check_options(config)
    with ExitStack() as stack:
        marker = stack.enter_context(mark_shared_folder(jobs))
        ray = stack.enter_context(connect(config))
        resources = choose_resources(ray, config)
        worker = (settings, output, load, batch, limits, Path.cwd(), marker, config.debug)
        rows = stack.enter_context(closing(run_workers(ray, jobs, batch, worker, resources, config.debug)))
        return collect(rows, jobs, display)


def collect(rows: Iterator[dict[str, Any]], jobs: Sequence[Job], display: ConsoleDisplay) -> Outcome:
    """Show the results of the workers as they come, then a summary; a job without one counts as failed.

    Args:
        rows: what `ArchiveWorker` returns, one job each.
    """
    outcome, kept, fatal = Outcome(), 0, ""
    begin = noted = time.monotonic()
    missing = dict(enumerate(jobs))
    with display:
        display.progress(BAR, 0, len(jobs))
        for row in rows:
            fatal = row["fatal"]
            if fatal:
                break
            job = missing.pop(row["number"])
            log: RecordingLog = pickle.loads(row["log"])
            log.replay(display.for_recording(job.name), job.base.parent)
            if log.failed:
                outcome.failed += 1
            elif log.seconds is None:
                kept += 1
            else:
                outcome.durations.append(log.seconds)
            display.progress(BAR, len(jobs) - len(missing), len(jobs))
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                display.note(summarize_archive(outcome, kept, noted - begin, len(missing)))
    if fatal:
        display.error(fatal)
    for job in () if fatal else missing.values():
        give_up(job).replay(display, job.base.parent)
    outcome.failed += len(missing)
    display.note(summarize_archive(outcome, kept, time.monotonic() - begin))
    return outcome


def summarize_archive(outcome: Outcome, kept: int, seconds: float, waiting: int = 0) -> str:
    """Return one line: recordings by how they ended, hours of audio, and the speed."""
    counts = [f"{len(outcome.durations)} transcribed", f"{kept} kept", f"{outcome.failed} failed"]
    counts += [f"{waiting} to do"] if waiting else []
    hours = sum(outcome.durations) / 3600
    shown = f"{hours:.2f}" if hours >= 1 else f"{hours:.3g}"
    speed = f"{shown} h of audio in {format_time(seconds)}, {hours / max(seconds, 1e-9):.3g} h a second"
    return f"recordings: {', '.join(counts)}; {speed}"


def check_options(config: DictConfig) -> None:
    """Raise ValueError if an option ray.* does not fit."""
    for name, least in (("workers", 1), ("gpus", 0), ("cpus", 0)):
        value = config.ray[name]
        if value is None and name != "cpus":
            continue
        number = isinstance(value, int if name == "workers" else int | float) and not isinstance(value, bool)
        if not number or value < least:
            raise ValueError(f"ray.{name}={value}: give a number, {least} or more")
    if config.ray.gpus is not None and config.ray.gpus > 1 and config.ray.gpus % 1:
        raise ValueError(f"ray.gpus={config.ray.gpus}: give a share of one GPU, or a whole number")


def choose_resources(ray: ModuleType, config: DictConfig) -> dict[str, float]:
    """Return `workers`, and the `gpus` and `cpus` of each.

    Raises:
        ValueError: if the cluster has no room for a worker, and their number is not given: a cluster may still grow.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = config.ray.gpus, config.ray.cpus
    if gpus is None:
        gpus = int(config.device != "cpu" and any(machine.get("GPU", 0) >= 1 for machine in machines))
    workers = config.ray.workers or sum(
        int(min([machine.get(kind, 0) / need for kind, need in (("GPU", gpus), ("CPU", cpus)) if need] or [1]))
        for machine in machines
    )
    if not workers:
        raise ValueError(f"ray.gpus={gpus} ray.cpus={cpus}: no machine of the cluster has as many; give less")
    return {"workers": workers, "gpus": gpus, "cpus": cpus}


def run_workers(
    ray: ModuleType,
    jobs: Sequence[Job],
    batch: int,
    worker: tuple[Any, ...],
    resources: dict[str, float],
    debug: bool,
) -> Iterator[dict[str, Any]]:
    """Yield what the workers return for each job, in the order in which they end.

    Args:
        batch: jobs that a worker gets at once, and loses if it dies.
        worker: arguments of ArchiveWorker that follow the ledger.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0 if debug else -1  # jobs of such a block are missed in the results
    rows = [{"number": number, "job": pickle.dumps(resolve_job(job))} for number, job in enumerate(jobs)]
    blocks = min(math.ceil(len(rows) / batch), MAX_BLOCKS)
    workers = min(int(resources["workers"]), blocks)
    # One job at a time: those that wait inside a worker would die with it. A pool that may shrink leaves room for a
    # worker that is started again, at the end, on a cluster that has lost a machine.
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1
    )
    results = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        ArchiveWorker,
        batch_size=batch,
        compute=pool,
        fn_constructor_args=(start_ledger(ray), *worker),
        num_cpus=resources["cpus"],
        num_gpus=resources["gpus"],
    )
    yield from results.iter_rows()


def resolve_job(job: Job) -> Job:
    """Return a job whose paths do not depend on the current folder, and whose name is as before."""
    audio = job.audio if is_uri(job.audio) else Path(job.audio).absolute()
    return replace(job, audio=audio, base=job.base.absolute(), title=job.name)


class LedgerActor(Ledger):
    """A ledger in a process of its own, from wherever it is called.

    Args:
        get, actor: of Ray.
    """

    def __init__(self, get: Callable[[Any], Any], actor: Any) -> None:
        self._get, self._actor = get, actor

    def look_up(self, numbers: Sequence[int]) -> list[tuple[int, RecordingLog | None]]:
        return self._get(self._actor.look_up.remote(numbers))

    def begin(self, numbers: Sequence[int]) -> None:
        self._get(self._actor.begin.remote(numbers))

    def end(self, number: int, log: RecordingLog) -> None:
        self._get(self._actor.end.remote(number, log))


def start_ledger(ray: ModuleType) -> LedgerActor:
    """Start a ledger on this machine, which lives as long as the work: without it there is no work."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    actor = ray.remote(Ledger).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return LedgerActor(ray.get, actor.remote())


@contextmanager
def mark_shared_folder(jobs: Sequence[Job]) -> Iterator[Path | None]:
    """Keep a file in the folder of the transcripts, by which workers know it; None if they lie beside recordings.

    Raises:
        OutputError: if the folder cannot be made or written to.
    """
    apart = [job for job in jobs if is_uri(job.audio) or job.base.parent != job.audio.parent]
    if not apart:
        yield None
        return
    folder = Path(os.path.commonpath([job.base.parent.absolute() for job in apart]))
    Job(Path(), folder / "any").check_writable()
    try:
        file: IO[bytes] = tempfile.NamedTemporaryFile(prefix=".unique-asr-", dir=folder)  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"{folder}: is not writable; output.dir=FOLDER writes elsewhere") from error
    with file:
        yield Path(file.name)


@contextmanager
def connect(config: DictConfig) -> Iterator[ModuleType]:
    """Give Ray, connected to a cluster; what it says itself is shown with debug=true alone.

    Raises:
        ValueError: if it is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not config.debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ValueError(
            'runner=ray: needs the package ray (pip install "ray[data]"); runner=local goes without'
        ) from error
    interrupt = signal.getsignal(signal.SIGTERM)
    started = not ray.is_initialized()
    with ExitStack() as stack:
        if not config.debug:
            stack.enter_context(silence_ray())
        try:
            if started:
                level = logging.INFO if config.debug else logging.CRITICAL
                with ExitStack() if config.debug else silence_stderr():
                    check_answer(config.ray.address or os.environ.get("RAY_ADDRESS", ""))
                    ray.init(config.ray.address, log_to_driver=config.debug, logging_level=level)
                stack.callback(shut_down, ray, config.debug)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"ray.address={config.ray.address}: no Ray cluster answers ({reason})") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, interrupt)  # Ray's own would end the process without a word
        yield ray


def check_answer(address: str) -> None:
    """Raise OSError if nobody answers at host:port or ray://host:port; Ray itself would wait for minutes."""
    if match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((match[1], int(match[2])), ANSWER_SECONDS).close()


def shut_down(ray: ModuleType, debug: bool) -> None:
    """End the connection; what Ray has not printed until then, it prints now."""
    with ExitStack() if debug else redirect_stdout(StringIO()):
        ray.shutdown()


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Drop what is written to the file of standard error, which Ray's C++ does without Python's."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def silence_ray() -> Iterator[None]:
    """Drop what Ray logs, and what its threads print to standard output, which is for transcripts."""
    levels = {name: logging.getLogger(name).level for name in ("ray", "ray.data")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stdout(MainThreadOutput(sys.stdout)):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class MainThreadOutput:
    """A stream that drops what threads other than its maker's write."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._thread = stream, threading.current_thread()

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length."""
        return self._stream.write(text) if threading.current_thread() is self._thread else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
