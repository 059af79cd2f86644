"""The folders that this program writes to: nothing is written, or removed, through a link that leads out of them."""

import os
from collections.abc import Iterator
from pathlib import Path


def own_folder(root: Path, *names: str) -> Path:
    """Return the folder `root/names...`, to write to; it need not exist.

    `root` may be a link, for its user chose it. Raises ValueError if a folder from there on is a link that leads out of
    `root`, or if something in the folder is neither a file nor a folder: a pipe, whose reader or writer would wait.
    """
    folder = root.joinpath(*names)
    for depth in range(1, len(names) + 1):
        _check_inside(root, root.joinpath(*names[:depth]))
    for entry in _entries(folder):
        if entry.is_symlink():
            _check_inside(root, Path(entry.path))
        elif not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{entry.path}: is neither a file nor a folder; remove it")
    return folder


def _check_inside(root: Path, path: Path) -> None:
    """Raise ValueError if a path is a link that leads out of `root`; a link to a file is replaced, not followed."""
    if path.is_symlink() and not path.is_file() and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{path}: is a link that leads out of {root}; put a folder in its place, or link the whole of {root}"
        )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """All that lies in a folder and in its folders, none of them entered through a link."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path))
