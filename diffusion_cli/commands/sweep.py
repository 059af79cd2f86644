"""The jobs of a sweep: run them by Hydra's sweeper and launcher, and print a table of them."""

import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_cli.config.hydra_jobs import Returned

from diffusion_cli import config
from diffusion_cli.commands.execution import execute, interrupt
from diffusion_cli.config import Config, SweepPlan
from diffusion_cli.errors import (
    INTERNAL_ERROR,
    NO_VALUE,
    USER_ERROR,
    FormatError,
    MachineError,
    Problem,
    UsageError,
    first_line,
    lines_of,
)
from diffusion_cli.runs.curves import last_values
from diffusion_cli.system.compat import watching_submissions
from diffusion_cli.system.locks import locking_job
from diffusion_cli.system.signals import STOPPED, UNFINISHED, handling
from diffusion_cli.system.terminal import guarded, report, table

NOT_STARTED = "not started"
BEST_VALUES = "optimization_results.yaml"
"""File in `output_dir` with the best values that a sweeper found."""


class JobFailed(Exception):
    """A failed job of a sweep, with the lines that it printed and its exit code."""

    def __init__(self, lines: Sequence[str], code: int) -> None:
        super().__init__(lines, code)
        self.lines, self.code = lines, code


@dataclass
class Job:
    """One job of a sweep."""

    overrides: list[str]
    result: str = NOT_STARTED
    folder: str = ""
    """Folder of the run that it trains, or of its other results if the command names it."""
    objectives: tuple[float, ...] = ()
    failure: JobFailed | None = None


def sweep(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> int:
    """Check the configurations of a sweep, run its jobs by Hydra, and print a table of the jobs."""
    plan = config.plan_sweep(command, overrides, dirs)
    jobs = [Job(job) for job in plan.jobs or ()]
    output_dir = Path(config.folder_of_sweep(plan.checked[0]))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)  # Hydra would do it with a traceback
        _keep_best_values(output_dir)
    except OSError as error:
        raise config.system_error(error, plan.checked[0].model_dump()) from error
    if plan.launcher == "slurm":
        for job in jobs:
            job.folder = _folder(config.load(command, job.overrides, dirs))
        _refuse_running(jobs)
    verb = "Submitting" if plan.launcher == "slurm" else "Running"
    print(
        f"{verb} {len(jobs)} jobs" if jobs else f"{verb} the jobs of {config.SWEEPERS}={plan.sweeper}",
        flush=True,
    )
    submitted: list[Any] = []
    try:
        code = _run(plan, jobs, submitted, output_dir / ".submitit")
    finally:
        if any(job.result != NOT_STARTED for job in jobs):
            print(f"\n{_table(plan, jobs)}", flush=True)
    if best := [*_best(plan, jobs, output_dir)]:
        print("\n" + "\n".join(best), flush=True)
    names = {number: done.job_id for number, done in enumerate(submitted)}
    failures = {names.get(number, number): job.failure for number, job in enumerate(jobs) if job.failure}
    if failures:
        report(*(f"job {name}: {line}" for name, failure in failures.items() for line in failure.lines))
    return code


def _keep_best_values(folder: Path) -> None:
    """Rename the best values of an earlier sweep, so that this one does not replace them."""
    file = folder / BEST_VALUES
    if file.exists():
        names = (file.with_suffix(f".{number}.yaml") for number in count(1))
        file.rename(next(name for name in names if not name.exists()))


def _folder(checked: Config) -> str:
    """Return the folder of the run that a configuration trains, or its `output`.

    Empty if nothing is kept, or if the command chooses the folder.
    """
    if isinstance(checked, config.TrainConfig):
        trial = checked.trainer["fast_dev_run"]
        return "" if trial else str(Path(checked.output_dir, str(checked.name)))
    return getattr(checked, "output", None) or ""


def _names(plan: SweepPlan) -> tuple[str, ...]:
    """Return the names of the objectives, for the table."""
    first = plan.checked[0]
    return config.objectives(first) or tuple(getattr(first, "metric", {}))[:1]


def _table(plan: SweepPlan, jobs: Sequence[Job]) -> str:
    """Return a table of the jobs of a sweep, with the keys that have several values."""
    names = _names(plan) if any(job.objectives for job in jobs) else ()
    keys = plan.swept.keys
    rows = [["job", *keys, *names, "result", "folder" if any(job.folder for job in jobs) else ""]]
    for number, job in enumerate(jobs):
        values = plan.swept.values_of(job.overrides)
        measured = [f"{value:.5g}" for value in job.objectives] or [""] * len(names)
        rows.append([str(number), *values, *measured, job.result, job.folder])
    return table(rows)


