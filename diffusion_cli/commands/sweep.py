"""The jobs of a sweep: check them, run them by Hydra's launcher, and print a table of them."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_cli import config
from diffusion_cli.commands.execution import execute, interrupt
from diffusion_cli.config import Config
from diffusion_cli.errors import NO_VALUE, USER_ERROR, MachineError, Problem, UsageError, first_line, lines_of
from diffusion_cli.system.compat import watching_submissions
from diffusion_cli.system.locks import locking_job
from diffusion_cli.system.signals import UNFINISHED, handling
from diffusion_cli.system.terminal import guarded, report, table

NOT_STARTED = "not started"


@dataclass
class Job:
    """One job of a sweep."""

    overrides: list[str]
    values: list[str]
    """Its values of the swept keys."""
    result: str = NOT_STARTED
    folder: str = ""
    """Folder of the run that it trains, or of its other results if the command names it."""


def sweep(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> int:
    """Check the configurations of a sweep, run its jobs with Hydra's launcher, and print a table of the jobs."""
    words, overrides = config.split_launcher(overrides)
    swept = config.expand(command, overrides, dirs)
    checked = config.load_sweep(swept, dirs)
    launcher = config.launch(config.as_typed(command, words, dirs), checked, dirs)
    jobs = [Job(job, swept.values_of(job)) for job in swept.jobs]
    folders = ",".join(config.quoted(f"file://{folder.resolve()}") for folder in dirs)
    output_dir = checked[0].output_dir
    logs = Path(output_dir, ".submitit")
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # Hydra would do it with a traceback
    except OSError as error:
        raise config.system_error(error, checked[0].model_dump()) from error
    on_slurm = f"{config.LAUNCHERS}=slurm" in launcher
    print(f"{'Submitting' if on_slurm else 'Running'} {len(jobs)} jobs", flush=True)
    sys.argv = [
        "diffuse",
        f"+job=range({len(jobs)})",  # Hydra gets a number, and no word that its grammar might refuse
        *(text for text in overrides if text.startswith("hydra")),
        *launcher,
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={config.quoted(output_dir)}",
        "hydra.sweep.subdir=.",
        *([f"hydra.searchpath=[{folders}]"] if folders else []),
        "--multirun",
    ]
    work = partial(_sweep_job, command, dirs, jobs)
    try:
        if not on_slurm:
            _launch(command, work)
            for job in jobs:  # other launchers run them in processes of their own
                job.result = "done"
            return 0
        for job in jobs:
            job.folder = _folder(config.load(command, job.overrides, dirs))
        _refuse_running(jobs)
        return _submit(partial(_launch, command, work), jobs, logs, checked)
    finally:
        if any(job.result != NOT_STARTED for job in jobs):
            print(_table(swept.keys, jobs), flush=True)


def _folder(checked: Config) -> str:
    """Return the folder of the run that a configuration trains, or its `output`; empty if the command chooses it."""
    if isinstance(checked, config.TrainConfig):
        return str(Path(checked.output_dir, str(checked.name)))
    return getattr(checked, "output", None) or ""


def _table(keys: Sequence[str], jobs: Sequence[Job]) -> str:
    """Return a table of the jobs of a sweep."""
    rows = [["job", *keys, "result", "folder" if any(job.folder for job in jobs) else ""]]
    rows += [[str(number), *job.values, job.result, job.folder] for number, job in enumerate(jobs)]
    return f"\n{table(rows)}"


def _launch(command: str, work: Callable[[object], object]) -> None:
    """Let Hydra's launcher call a function for each job."""
    with handling(interrupt):
        config.run_hydra(command, work)


def _refuse_running(jobs: Sequence[Job]) -> None:
    """Raise UsageError if a job of SLURM that runs now trains in the folder of one of these jobs."""
    held = {job.folder: number for job in jobs if job.folder and (number := locking_job(Path(job.folder)))}
    command = ["squeue", "--noheader", "--format=%A"]
    running = subprocess.run(command, capture_output=True, text=True).stdout.split() if held else []
    problems = [
        Problem(
            "name",
            Path(folder).name,
            f"is being trained by job {number}",
            f"wait for it, or scancel {number}",
        )
        for folder, number in held.items()
        if number in running
    ]
    if problems:
        raise UsageError.several(problems)


