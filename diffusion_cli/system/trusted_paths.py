"""Record of the paths that this user has named and the runs that this user has trained.

A checkpoint stores the paths of its data and of a frozen text encoder, and an untrusted checkpoint could name any
folder of the user. A path in a checkpoint is therefore read only if this user has trained on it or named it before.
Each such path leaves an empty file in `~/.local/state/diffuse/data` or `$XDG_STATE_HOME/diffuse/data`, named by the
SHA-256 of the full path. One elsewhere, such as a URL, leaves one in `names` beside it, by its name alone. Run folders
leave one in `runs`, and plugins one in `plugins`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PATHS = ("path", "masks", "source", "factory")
"""Dataset settings that are paths or functions."""
WEIGHTS = ("weights",)
"""Settings of a text encoder that are paths, or names on the Hugging Face Hub."""


def remember(node: Mapping[str, Any], keys: Sequence[str] = PATHS) -> None:
    """Record the paths in the settings of a dataset, or those of `keys`, if the state folder is writable."""
    with suppress(OSError, RuntimeError):  # no home folder, or a read-only one
        for key, path in _paths(node, keys).items():
            text = _named(node, key)
            _touch(_record(text))
            if _is_elsewhere(path):
                _touch(_record(text, "names"))


def remember_run(folder: Path) -> None:
    """Record a run folder as trained by this user, if the state folder is writable."""
    with suppress(OSError, RuntimeError):
        _touch(_record(str(folder), "runs"))


def is_own_run(folder: Path) -> bool:
    """Return whether this user has trained the run in a folder."""
    return _is_recorded(str(folder), "runs")


def remember_plugin(folder: Path, name: str) -> None:
    """Record a module as allowed by this user in a working folder, if the state folder is writable."""
    with suppress(OSError, RuntimeError):
        _touch(_record(f"{folder}/{name}", "plugins"))


def is_own_plugin(folder: Path, name: str) -> bool:
    """Return whether this user has allowed a module in a working folder."""
    return _is_recorded(f"{folder}/{name}", "plugins")


def unnamed(node: Mapping[str, Any], keys: Sequence[str] = PATHS) -> dict[str, str]:
    """Return the paths in the settings of a dataset, or those of `keys`, that this user has not named before."""
    return {
        key: path
        for key, path in _paths(node, keys).items()
        if not _is_recorded(text := _named(node, key))
        and not (_is_elsewhere(path) and _is_recorded(text, "names"))
    }


def _paths(node: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    return {key: node[key] for key in keys if isinstance(node.get(key), str)}


def _named(dataset: Mapping[str, Any], key: str) -> str:
    """Return what the user has named: a path, or a function with its arguments, which may be paths too."""
    arguments = dataset.get("arguments") if key == "factory" else None
    return (
        f"{dataset[key]}{json.dumps(arguments, sort_keys=True, default=str)}" if arguments else dataset[key]
    )


def _is_elsewhere(path: str) -> bool:
    """Return whether a path means the same in all folders: a URL, or a name that is no file here."""
    with suppress(OSError, RuntimeError, ValueError):  # too long, or no text for a path
        return "://" in path or not Path(path).expanduser().exists()
    return False


def _is_recorded(path: str, kind: str = "data") -> bool:
    with suppress(OSError, RuntimeError, ValueError):
        return _record(path, kind).is_file()
    return False


def _touch(record: Path) -> None:
    record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record.touch()


def _record(path: str, kind: str = "data") -> Path:
    text = path if kind == "names" else Path(path).expanduser().resolve()
    name = hashlib.sha256(os.fsencode(text)).hexdigest()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state, "diffuse", kind, name)