def _best(plan: SweepPlan, jobs: Sequence[Job], output_dir: Path) -> Iterator[str]:
    """Yield the best value of the jobs with its command, and the file in which a sweeper stored it."""
    names, measured = _names(plan), [job for job in jobs if len(job.objectives) == 1]
    if len(names) == 1 and len(measured) > 1 and config.has_best(names[0]):
        maximizes = plan.maximizes or [config.higher_is_better(names[0])]
        best = (max if maximizes[0] else min)(measured, key=lambda job: job.objectives[0])
        yield f"Best {names[0]}: {best.objectives[0]:.5g} by {_command(plan.command, best)}"
    if (output_dir / BEST_VALUES).is_file():
        yield f"Best values: {output_dir / BEST_VALUES}"


def _command(command: str, job: Job) -> str:
    """Return the command of a job, as a shell reads it."""
    return f"diffuse {command} {' '.join(map(config.as_pasted, [*config.allowing_words(), *job.overrides]))}"


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


def _run(plan: SweepPlan, jobs: list[Job], submitted: list[Any], logs: Path) -> int:
    """Let Hydra run the jobs, and return the exit code; jobs of SLURM are added to `submitted`.

    Raises UsageError with the reason of a refused submission, or of an error of the sweeper or the launcher.
    """
    from diffusion_cli.config import hydra_jobs

    work = partial(_run_job, plan.command, plan.dirs, plan.searches, jobs)
    stopped = True
    try:
        with _submitting(plan, submitted, logs), handling(interrupt):
            hydra_jobs.run_jobs(plan.hydra, plan.swept.asked, work, partial(_returned, plan, jobs))
        stopped = False
    except JobFailed:
        pass  # recorded by its job
    except KeyboardInterrupt:
        line = f"stopped waiting; the jobs continue: squeue lists them, scancel ends them; logs: {logs}"
        print(f"diffuse: {line}" if submitted else STOPPED, file=sys.stderr)
        return UNFINISHED
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if os.environ.get("DIFFUSE_TRACEBACK") or (
            library not in ("joblib", "submitit") and not plan.searches
        ):
            raise
        if library == "submitit" and plan.launcher == "slurm" and not submitted:
            raise UsageError.several([config.submission_problem(str(error), plan.checked)]) from error
        if library in ("joblib", "submitit"):
            remedy = (
                f"logs: {logs}" if library == "submitit" else "start fewer jobs at once: launcher.n_jobs=1"
            )
            raise UsageError("launcher", plan.launcher, first_line(error), remedy) from error
        if not jobs or not all(
            job.failure for job in jobs
        ):  # an error of the sweeper, such as in its settings
            remedy = "DIFFUSE_TRACEBACK=1 shows the place"
            raise UsageError(config.SWEEPERS, plan.sweeper, first_line(_reason(error)), remedy) from error
    _add_failures(jobs, submitted)
    allowed = plan.searches and not stopped  # the sweeper went on in spite of them
    return 0 if allowed else min((job.failure.code for job in jobs if job.failure), default=0)


def _reason(error: BaseException) -> BaseException:
    """Return the error behind those by which Hydra names what it made."""
    while type(error).__module__.startswith("hydra.") and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _submitting(plan: SweepPlan, submitted: list[Any], logs: Path) -> Iterator[None]:
    """Context that prints the jobs that are submitted to SLURM, and adds them to a list."""

    def added(cluster_jobs: Sequence[Any]) -> None:
        submitted.extend(cluster_jobs)
        number, _, task = cluster_jobs[0].job_id.partition("_")
        print(
            f"Submitted as job {number}; logs: {logs / f'{number}_*' if task else logs / number}", flush=True
        )
        if (reason := _no_accounts(number)) is not None:
            line = f"sacct fails ({reason}): this command waits forever for a job that is killed; see squeue"
            print(f"diffuse: {line}", file=sys.stderr)

    if plan.launcher != "slurm":
        yield
        return
    with watching_submissions(added):
        yield


def _job(jobs: list[Job], number: int, words: Sequence[str]) -> Job:
    """Return a job by its number; a sweeper that searches chooses its words just before it starts."""
    while len(jobs) <= number:
        jobs.append(Job([*words]))
    return jobs[number]


