"""Checks of output folders: nothing is written or removed through a link to a place outside."""

import stat
from collections.abc import Iterator
from pathlib import Path

from diffusion_cli.errors import NO_VALUE, UsageError


def own_folder(root: Path, *names: str) -> Path:
    """Return the output folder `root/names...`, which need not exist.

    `root` may be a link, because the user chose it. Raises UsageError if a folder below is a link to a place
    outside `root`, or if the folder contains a pipe, a socket or a device, which could block forever. Other
    tasks may rename and remove files meanwhile.
    """
    folder = root.joinpath(*names)
    for depth in range(1, len(names) + 1):
        _check_inside(root, root.joinpath(*names[:depth]))
    for path, mode in _entries(folder):
        if stat.S_ISLNK(mode):
            _check_inside(root, path)
        elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UsageError(path, NO_VALUE, "is neither a file nor a folder", "remove it")
    return folder


def _check_inside(root: Path, path: Path) -> None:
    """Raise UsageError if a path is a link outside `root`, except to a file: writes replace such a link."""
    if path.is_symlink() and not path.is_file() and not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            path,
            NO_VALUE,
            f"is a link to a place outside {root}",
            f"replace it with a folder, or make {root} itself the link",
        )


def _entries(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield all entries of a folder and its subfolders with their modes, without following links."""
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in paths:
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # renamed or removed by another task
            continue
        yield path, mode
        if stat.S_ISDIR(mode):
            yield from _entries(path)
