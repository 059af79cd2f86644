"""Atomic writes and digests of files."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from diffusion_cli.errors import MachineError
from diffusion_cli.system.temporary_files import temporary_path

if TYPE_CHECKING:
    from numpy import ndarray

CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context that raises MachineError, with the file and a remedy, if the disk is full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise MachineError(
            f"{path}: cannot be written ({error.strerror}); free some space, or use a writable folder"
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context that yields a temporary path beside `path`, which replaces `path` atomically at the end.

    Raises OSError as `writing`, without a change to `path`.
    """
    temporary = temporary_path(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # such as a disk that became read-only
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Context that yields a temporary folder beside `path`, which becomes `path` at the end, or is removed.

    A folder that is replaced stays as it was if this fails or is interrupted.

    Raises FileExistsError if `path` exists by then and is not to be replaced, OSError as `writing`.
    """
    temporary, former = temporary_path(path), temporary_path(path)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            if os.path.lexists(path):
                if not replace:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
                path.rename(former)
            temporary.rename(path)
    finally:
        if former.exists() and not os.path.lexists(path):
            former.rename(path)  # nothing is removed if this fails too
        for left in (temporary, former):
            shutil.rmtree(left, ignore_errors=True)


def write_npy(path: Path, array: "ndarray") -> None:
    """Write an array as .npy, in parts of 16 MiB.

    numpy writes to files without the number of an error, such as that of a full disk; Python has it.
    """
    import numpy as np

    with path.open("wb") as file:
        parts: Any = SimpleNamespace(write=file.write)  # no file for numpy, so it writes parts by Python
        np.save(parts, array)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to a free name, `.damaged` or `.damagedN`, and return the new path."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in count())
    aside = next(name for name in names if not name.exists())
    return path.rename(aside)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
