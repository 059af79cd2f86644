"""The runs under a folder, and the checkpoints in them."""

import difflib
import sys
import time
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.checkpoint import LAST, Checkpoint, DamagedError, copy_checkpoint, read
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import set_aside
from diffusion_cli.system.own_folder import own_folder

WRITTEN = ("checkpoints", "previews", "tensorboard")
"""The folders that training writes to."""

MOST_NAMED = 5
"""Runs that an error lists."""


class Found(NamedTuple):
    """The newest whole checkpoint of a run."""

    path: Path
    checkpoint: Checkpoint
    remark: str | None
    """Why it is not the last one, and what it is."""


def newest(run: Path, sums: bool = True) -> Found | None:
    """The last checkpoint of a run, or the newest numbered one where that is damaged or missing; None if it has none.

    Raises UsageError if none is whole, or as `read`, with or without `sums`.
    """
    last = run / LAST
    earlier = sorted(last.parent.glob("step_*.ckpt"), reverse=True)
    why = "damaged checkpoint" if last.is_file() else "missing checkpoint"
    for path in (last, *earlier):
        try:
            checkpoint = read(path, sums)
        except (DamagedError, FileNotFoundError):
            continue
        step = checkpoint.step
        return Found(
            path,
            checkpoint,
            None if path == last else f"{last}: {why}; using step {step}, {path.name}",
        )
    if not earlier and not last.is_file():
        return None
    raise DamagedError(
        last,
        NO_VALUE,
        f"{why}, and the run has no intact one",
        "restore a copy, or choose another run",
    )


def find_run(run: str | None, output_dir: str, key: str = "run") -> Path:
    """The folder of a run by path or name, or that of the newest denoiser under `output_dir`.

    Raises UsageError, about the option called `key`, if there is none.
    """
    root = Path(output_dir)
    dates = {
        folder: max(file.stat().st_mtime for file in _checkpoints(folder))
        for folder in root.glob("*")
        if _checkpoints(folder)
    }
    runs = sorted(dates, key=lambda folder: (dates[folder], folder.name))
    if run is None:
        for folder in reversed(runs):
            # A run of which nothing is whole is said, not passed over; all bytes are looked at once it is loaded.
            found = newest(folder, sums=False)
            if found is not None and found.checkpoint.info.task == Denoiser.task:
                if dates[folder] > time.time() + 3600 and Distributed().is_main:
                    print(
                        f"diffuse: {folder} is the newest run, but its date is in the future; run= chooses another",
                        file=sys.stderr,
                    )
                return folder
        raise UsageError("output_dir", output_dir, "contains no runs", "train one with: diffuse train")
    for folder in (Path(run), root / run):
        if _checkpoints(folder):
            return folder
    raise UsageError(key, run, *_no_run(run, root, [folder.name for folder in reversed(runs)]))


def _no_run(run: str, root: Path, names: list[str]) -> tuple[str, str]:
    """Return why a path or a name is no run, and what to do, given the names of the runs in `root`."""
    path = next((path for path in (Path(run), root / run) if path.exists()), None)
    if path is not None and path.is_file():
        folder = next((f", {parent}" for parent in path.parents if is_run(parent)), "")
        return "is a file", f"give the run's folder{folder}"
    problem = "does not exist" if path is None else f"has no {LAST}"
    if near := difflib.get_close_matches(Path(run).name, names, n=1):
        return problem, f"did you mean {near[0]}?"
    if not names:
        return problem, "train one with: diffuse train"
    return problem, f"the newest runs in {root} are: {', '.join(names[:MOST_NAMED])}"


def is_run(folder: Path) -> bool:
    """Whether a folder holds checkpoints, whole or not."""
    return bool(_checkpoints(folder))


def task_of(run: Path) -> str:
    """Return the task of a run: `diffusion`, `classifier` or `autoencoder`; UsageError as `newest`, or without one."""
    found = newest(run, sums=False)
    if found is None:
        raise UsageError(run, NO_VALUE, f"has no {LAST}")
    return found.checkpoint.info.task


def recover(run: Path) -> None:
    """Make a run's last checkpoint a whole one, the damaged one kept beside it, and remove what was never finished.

    For the holder of the run's lock. Raises UsageError as `newest` and `own_folder`, OSError as `atomic_write`.
    """
    for name in WRITTEN:
        own_folder(run, name)
    unfinished = ("checkpoints/.*.tmp", "previews/.*.tmp", ".config.yaml.*.tmp", ".metrics.csv.*.tmp")
    for pattern in unfinished:  # the files that only the holder writes
        for left in run.glob(pattern):
            left.unlink(missing_ok=True)
    found = newest(run)
    if found is None or found.remark is None:
        return
    last = run / LAST
    kept = ""
    if last.is_file():
        kept = f"; the damaged file is now {set_aside(last).name}"
    copy_checkpoint(found.path, last)
    print(f"diffuse: {found.remark}{kept}", file=sys.stderr)


def _checkpoints(run: Path) -> list[Path]:
    """The files of a run that it can be taken up from."""
    found = [run / LAST, *run.glob(str(LAST.with_name("step_*.ckpt")))]
    return [file for file in found if file.is_file()]