def _returned(plan: SweepPlan, jobs: list[Job], first: int, returns: Sequence["Returned"]) -> None:
    """Note the outcomes of jobs, which may have run in other processes."""
    for number, done in enumerate(returns, first):
        job, value = _job(jobs, number, done.words), done.value
        if done.error is not None:
            job.result, job.failure = "failed", _as_failure(done.error)
        else:
            job.result = "done"
            job.objectives = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not job.folder:
            with suppress(UsageError):
                job.folder = _folder(config.load(plan.command, job.overrides, plan.dirs))


def _as_failure(error: Exception) -> JobFailed:
    """Return the failure of a job; an exception that the job did not expect is a bug."""
    bug = JobFailed([f"{type(error).__name__}: {first_line(error)}"], INTERNAL_ERROR)
    return error if isinstance(error, JobFailed) else bug


def _add_failures(jobs: Sequence[Job], submitted: Sequence[Any]) -> None:
    """Note the failures of tasks of SLURM jobs other than the first, whose result Hydra has returned."""
    from diffusion_cli.config.hydra_jobs import error_of

    for job, cluster_job in zip(jobs, submitted, strict=False):
        errors = [error for done in cluster_job.results() if (error := error_of(done))]
        if errors:
            job.result, job.failure = "failed", _as_failure(errors[0])
        elif job.result == NOT_STARTED:
            job.result = "done"


def _run_job(
    command: str, dirs: Sequence[Path], searches: bool, jobs: list[Job], number: int, words: list[str]
) -> float | list[float] | None:
    """Run one job of a sweep, and return its objectives.

    Args:
        command: name of the command.
        dirs: folders with options of the user.
        searches: whether the sweeper needs the objectives.
        jobs: the jobs of the sweep, or a copy in another process.
        number: number of the job.
        words: its words, as the sweeper chose them.

    Raises:
        JobFailed: the job failed; the reasons are printed here, and the traceback of a bug.
    """
    job = _job(jobs, number, words)
    print(f"\n{_command(command, job)}", flush=True)
    job.result = "failed"
    with guarded():
        try:
            checked = config.load(command, job.overrides, dirs)
            job.folder = _folder(checked)
            outcome = execute(command, checked)
            if outcome.code == UNFINISHED:
                job.result = "stopped"
                if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and _still_wanted():
                    signal.raise_signal(signal.SIGUSR2)  # makes submitit requeue the job
                sys.exit(UNFINISHED)
            if outcome.code:
                raise MachineError(f"exit code {outcome.code}")
            job.objectives = _objectives(checked, outcome.values, searches)
        except (UsageError, MachineError) as error:
            job.failure = JobFailed(lines_of(error), USER_ERROR)
            report(*job.failure.lines)
            raise job.failure from None
        except Exception as error:
            traceback.print_exc()
            job.failure = _as_failure(error)
            raise job.failure from None
    job.result = "done"
    return list(job.objectives) if len(job.objectives) > 1 else next(iter(job.objectives), None)


def _objectives(checked: Config, measured: Mapping[str, float], needed: bool) -> tuple[float, ...]:
    """Return the values of `objective_metric`; none if they are not `needed` and one is missing.

    Raises:
        UsageError: a needed value is missing, or not a finite number.
    """
    if int(os.environ.get("SLURM_PROCID", 0)):
        return ()  # the first process returns them
    source, steps = "the results", {}
    if isinstance(checked, config.TrainConfig):
        if not (folder := _folder(checked)):
            return ()
        source = str(Path(folder, "metrics.csv"))
        try:
            steps = last_values(Path(source))
        except (OSError, FormatError) as error:
            if needed:
                raise UsageError(source, NO_VALUE, first_line(error), "add csv to logger=") from error
        measured = {name: value for name, (_, value) in steps.items()}
    found = []
    for wanted in config.objectives(checked) or tuple(measured)[:1]:
        name = config.named_value(wanted, [*measured])
        if name is None or not math.isfinite(measured[name]):
            if not needed:
                return ()
            problem = f"not in {source}" if name is None else f"is {measured[name]} at the end"
            remedy = f"choose from {', '.join(measured)}" if name is None else ""
            raise UsageError("objective_metric", wanted, problem, remedy)
        found.append(measured[name])
    return tuple(found)


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
