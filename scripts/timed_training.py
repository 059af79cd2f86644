"""Run `diffuse train` from a script: short trainings for the steps per second, and the pace of a run."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import yaml

from diffusion_cli.system.signals import UNFINISHED, handling

QUIET = ["logger=[csv]", "preview_every=null", "preview_real=false", "validate_every=1000000", "keep_last=1"]
"""Words of `diffuse train` that turn off what takes time besides training."""
TIMED_STEPS = 60


def diffuse(words: Sequence[str], log: Path) -> int:
    """Run a command with its output added to a log; return its exit code.

    A stop signal is passed on to the command, which saves its progress. KeyboardInterrupt is raised when it has ended.
    """
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        if process is not None:
            process.send_signal(number)

    log.parent.mkdir(parents=True, exist_ok=True)
    # The signals are handled before the start: the command would continue alone if one came in between.
    with log.open("a") as file, handling(forward):
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusion_cli", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C of a terminal would arrive twice
        )
        if stopped:
            process.send_signal(stopped[0])
        code = process.wait()
    if stopped or code == UNFINISHED:
        raise KeyboardInterrupt
    return code


class Pace(NamedTuple):
    """What a training did, and in which time."""

    steps: int
    seconds: float
    images_per_second: float

    @property
    def steps_per_second(self) -> float:
        """Optimizer steps per second."""
        return self.steps / self.seconds

    @classmethod
    def of(cls, run: Path, first: int = 0) -> "Pace":
        """Return the pace of a run by its metrics.csv, without the first rows, which include the start."""
        batch_size = yaml.safe_load((run / "config.yaml").read_text())["batch_size"]
        with (run / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("images_per_second")]
        steps = [0, *(int(row["step"]) for row in rows)]
        parts = [(after - before) * batch_size for before, after in pairwise(steps)]
        seconds = [part / float(row["images_per_second"]) for part, row in zip(parts, rows, strict=True)]
        total = sum(seconds[first:])
        return cls(steps[-1] - steps[first], total, sum(parts[first:]) / total)


def timed(words: Sequence[str], folder: Path, log: Path, steps: int = TIMED_STEPS) -> float | None:
    """Return the steps per second of a short training in a folder, which is removed; None if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    short = [f"max_steps={steps}", f"log_every={steps // 3}", "optimizer.lr=1e-9"]
    code = diffuse(
        ["train", *words, *QUIET, f"name={folder.name}", f"output_dir={folder.parent}", *short], log
    )
    found = Pace.of(folder, first=1).steps_per_second if code == 0 else None
    shutil.rmtree(folder, ignore_errors=True)
    return found
