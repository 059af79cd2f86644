"""The temporary files beside those that are being written, and the removal of those that killed processes left.

A temporary file is named `.NAME.PID-HEX.tmp`. HEX begins with the `machine_id` of the writer, so that a later process
of the same machine finds out whether the writer has ended. Files of other machines are removed after `EXPIRY` seconds,
those of this machine only once their writer has ended.
"""

import errno
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from diffusion_cli.system.process_identity import has_ended, machine_id

EXPIRY = 3600.0
"""Seconds without a change after which the temporary file of another machine is abandoned."""
NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})
NAME = re.compile(r"\..+\.(\d{1,10})-([0-9a-f]{8}(?:[0-9a-f]{8})?)\.tmp", re.DOTALL)


def temporary_path(path: Path) -> Path:
    """A new name beside `path`, which no other process uses and nobody can guess."""
    return path.with_name(f".{path.name}.{os.getpid()}-{machine_id()}{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of a temporary file of this program."""
    return NAME.fullmatch(path.name) is not None


def create_linked(temporary: Path, path: Path) -> bool:
    """Give a complete temporary file a second name that is new, in one step; False if there is a file of that name.

    Where a file system has no hard links, the file is moved if its name is free a moment before.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            return False
        temporary.replace(path)
    return True


def remove_abandoned(*folders: Path) -> None:
    """Remove the temporary files directly in the folders that no process will finish."""
    for folder in folders:
        with suppress(OSError):  # a folder that is not there, or may not be read
            for path in filter(is_temporary, folder.iterdir()):
                with suppress(OSError):  # removed by another process, or on a read-only disk
                    if _is_abandoned(path):
                        path.unlink()


def _is_abandoned(path: Path) -> bool:
    status, match = path.lstat(), NAME.fullmatch(path.name)
    if match is None or not stat.S_ISREG(status.st_mode):
        return False
    pid, digits = match.groups()
    machine = digits[:8] if len(digits) == 16 else None  # earlier versions wrote eight random digits
    if machine == machine_id():
        return has_ended(machine, int(pid))
    return time.time() - status.st_mtime > EXPIRY
