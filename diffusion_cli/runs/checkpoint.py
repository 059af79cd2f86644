"""Checkpoints and the run folders they lie in: written whole or not at all, read without running code.

A checkpoint is Lightning's, with a plain entry `diffuse` that `CheckpointInfo` describes. A denoiser of latents has its
autoencoder beside it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from diffusion_cli.config.values import Weights
from diffusion_cli.errors import NO_VALUE, FormatError, MachineError, Problem, UsageError
from diffusion_cli.runs.migrate import FORMAT, OLDEST, migrated
from diffusion_cli.runs.schema import CheckpointInfo, parse_info
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.untrusted import check_tensors, plain, reason, regular

LAST = Path("checkpoints", "last.ckpt")

BEST = LAST.with_name("best.ckpt")

# Lightning rewrites the checkpoints of its versions before 2.0, without a look at what they hold.
VERSION = re.compile(
    r"(?:[2-9]|[1-9]\d)(?:\.\d{1,9}){1,3}(?:\.?(?:a|b|rc|dev|post)\d{0,9}){0,3}(?:\+[a-z0-9.]{1,40})?"
)


class DamagedError(UsageError):
    """A checkpoint is not as it was written."""


@contextlib.contextmanager
def _whole_checkpoint(path: Path) -> Iterator[Path]:
    """A `atomic_write` that takes its place, durably, only once the disk gives back what was written."""
    with atomic_write(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # to be read from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            _check_sums(temporary)
        except DamagedError as error:
            raise MachineError(
                f"{path}: reading it back gave other bytes than were written; use a folder on another disk"
            ) from error
    if os.name == "posix":  # the move, too, should outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; what lies at `path` stays until the new one is whole; OSError as `atomic_write`."""
    with _whole_checkpoint(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides what the file system said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def copy_checkpoint(checkpoint: Path, path: Path) -> None:
    """Copy a checkpoint as `save` writes one: not a link, for what befalls one must not befall the other."""
    with _whole_checkpoint(path) as temporary:
        shutil.copyfile(checkpoint, temporary)


def _check_sums(path: Path) -> None:
    """Hold every byte of a checkpoint to the check sums in it, which torch does not; DamagedError if one is wrong."""
    try:
        with ZipFile(path) as archive:
            records = archive.infolist()
            # No record lies within another, to be read for ever; that none is packed has been checked.
            whole = sum(record.file_size for record in records) <= path.stat().st_size
            whole = whole and archive.testzip() is None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise _damaged(path, reason(error)) from error
    if not whole:
        raise _damaged(path, "a checksum is wrong")


def _damaged(path: Path, why: str) -> DamagedError:
    return DamagedError(
        path, NO_VALUE, f"invalid or damaged checkpoint ({why})", "choose another step= or another run"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: what Lightning stored, and what it says of its run."""

    state: dict[str, Any]
    """Lightning's entries, by name."""
    info: CheckpointInfo
    size: int
    """Bytes of the file."""

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.state["global_step"]

    @property
    def lightning_version(self) -> str:
        """The version that wrote it."""
        return self.state["pytorch-lightning_version"]

    def weights(self, kind: Weights) -> dict[str, Tensor]:
        """Return the weights of the network by their names in it."""
        if kind == "ema":
            return self.state["callbacks"]["EMA"]["network"]
        prefix = "model.network."
        state = self.state["state_dict"]
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def has_weights(self, kind: Weights) -> bool:
        """Return whether the weights are there, and the bytes for them.

        A few bytes can be said to be the numbers of a tensor of any size, and of any number of tensors.
        """
        try:
            state = self.weights(kind)
            usable = all(isinstance(key, str) and not value.is_neg() for key, value in state.items())
            bytes_of_all = sum(value.numel() * value.element_size() for value in state.values())
            return usable and 0 < bytes_of_all <= self.size
        except (LookupError, TypeError, AttributeError):
            return False


def read(path: Path, sums: bool = True) -> Checkpoint:
    """Read a checkpoint as tensors and plain data.

    Args:
        path: its file.
        sums: False maps the bytes of the tensors without reading them.

    Raises:
        DamagedError: if the file is not whole.
        UsageError: if it is no checkpoint of this package, or of a newer version.
    """
    try:
        size = regular(path)
    except FormatError as error:
        raise _damaged(path, reason(error)) from error
    try:
        check_tensors(path)
        if sums:
            _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DamagedError:
        raise
    except Exception as error:  # parsers of ZIP and pickle meet damaged files with errors of many types
        raise _damaged(path, reason(error)) from error
    entry = state.get("diffuse") if isinstance(state, dict) else None
    # A tensor in its place would be compared number by number, however many it says that it has.
    written = entry.get("format") if isinstance(entry, dict) else None
    if type(written) is not int or written < OLDEST:
        raise UsageError(path, NO_VALUE, "is not a checkpoint that diffuse can read", "choose another run")
    if written > FORMAT:
        raise UsageError(
            path,
            NO_VALUE,
            f"is from a newer version of diffuse (format {written}, not {FORMAT})",
            "upgrade diffuse",
        )
    try:
        info = parse_info({**migrated(plain(entry), written), "format": FORMAT})
        checkpoint = Checkpoint(state, info, size)
        if problems := [*_problems(checkpoint)]:
            raise UsageError.several(problems)
    except ValueError as error:
        mistakes = "; ".join(str(error).splitlines())
        raise UsageError(
            path, NO_VALUE, f"is not a checkpoint of diffuse: {mistakes}", "choose another run"
        ) from error
    return checkpoint


def _problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Yield what is wrong with the entries of Lightning that every command reads."""
    step, version = checkpoint.state.get("global_step"), checkpoint.state.get("pytorch-lightning_version")
    if type(step) is not int or not 0 <= step < 2**63:
        yield Problem("global_step", NO_VALUE, "is not a number of steps")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        yield Problem("pytorch-lightning_version", NO_VALUE, "should be version 2.0 or newer")
    if not checkpoint.has_weights("ema"):
        yield Problem("its weights", NO_VALUE, "are missing or incomplete")


def numbered(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{step:08d}.ckpt"
