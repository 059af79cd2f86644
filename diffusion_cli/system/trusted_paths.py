"""The data that this user has named, and the runs that this user has trained.

A path in a checkpoint is read only if it is among that data.

A checkpoint stores where its data lay, and one from a stranger could name any folder of its reader. Each path that
somebody trains on, or names for a run, leaves an empty file in `~/.local/state/diffuse/data`, or in
`$XDG_STATE_HOME/diffuse/data`. The SHA-256 of the full path is its name. Runs leave one in `runs` beside it.
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
            _touch(_record(path))


def remember_run(folder: Path) -> None:
    """Record the folder of a run as trained by this user; without a folder to write to, nothing is recorded."""
    with suppress(OSError, RuntimeError):
        _touch(_record(str(folder), "runs"))


def is_own_run(folder: Path) -> bool:
    """Whether this user has trained a run in this folder before."""
    return _is_recorded(str(folder), "runs")


def unnamed(dataset: Mapping[str, Any]) -> dict[str, str]:
    """The paths of a dataset, by setting, that this user has not named before."""
    return {key: path for key, path in _paths(dataset).items() if not _is_recorded(path)}


def _paths(dataset: Mapping[str, Any]) -> dict[str, str]:
    return {key: dataset[key] for key in PATHS if isinstance(dataset.get(key), str)}


def _is_recorded(path: str, kind: str = "data") -> bool:
    with suppress(OSError, RuntimeError, ValueError):
        return _record(path, kind).is_file()
    return False


def _touch(record: Path) -> None:
    record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record.touch()


def _record(path: str, kind: str = "data") -> Path:
    name = hashlib.sha256(os.fsencode(Path(path).expanduser().resolve())).hexdigest()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state, "diffuse", kind, name)
