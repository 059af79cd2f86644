"""Checksum verification of a memory-mapped array in a .npz, which is otherwise never read as a whole."""

from functools import lru_cache
from pathlib import Path
from threading import Thread

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.distributed import started
from diffusion_cli.system.untrusted import Archive, reason

AT_ONCE = 2**30  # bytes; larger arrays are verified in the background
PIECE = 2**22  # bytes per read


class MemberCheck:
    """Reads an archive member once to verify its CRC-32: small ones immediately, large ones in a thread."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._problem: str | None = None
        with Archive(path) as archive:
            size = archive.entries[name].file_size
        if size <= AT_ONCE:
            self._read()
        elif started().local_rank == 0:  # once per node
            Thread(target=self._read, name="checksum", daemon=True).start()

    def _read(self) -> None:
        try:
            with Archive(self._path) as archive, archive.open(self._name) as member:
                while member.read(PIECE):
                    pass
        except Exception as error:  # damaged archives raise errors of many types
            self._problem = reason(error)

    def require(self) -> None:
        """Raise UsageError if the member is damaged."""
        if self._problem is not None:
            raise UsageError(
                self._path, NO_VALUE, f"its images are damaged ({self._problem})", "copy or pack it again"
            )


def member_check(path: Path, name: str) -> MemberCheck:
    """Return the check of a member, one per process while size and time of the file stay the same."""
    status = path.stat()
    return _member_check(path, name, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _member_check(path: Path, name: str, size: int, time: int) -> MemberCheck:
    return MemberCheck(path, name)
