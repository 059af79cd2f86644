"""Listing and download of published files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from urllib.parse import urlsplit

from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.system.downloads import DownloadError, NoConnectionError, PublishedFile


class FilesAction(ABC):
    """Base class of actions of `diffuse data` on the published files of a dataset, features and metrics."""

    @abstractmethod
    def __call__(self, files: Sequence[PublishedFile]) -> None:
        """Process the files, and print one entry for each.

        Raises:
            UsageError: with one problem for each file that cannot be downloaded, or for each unreachable server.
        """


class ListFiles(FilesAction):
    """Prints whether each file is here, its size, checksum, path and URL. Needs no network."""

    def __call__(self, files: Sequence[PublishedFile]) -> None:
        for file in files:
            print(_described(file, file.state()))


class Fetch(FilesAction):
    """Downloads the files that are missing or damaged, and verifies all of them."""

    def __call__(self, files: Sequence[PublishedFile]) -> None:
        problems: list[Problem] = []
        unreachable: set[str] = set()
        for file in files:
            state, server = str(file.state()), urlsplit(file.source).netloc
            if state in ("missing", "damaged"):
                if server in unreachable:
                    continue
                try:
                    file.fetch()
                except DownloadError as error:
                    if isinstance(error, NoConnectionError):
                        unreachable.add(server)
                    remedy = f"run this command on a machine with a network, and copy {file.to_copy}"
                    problems.append(Problem(file.source, NO_VALUE, f"cannot be downloaded ({error})", remedy))
                    continue
                state = "fetched"
            print(_described(file, state), flush=True)
        if problems:
            raise UsageError.several(problems)


def _described(file: PublishedFile, state: str) -> str:
    """Return two lines about a file."""
    size = file.path.stat().st_size if file.path.is_file() else file.size
    shown = "size unknown" if size is None else f"{size / 1e6:.1f} MB"
    return f"{state:<8}  {file.path}\n          {shown}, {file.checksum}, {file.source}"
