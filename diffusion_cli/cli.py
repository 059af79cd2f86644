"""`diffuse <command> [group=option] [key=value]`: parse the command line, print help, run the command.

This module does not import torch, so help and error messages are fast.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from diffusion_cli import __version__, config
from diffusion_cli.config import (
    COMMANDS,
    CONF,
    FIRST_WORD,
    GRIDS,
    Config,
    Variant,
    did_you_mean,
)
from diffusion_cli.errors import NO_VALUE, MachineError, Problem, UsageError, first_line
from diffusion_cli.system.compat import watching_submissions
from diffusion_cli.system.locks import locking_job
from diffusion_cli.system.signals import STOPPED, UNFINISHED, end, end_at_signals, handling
from diffusion_cli.system.terminal import guarded, lost_output, open_closed_streams, table
from diffusion_cli.system.untrusted import printable

USER_ERROR, INTERNAL_ERROR = 2, 1
BUG = (
    f"this is an error in diffuse {__version__}, not in your command; please report it with the lines above, the "
    "command, and the run's config.yaml"
)


@dataclass
class Request:
    """A parsed command line."""

    overrides: list[str] = field(default_factory=list)
    dirs: list[Path] = field(default_factory=list)
    help: bool = False
    show: bool = False
    multirun: bool = False


def main() -> None:
    """The `diffuse` entry point."""
    end_at_signals()
    open_closed_streams()
    code = run(sys.argv[1:])
    sys.stdout.flush()
    end_at_signals(code, line="")  # a signal during interpreter shutdown does not change the exit code
    if "RANK" in os.environ or "SLURM_STEP_ID" in os.environ:
        end(code)  # the launcher runs several processes
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    0: done; 1: failed, or `data list` found a file missing or damaged; 2: invalid setting or file, or a machine
    failure; 75: stopped by a signal.
    """
    with guarded():
        try:
            code = _dispatch(list(words))
        except (UsageError, MachineError) as error:
            if os.environ.get("DIFFUSE_TRACEBACK"):
                raise
            return _report(*_lines(error))
        except Exception as error:
            traceback.print_exc()
            place = config.place_of(error)
            return _report(f"{place}: error in a plugin, see above" if place else BUG, code=INTERNAL_ERROR)
        lost = lost_output()
        return _report(lost) if lost else code


def _lines(error: UsageError | MachineError) -> Sequence[str]:
    """Return the lines to print for an error, one per problem."""
    return error.lines if isinstance(error, UsageError) else [" ".join(str(error).split())]


