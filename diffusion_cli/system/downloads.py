"""Published files of weights and datasets: their place, their checksum, and their download."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from diffusion_cli.errors import MachineError
from diffusion_cli.system.files import atomic_write, writing
from diffusion_cli.system.progress import ProgressBar

STALL = 15.0
"""Seconds without response until a download fails; the default waits forever."""
BLOCK = 2**20
"""Bytes read at a time."""
State = Literal["present", "unpacked", "damaged", "missing", "absent"]
"""State of a file: verified, replaced by its content, with another checksum, not here, or optional and unpublished."""


class DownloadError(Exception):
    """Why a file cannot be downloaded, in one line."""


class NoConnectionError(DownloadError):
    """The server cannot be reached."""


class PublishedFile(ABC):
    """A file that a program publishes, and its place on this machine."""

    source: str
    """URL of the file."""
    path: Path
    """Where the loaders look for it."""
    checksum: str
    """Algorithm and the hexadecimal digest or its first digits, for example `md5 c58f3010`."""
    size: int | None
    """Size in bytes; None if unknown."""

    @property
    def to_copy(self) -> Path:
        """File or folder to copy from a machine that has the file."""
        return self.path

    @property
    def by_hand(self) -> str:
        """How to get the file if its server does not give it."""
        return f"get the file by hand and put it at {self.path}"

    @abstractmethod
    def state(self) -> State:
        """Return whether the file is here and has its checksum, which unpacked files lack. Needs no network.

        Raises UsageError, as the other members may, if a package is not installed that finds the file.
        """

    @abstractmethod
    def fetch(self) -> None:
        """Download the file to its place and verify it.

        Raises:
            DownloadError: the server has another content, or none; NoConnectionError: it cannot be reached.
            MachineError: the file cannot be written.
        """


@dataclass(frozen=True)
class WebFile(PublishedFile):
    """A file at a URL.

    Args:
        source: URL.
        path: path of the file on this machine.
        checksum: algorithm and the first digits of the digest.
        size: size in bytes.
        unpacked: file or folder that replaces the file once it is unpacked, or None.
    """

    source: str
    path: Path
    checksum: str
    size: int | None = None
    unpacked: Path | None = None

    def state(self) -> State:
        if self.path.is_file():
            return "present" if self._matches(self.path) else "damaged"
        return "unpacked" if self.unpacked is not None and self.unpacked.exists() else "missing"

    def fetch(self) -> None:
        request = Request(self.source, headers={"User-Agent": "diffuse"})
        with atomic_write(self.path) as temporary:
            try:
                self._download(request, temporary)
            except MachineError:
                raise
            except (HTTPError, HTTPException, ValueError) as error:
                raise DownloadError(_one_line(error)) from error
            except OSError as error:
                raise NoConnectionError(_one_line(error)) from error
            if not self._matches(temporary):
                raise DownloadError(f"the content does not have the checksum {self.checksum}")

    def _download(self, request: Request, path: Path) -> None:
        """Write the reply to a request to a file."""
        bar = ProgressBar(total=self.size, desc=self.path.name, unit="B", unit_scale=True, delay=1.0)
        with urlopen(request, timeout=STALL) as reply, bar, path.open("wb") as file:
            while block := reply.read(BLOCK):
                with writing(self.path):
                    file.write(block)
                bar.update(len(block))

    def _matches(self, path: Path) -> bool:
        algorithm, _, digits = self.checksum.partition(" ")
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest().startswith(digits)


def _one_line(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