def _submit(launch: Callable[[], None], jobs: Sequence[Job], logs: Path, checked: Sequence[Config]) -> int:
    """Submit jobs to SLURM and wait for them; return the exit code.

    Raises UsageError with the reasons of a refused submission, or of each job that failed.
    """
    submitted: list[Any] = []

    def report(cluster_jobs: Sequence[Any]) -> None:
        submitted.extend(cluster_jobs)
        number, _, task = cluster_jobs[0].job_id.partition("_")
        print(
            f"Submitted as job {number}; logs: {logs / f'{number}_*' if task else logs / number}", flush=True
        )
        if (reason := _no_accounts(number)) is not None:
            line = f"sacct fails ({reason}): this command waits forever for a job that is killed; see squeue"
            print(f"diffuse: {line}", file=sys.stderr)

    try:
        with watching_submissions(report):
            launch()
    except KeyboardInterrupt:
        if not submitted:
            raise
        print(
            f"diffuse: stopped waiting; the jobs continue: squeue lists them, scancel ends them; logs: {logs}",
            file=sys.stderr,
        )
        return UNFINISHED
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "submitit":
            raise
        if not submitted:
            raise UsageError.several([config.submission_problem(str(error), checked)]) from error
        raise UsageError("launcher", "slurm", first_line(error), f"logs: {logs}") from error
    problems: list[Problem] = []
    for job, cluster_job in zip(jobs, submitted, strict=True):
        reasons = next((lines for done in cluster_job.results() if (lines := done.return_value)), [])
        job.result = "failed" if reasons else "done"
        problems += [Problem(f"job {cluster_job.job_id}", NO_VALUE, reason) for reason in reasons]
    if problems:
        raise UsageError.several(problems)
    return 0


def _sweep_job(command: str, dirs: Sequence[Path], jobs: Sequence[Job], _: object) -> Sequence[str]:
    """Run one job of a sweep; return the reasons of a failure on a cluster."""
    job = jobs[config.job_number()]
    print(
        f"\ndiffuse {command} {' '.join(map(config.as_pasted, [*config.allowing_words(), *job.overrides]))}",
        flush=True,
    )
    reasons: Sequence[str] = []
    with guarded():
        if "SUBMITIT_EXECUTOR" in os.environ:
            code, reasons = _cluster_job(command, job, dirs)
        else:
            code = _local_job(command, job, dirs)
    if code:
        sys.exit(code)
    return reasons


def _local_job(command: str, job: Job, dirs: Sequence[Path]) -> int:
    """Run one job of a sweep in this process; the first failure ends the sweep."""
    job.result = "failed"
    try:
        checked = config.load(command, job.overrides, dirs)
        job.folder = _folder(checked)
        code = execute(command, checked)
    except (UsageError, MachineError) as error:
        report(*lines_of(error))
        return USER_ERROR
    job.result = {0: "done", UNFINISHED: "stopped"}.get(code, "failed")
    return code


def _cluster_job(command: str, job: Job, dirs: Sequence[Path]) -> tuple[int, Sequence[str]]:
    """Run one job of a sweep under submitit; a job that runs out of time saves and is requeued.

    Returns the exit code, and the reasons of a failure, which the sweep reports. The log contains the traceback.
    """
    try:
        code = execute(command, config.load(command, job.overrides, dirs))
    except (UsageError, MachineError) as error:
        reasons = lines_of(error)
        report(*reasons)
        return 0, reasons
    except Exception as error:
        traceback.print_exc()
        return 0, [f"{type(error).__name__}: {first_line(error)}"]
    else:
        if code == UNFINISHED and _still_wanted():
            signal.raise_signal(signal.SIGUSR2)  # makes submitit requeue the job
        return code, []


def _no_accounts(number: str) -> str | None:
    """Return why sacct cannot show the state of a job; None if it can."""
    try:
        done = subprocess.run(["sacct", "--noheader", f"--jobs={number}"], capture_output=True, text=True)
    except OSError as error:
        return error.strerror
    return (done.stderr.strip() or "no message").splitlines()[-1] if done.returncode else None


def _still_wanted() -> bool:
    """Return whether SLURM lets this job continue: it is neither cancelled nor already requeued."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() == "RUNNING"
