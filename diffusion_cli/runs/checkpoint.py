"""Checkpoints: written atomically, and read without running code.

A checkpoint is a Lightning checkpoint with an additional entry `diffuse` of plain data (`CheckpointInfo`). The run
folder of a latent model also contains its autoencoder.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.config.values import Weights
from diffusion_cli.errors import NO_VALUE, FormatError, MachineError, Problem, UsageError
from diffusion_cli.runs.migrate import FORMAT, OLDEST, migrated, migrated_config
from diffusion_cli.runs.schema import CheckpointInfo, parse_info
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.tensors import load_checked
from diffusion_cli.system.untrusted import check_sums, check_tensors, plain, reason, regular

LAST = Path("checkpoints", "last.ckpt")

BEST = LAST.with_name("best.ckpt")

EMA_KEY = "EMA"
"""Key of the averaged weights among the states of callbacks."""

# Checkpoints of Lightning before 2.0 are rejected, because Lightning migrates them without validation.
VERSION = re.compile(
    r"(?:[2-9]|[1-9]\d)(?:\.\d{1,9}){1,3}(?:\.?(?:a|b|rc|dev|post)\d{0,9}){0,3}(?:\+[a-z0-9.]{1,40})?"
)


class DamagedError(UsageError):
    """A file is damaged or not a valid checkpoint."""


@contextlib.contextmanager
def _whole_checkpoint(path: Path) -> Iterator[Path]:
    """An `atomic_write` that replaces the target durably, after a checksum test of the bytes on disk."""
    with atomic_write(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # drop the page cache, so that the test reads from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            _check_sums(temporary)
        except DamagedError as error:
            raise MachineError(
                f"{path}: reading it back gave other bytes than were written; use a folder on another disk"
            ) from error
    if os.name == "posix":  # make the rename durable too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically; OSError as `atomic_write`."""
    with _whole_checkpoint(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides the error of the file system
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def copy_checkpoint(checkpoint: Path, path: Path) -> None:
    """Copy a checkpoint atomically; not a link, so that damage to one file does not affect the other."""
    with _whole_checkpoint(path) as temporary:
        shutil.copyfile(checkpoint, temporary)


def _check_sums(path: Path) -> None:
    """Verify the checksums of a checkpoint, which torch ignores; DamagedError if one is wrong."""
    try:
        check_sums(path)
    except FormatError as error:
        raise _damaged(path, reason(error)) from error


def _damaged(path: Path, why: str) -> DamagedError:
    return DamagedError(
        path, NO_VALUE, f"invalid or damaged checkpoint ({why})", "choose another step= or another run"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    state: dict[str, Any]
    """Entries of Lightning, by name."""
    info: CheckpointInfo
    size: int
    """Bytes of the file."""

    @property
    def step(self) -> int:
        """Number of optimizer steps."""
        return self.state["global_step"]

    @property
    def lightning_version(self) -> str:
        """Version of Lightning that wrote the checkpoint."""
        return self.state["pytorch-lightning_version"]

    def weights(self, kind: Weights) -> dict[str, Tensor]:
        """Return the weights of the network, by parameter name."""
        if kind == "ema":
            return self.state["callbacks"][EMA_KEY]["network"]
        prefix = "model.network."
        state = self.state["state_dict"]
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def has_weights(self, kind: Weights) -> bool:
        """Return whether the weights exist and are not larger than the file.

        In an untrusted file, tensors of any size and number can share a few bytes.
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
        path: file of the checkpoint.
        sums: verify the checksums; without it, tensors are memory-mapped and not read.

    Raises:
        DamagedError: if the file is damaged.
        UsageError: if it is not a checkpoint of `diffuse`, or of a newer version.
    """
    try:
        size = regular(path)
    except FormatError as error:
        raise _damaged(path, reason(error)) from error
    try:
        check_tensors(path)
        if sums:
            _check_sums(path)
        state = load_checked(path, mmap=True)
    except DamagedError:
        raise
    except Exception as error:  # the ZIP and pickle parsers raise many types of errors for damaged files
        raise _damaged(path, reason(error)) from error
    entry = state.get("diffuse") if isinstance(state, dict) else None
    # The type check must come first: comparing a huge tensor with a number would be very slow.
    written = entry.get("format") if isinstance(entry, dict) else None
    if type(written) is not int:
        raise UsageError(path, NO_VALUE, "is not a checkpoint that diffuse can read", "choose another run")
    if written < OLDEST:
        problem = f"has format {written}, and this version reads formats {OLDEST} to {FORMAT}"
        raise UsageError(path, NO_VALUE, problem, "train the run again, or use the version that made it")
    if written > FORMAT:
        raise UsageError(
            path,
            NO_VALUE,
            f"is from a newer version of diffuse (format {written}, not {FORMAT})",
            "upgrade diffuse",
        )
    try:
        entry = migrated(plain(entry), written)
        info = parse_info({**entry, "config": migrated_config(entry.get("config"), FORMAT), "format": FORMAT})
        checkpoint = Checkpoint(state, info, size)
        if problems := [*_problems(checkpoint)]:
            raise UsageError.several(problems)
    except ValueError as error:
        raise UsageError(
            path, NO_VALUE, f"is not a valid checkpoint of diffuse ({reason(error)})", "choose another run"
        ) from error
    return checkpoint


def _problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Yield the problems of the Lightning entries that every command reads."""
    step, version = checkpoint.state.get("global_step"), checkpoint.state.get("pytorch-lightning_version")
    if type(step) is not int or not 0 <= step < 2**63:
        yield Problem("global_step", NO_VALUE, "is not a number of steps")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        yield Problem("pytorch-lightning_version", NO_VALUE, "must be version 2.0 or newer")
    if not checkpoint.has_weights("ema"):
        yield Problem("its weights", NO_VALUE, "are missing or incomplete")


def numbered(step: int) -> str:
    """Return the file name of the checkpoint of a step."""
    return f"step_{step:08d}.ckpt"
