"""Temporary files of atomic writes, and the removal of those that killed processes left.

A temporary file is named `.NAME.PID-HEX.tmp`. HEX begins with the `machine_id` of the writer, so that a later
process on the same machine can check whether the writer has ended. Files of this machine are removed once
their writer has ended, those of other machines after `EXPIRY` seconds.
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
"""Seconds without a change after which a temporary file of another machine counts as abandoned."""
NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})
NAME = re.compile(r"\..+\.(\d{1,10})-([0-9a-f]{8}(?:[0-9a-f]{8})?)\.tmp", re.DOTALL)


def temporary_path(path: Path) -> Path:
    """Return a new path beside `path` that no other process uses or can guess."""
    return path.with_name(f".{path.name}.{os.getpid()}-{machine_id()}{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of a temporary file of this program."""
    return NAME.fullmatch(path.name) is not None


def create_linked(temporary: Path, path: Path) -> bool:
    """Link a complete temporary file to a new name atomically; return False if the name exists.

    On file systems without hard links, the file is moved if the name was free just before.
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
    """Remove abandoned temporary files directly in the folders."""
    for folder in folders:
        with suppress(OSError):  # a missing or unreadable folder
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
