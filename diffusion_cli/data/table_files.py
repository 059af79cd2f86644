"""Image files that a table names instead of storing their bytes; only files of the dataset itself are read."""

import os.path
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import fsspec

from diffusion_cli.errors import FormatError
from diffusion_cli.system.untrusted import LARGEST, read

ARCHIVES = {"zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd"}
"""Protocols of fsspec for a file in an archive, written as zip://name::archive."""
REPOSITORY = "hf://datasets/"


class Origin(NamedTuple):
    """The places of a dataset's own files; can be pickled.

    Args:
        folders: absolute paths.
        urls: regular expression for the start of a URL; None: no URL is allowed.
    """

    folders: tuple[str, ...]
    urls: str | None

    def content(self, value: Any) -> bytes:
        """Return the bytes of an image as the library stores it: in the table, in a file, or at a URL.

        Raises:
            FormatError: there is no image, it is too large, or the table names a file outside of the dataset.
        """
        if not isinstance(value, dict):
            raise FormatError("has no image")
        if value.get("bytes") is not None:
            return value["bytes"]
        path = value.get("path")
        if not path:
            raise FormatError("has no image")
        if "://" not in path:
            path = _absolute(path)
            self._check_folder(path)
            return read(Path(path))
        *members, place = path.split("::")
        if any(member.partition("://")[0] not in ARCHIVES for member in members):
            raise _outside(path)
        self._check_url(place)
        files, name = fsspec.url_to_fs(path)
        with files.open(name) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise FormatError(f"is larger than {LARGEST} bytes")
        return content

    def _check_folder(self, path: str) -> None:
        if not any(Path(path).is_relative_to(folder) for folder in self.folders):
            raise _outside(path)

    def _check_url(self, url: str) -> None:
        if ".." in PurePosixPath(unquote(url)).parts:
            raise _outside(url)
        if "://" not in url or url.startswith("file://"):
            self._check_folder(_absolute(url.removeprefix("file://")))
        elif self.urls is None or not re.match(self.urls, url):
            raise _outside(url)


def _absolute(path: str | Path) -> str:
    """Return an absolute path without "..": links in it are followed where it is read, and not before."""
    return os.path.normpath(Path(path).absolute())


def _outside(path: str) -> FormatError:
    return FormatError(f"is at {path[:200]}, outside of the dataset; store the images in the table")


def origin(path: str, caches: Iterable[Path]) -> Origin:
    """Return the places of the files of a dataset: its folder, repository or site, and the caches of the library.

    Args:
        path: local path, pattern, URL, or name on the Hub.
        caches: folders of downloaded and unpacked files.
    """
    place = path.rpartition("::")[2].removeprefix("file://")
    folders = [_absolute(cache) for cache in caches]
    if "://" not in place:
        local = Path(place).expanduser()
        if local.is_dir() or local.is_file() or set(place) & set("*?["):
            own = local if local.is_dir() else local.parent
            if not local.exists():  # a pattern
                own = Path(re.split(r"[*?[]", f"{local}")[0] + "_").parent
            return Origin((*folders, _absolute(own), f"{own.resolve()}"), None)
        owner = "" if "/" in place else "([^/]+/)?"
        return Origin(tuple(folders), f"{REPOSITORY}{owner}{re.escape(place)}[@/]")
    if place.startswith(REPOSITORY):
        name = "/".join(place.removeprefix(REPOSITORY).split("/")[:2]).partition("@")[0]
        return Origin(tuple(folders), f"{REPOSITORY}{re.escape(name)}[@/]")
    site = re.match(r"[^:]+://[^/]+/", place)
    start = re.split(r"[*?[]", place)[0].rpartition("/")[0]
    return Origin(tuple(folders), re.escape(f"{start}/") if site else None)
