"""Errors of the operating system in one line, with the key that gave the path, and a remedy."""

import errno
import os
from pathlib import Path
from typing import Any

from diffusion_cli.config.runs import flatten
from diffusion_cli.config.values import PATH_KEYS, Node
from diffusion_cli.errors import MachineError

THROUGH_A_FILE = (errno.ENOTDIR, errno.EEXIST)
"""Numbers of errors about a folder on the way to the path."""
REMEDIES = {
    errno.EACCES: "check its permissions, or use another path",
    errno.EPERM: "check its permissions, or use another path",
    errno.EROFS: "use a writable folder",
    errno.ENOSPC: "free some space, or use another disk",
} | dict.fromkeys(THROUGH_A_FILE, "use a path of which no part is a file")
"""Remedies by the number of the error."""


def system_error(error: OSError, config: Node) -> MachineError:
    """Return an error of the operating system as one line.

    Args:
        error: the error.
        config: configuration of the command; the line names its key whose path contains the file of the error.
    """
    if not isinstance(error.filename, str | bytes):  # none, or the number of an open file
        remedy = REMEDIES.get(error.errno or 0, "set DIFFUSE_TRACEBACK=1 to see where")
        return MachineError(f"{error.strerror}; {remedy}")
    place = Path(os.fsdecode(error.filename))
    paths = {key: value for key, value in flatten(config).items() if _names(key, value, place, error.errno)}
    key = max(paths, key=lambda name: len(paths[name]), default=None)
    reason = f"{error.strerror}: {place}" if key and str(place) != paths[key] else error.strerror
    subject = f"{key}={paths[key]}" if key else place
    remedy = REMEDIES.get(error.errno or 0, "use another path")
    return MachineError(f"{subject}: cannot be used ({reason}); {remedy}")


def _names(key: str, value: Any, place: Path, number: int | None) -> bool:
    """Return whether the value of a key is a path that contains a file, or has it as a part that is no folder."""
    if key.rpartition(".")[2] not in PATH_KEYS or not isinstance(value, str):
        return False
    path = Path(value)
    through = number in THROUGH_A_FILE and path.is_relative_to(place)
    return bool(path.parts and place.parts) and (place.is_relative_to(path) or through)