def _report(*lines: str, code: int = USER_ERROR) -> int:
    """Print lines to stderr; torchrun repeats them at the end of its own report."""
    shown = [f"diffuse: {printable(line)}" for line in lines]
    print("\n".join(shown), file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": "\n".join(shown), "timestamp": int(time.time())}))
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(config.overview())
    elif words[0] == "--version":
        print(f"diffuse {__version__}")
    elif words[0] == "completion":
        asked = words[1:2] in (["--help"], ["-h"])
        print(config.COMPLETION_HELP if asked else config.completion_script("".join(words[1:2])))
    elif words[0] == "__complete":
        print("\n".join(config.complete(words[1:])))
    elif words[0] not in COMMANDS:
        raise UsageError(
            words[0], NO_VALUE, "unknown command", did_you_mean(words[0], [*COMMANDS, "completion"])
        )
    else:
        return _command(words[0], parse(words[0], _with_first_option(words[0], words[1:])))
    return 0


def _command(command: str, request: Request) -> int:
    if asked := config.groups_asked(command, request.overrides, request.dirs):
        pages = (config.group_help(command, group, request.overrides, request.dirs) for group in asked)
        print("\n\n".join(pages))
        return 0
    if request.help:
        print(config.command_help(command, request.overrides, request.dirs))
        return 0
    for line in config.overridden(command, request.overrides):
        print(f"diffuse: {printable(line)}", file=sys.stderr)
    if request.multirun and command in GRIDS:
        raise UsageError(
            "--multirun", NO_VALUE, f"{command} takes lists of values", "leave it out and write key=[...]"
        )
    if request.multirun:
        return sweep(command, request)
    if command in GRIDS:
        variants = config.load_grid(command, request.overrides, request.dirs)
        return _show([variant.config for variant in variants]) if request.show else execute(command, variants)
    checked = config.load(command, request.overrides, request.dirs)
    return _show([checked]) if request.show else execute(command, checked)


def _show(configs: Sequence[Config]) -> int:
    print(
        yaml.safe_dump_all(
            [checked.model_dump() for checked in configs], sort_keys=False, allow_unicode=True
        ),
        end="",
    )
    return 0


def _with_first_option(command: str, words: list[str]) -> list[str]:
    """Expand a bare first word after a command to `group=option`."""
    group = FIRST_WORD.get(command)
    bare = group and words and "=" not in words[0] and words[0] != group and not words[0].startswith("-")
    return [f"{group}={words[0]}", *words[1:]] if bare else words


def parse(command: str, words: Sequence[str]) -> Request:
    """Parse the words after a command.

    Raises UsageError for words that are neither flags nor `key=value`.
    """
    request = Request()
    problems: list[Problem] = []
    others: list[str] = []
    rest = iter(config.without_plugins(words))
    for word in rest:
        flag, _, value = word.partition("=")
        if word in ("--help", "-h"):
            request.help = True
        elif word in ("--multirun", "-m"):
            request.multirun = True
        elif flag == "--cfg":
            request.show = True
            if (value or next(rest, "")) != "job":
                problems.append(Problem(word, NO_VALUE, "its only value is job", "write --cfg job"))
        elif flag in ("--config-dir", "-cd"):
            given = value or next(rest, "")
            request.dirs.append(Path(given).expanduser())
            if not given or not request.dirs[-1].is_dir():
                problem = "no such folder" if given else "no folder given"
                remedy = "give a folder with <group>/<option>.yaml files"
                problems.append(Problem(f"--config-dir {given}".strip(), NO_VALUE, problem, remedy))
        else:
            others.append(word)
    request.overrides, misspelt = config.sort_words(command, others)
    problems += [] if request.help else misspelt
    if problems:
        raise UsageError.several(problems)
    return request


def execute(command: str, checked: Config | list[Variant]) -> int:
    """Run a command and return its exit code; MachineError if the disk, the network or the memory fails."""
    try:
        module = importlib.import_module(f"diffusion_cli.commands.{command}")
        with handling(_interrupt):
            return module.run(checked) or 0
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return UNFINISHED
    except OSError as error:
        if os.environ.get("DIFFUSE_TRACEBACK") or isinstance(error, MachineError) or not error.errno:
            raise
        first = checked[0].config if isinstance(checked, list) else checked
        raise config.system_error(error, first.model_dump()) from error


def _interrupt(number: int, frame: object) -> None:
    """Treat scheduler signals like Ctrl-C. Training replaces this handler once it can save."""
    raise KeyboardInterrupt


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


def sweep(command: str, request: Request) -> int:
    """Check the configurations of a sweep, run its jobs with Hydra's launcher, and print a table of the jobs."""
    words, overrides = config.split_launcher(request.overrides)
    swept = config.expand(command, overrides, request.dirs)
    checked = config.load_sweep(swept, request.dirs)
    if request.show:
        return _show([config.load(command, job, request.dirs) for job in swept.jobs])
    launcher = config.launch(config.as_typed(command, words, request.dirs), checked, request.dirs)
    jobs = [Job(job, swept.values_of(job)) for job in swept.jobs]
    folders = ",".join(config.quoted(f"file://{folder.resolve()}") for folder in request.dirs)
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
    work = partial(_sweep_job, command, request.dirs, jobs)
    try:
        if not on_slurm:
            _launch(command, work)
            for job in jobs:  # other launchers run them in processes of their own
                job.result = "done"
            return 0
        for job in jobs:
            job.folder = _folder(config.load(command, job.overrides, request.dirs))
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
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions of jobs propagate unchanged
    with handling(_interrupt):
        hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")(work)()


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
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    (number,) = (text.partition("=")[2] for text in HydraConfig.get().overrides.task if "job=" in text)
    job = jobs[int(number)]
    GlobalHydra.instance().clear()
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
        return _report(*_lines(error))
    job.result = {0: "done", UNFINISHED: "stopped"}.get(code, "failed")
    return code


def _cluster_job(command: str, job: Job, dirs: Sequence[Path]) -> tuple[int, Sequence[str]]:
    """Run one job of a sweep under submitit; a job that runs out of time saves and is requeued.

    Returns the exit code, and the reasons of a failure, which the sweep reports. The log contains the traceback.
    """
    try:
        code = execute(command, config.load(command, job.overrides, dirs))
    except (UsageError, MachineError) as error:
        reasons = _lines(error)
        _report(*reasons)
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
