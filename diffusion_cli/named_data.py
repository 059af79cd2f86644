"""The data that this user has named: a path in a checkpoint is read only if it is among it.

A checkpoint stores where its data lay, and one from a stranger could name any folder of its reader. Each path that
somebody trains on, or names for a run, leaves an empty file in `~/.local/state/diffuse/data`, or in
`$XDG_STATE_HOME/diffuse/data`. The SHA-256 of the full path is its name.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PATHS = ("path", "masks")
"""The settings of datasets that are paths."""


def remember(dataset: Mapping[str, Any]) -> None:
    """Record the paths of a dataset as named by this user; without a folder to write to, nothing is recorded."""
    with suppress(OSError, RuntimeError):  # no home folder, or a read-only one
        for path in _paths(dataset).values():
            record = _record(path)
            record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            record.touch()


def unnamed(dataset: Mapping[str, Any]) -> dict[str, str]:
    """The paths of a dataset, by setting, that this user has not named before."""
    return {key: path for key, path in _paths(dataset).items() if not _is_recorded(path)}


def _paths(dataset: Mapping[str, Any]) -> dict[str, str]:
    return {key: dataset[key] for key in PATHS if isinstance(dataset.get(key), str)}


def _is_recorded(path: str) -> bool:
    with suppress(OSError, RuntimeError, ValueError):
        return _record(path).is_file()
    return False


def _record(path: str) -> Path:
    name = hashlib.sha256(os.fsencode(Path(path).expanduser().resolve())).hexdigest()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state, "diffuse", "data", name)
