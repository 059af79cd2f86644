"""Find runs, and the newest intact checkpoint of a run."""

import difflib
import sys
import time
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.config.runs import checkpoints_of, file_in_place_of_run, run_folders
from diffusion_cli.convert import is_model
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.checkpoint import LAST, Checkpoint, DamagedError, copy_checkpoint, read
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import set_aside
from diffusion_cli.system.own_folder import own_folder

WRITTEN = ("checkpoints", "ema", "previews", "tensorboard")
"""Folders of a run that training writes to."""

PRETRAINED = {"init.run": "init.pretrained", "latent.run": "latent.pretrained"}
"""Keys that take a model of another program in place of a run."""
STEP_KEYS = {"run": "step", "init.run": "init.step"}
"""Keys that choose any checkpoint of a run, by the key of the run."""
MOST_NAMED = 5
"""Largest number of runs in an error message."""


class Found(NamedTuple):
    """The newest intact checkpoint of a run."""

    path: Path
    checkpoint: Checkpoint
    remark: str | None
    """Why `last.ckpt` is not used; None if it is."""


def newest(run: Path, sums: bool = True) -> Found | None:
    """Return `last.ckpt` of a run, or the newest intact numbered checkpoint if it is damaged or missing.

    Args:
        run: run folder.
        sums: verify the checksums.

    Returns:
        The checkpoint; None if the run has none.

    Raises:
        UsageError: if all checkpoints are damaged, and as `read`.
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
    """Return the folder of a run given by path or name; for None, of the newest denoiser in `output_dir`.

    Raises UsageError, about the option `key`, if there is no such run.
    """
    root = Path(output_dir)
    dates = {
        folder: max(file.stat().st_mtime for file in checkpoints_of(folder)) for folder in run_folders(root)
    }
    runs = sorted(dates, key=lambda folder: (dates[folder], folder.name))
    if run is None:
        for folder in reversed(runs):
            # A run with only damaged checkpoints is an error. Loading the run verifies the checksums later.
            found = newest(folder, sums=False)
            if found is not None and found.checkpoint.info.task == Denoiser.task:
                if dates[folder] > time.time() + 3600 and Distributed().is_main:
                    print(
                        f"diffuse: {folder} is the newest run, but its date is in the future; run= chooses another",
                        file=sys.stderr,
                    )
                return folder
        raise UsageError("output_dir", output_dir, "contains no runs", "train one with: diffuse train")
    folders = (Path(run), root / run)
    for folder in folders:
        if checkpoints_of(folder):
            return folder
    for folder in folders:
        if is_model(folder):
            command = PRETRAINED.get(key, "diffuse import source")
            raise UsageError(key, run, "is a model, not a run", f"use {command}={folder}")
        if folder.is_file():
            raise UsageError(key, run, *file_in_place_of_run(folder, STEP_KEYS.get(key)))
    raise UsageError(key, run, *_no_run(run, root, [folder.name for folder in reversed(runs)]))


def _no_run(run: str, root: Path, names: list[str]) -> tuple[str, str]:
    """Return the problem and the remedy for a path or name that is not a run, given the names of runs in `root`."""
    path = next((path for path in (Path(run), root / run) if path.exists()), None)
    problem = "does not exist" if path is None else f"has no {LAST}"
    if near := difflib.get_close_matches(Path(run).name, names, n=1):
        return problem, f"did you mean {near[0]}?"
    if not names:
        return problem, "train one with: diffuse train"
    return problem, f"the newest runs in {root} are: {', '.join(names[:MOST_NAMED])}"


def is_run(folder: Path) -> bool:
    """Return whether a folder contains checkpoints, intact or damaged."""
    return bool(checkpoints_of(folder))


def task_of(run: Path) -> str:
    """Return the task of a run: `diffusion`, `classifier` or `autoencoder`.

    Raises UsageError if the run has no checkpoint, and as `newest`.
    """
    found = newest(run, sums=False)
    if found is None:
        raise UsageError(
            run, NO_VALUE, f"has no {LAST}", "choose another run, or train it with: diffuse train"
        )
    return found.checkpoint.info.task


def recover(run: Path) -> None:
    """Replace a damaged or missing `last.ckpt` by the newest intact checkpoint, and remove unfinished files.

    The damaged file is renamed. The caller must hold the lock of the run.

    Raises UsageError for a file in place of a folder, and as `newest` and `own_folder`, OSError as `atomic_write`.
    """
    for name in WRITTEN:
        folder = own_folder(run, name)
        if folder.exists() and not folder.is_dir():
            raise UsageError(folder, NO_VALUE, "is not a folder", "move it away")
    unfinished = (
        "checkpoints/.*.tmp",
        "ema/.*.tmp",
        "previews/.*.tmp",
        ".config.yaml.*.tmp",
        ".metrics.csv.*.tmp",
        ".*.safetensors.*.tmp",
    )
    for pattern in unfinished:  # only the process with the lock writes these files
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
