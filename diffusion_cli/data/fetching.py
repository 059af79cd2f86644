"""Listing and download of published files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.system.downloads import DownloadError, NoConnectionError, PublishedFile


class FileState(NamedTuple):
    """A published file on this machine, as programs read it."""

    state: str
    """present (and verified), unpacked (not verified), damaged, missing, fetched, or absent (optional)."""
    path: str
    size: int | None
    """Size in bytes; None if unknown."""
    checksum: str
    source: str

    def __str__(self) -> str:
        size = "size unknown" if self.size is None else f"{self.size / 1e6:.1f} MB"
        checksum = f"{self.checksum} not verified" if self.state == "unpacked" else self.checksum
        return f"{self.state:<8}  {self.path}\n          {size}, {checksum}, {self.source}"


class FilesAction(ABC):
    """Base class of actions of `diffuse data` on the published files of a dataset, features and metrics."""

    def __call__(self, files: Sequence[PublishedFile], as_json: bool = False) -> bool:
        """Process the files, and print one entry for each; return whether all of them are here.

        Raises:
            UsageError: with one problem for each file that cannot be downloaded, for each unreachable server, and for
                each package that is not installed.
        """
        found: list[FileState] = []
        problems: list[Problem] = []
        unreachable: set[str] = set()
        for file in files:
            try:
                if urlsplit(file.source).netloc in unreachable and file.state() in ("missing", "damaged"):
                    continue
                state = self.process(file)
            except UsageError as error:
                problems += error.problems
                continue
            except DownloadError as error:
                remedy = file.by_hand
                if isinstance(error, NoConnectionError):
                    unreachable.add(urlsplit(file.source).netloc)
                    remedy = f"run this command on a machine with a network, and copy {file.to_copy}"
                problems.append(Problem(file.source, NO_VALUE, f"cannot be downloaded ({error})", remedy))
                continue
            size = file.path.stat().st_size if file.path.is_file() else file.size
            found.append(FileState(state, str(file.path), size, file.checksum, file.source))
            if not as_json:
                print(found[-1], flush=True)
        if as_json:
            print(json.dumps([each._asdict() for each in found], indent=2))
        if problems:
            raise UsageError.several(problems)
        return all(each.state not in ("missing", "damaged") for each in found)

    @abstractmethod
    def process(self, file: PublishedFile) -> str:
        """Process one file and return its state; DownloadError if it cannot be downloaded."""


class ListFiles(FilesAction):
    """Prints whether each file is here, its size, checksum, path and URL. Needs no network."""

    def process(self, file: PublishedFile) -> str:
        return file.state()


class Fetch(FilesAction):
    """Downloads the files that are missing or damaged, and verifies all but those that are unpacked."""

    def process(self, file: PublishedFile) -> str:
        state = file.state()
        if state in ("missing", "damaged"):
            file.fetch()
            return "absent" if file.state() == "absent" else "fetched"
        return state
