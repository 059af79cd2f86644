"""The checksum of a stored member of a .npz, which nobody else reads to its end because it is mapped into memory."""

from functools import lru_cache
from pathlib import Path
from threading import Thread

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.distributed import started
from diffusion_cli.system.untrusted import Archive, reason

AT_ONCE = 2**30  # bytes of a member that is checked before its first use, a larger one while it is used
PIECE = 2**22  # bytes read at a time


class MemberCheck:
    """Reads a member once and compares it with its CRC-32: small ones at once, large ones in a thread."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._problem: str | None = None
        with Archive(path) as archive:
            size = archive.entries[name].file_size
        if size <= AT_ONCE:
            self._read()
        elif started().local_rank == 0:  # the others would read the same bytes
            Thread(target=self._read, name="checksum", daemon=True).start()

    def _read(self) -> None:
        try:
            with Archive(self._path) as archive, archive.open(self._name) as member:
                while member.read(PIECE):
                    pass
        except Exception as error:  # damaged archives fail in many ways
            self._problem = reason(error)

    def require(self) -> None:
        """Raise UsageError if the member was found damaged."""
        if self._problem is not None:
            raise UsageError(
                self._path, NO_VALUE, f"its images are damaged ({self._problem})", "copy or pack it again"
            )


def member_check(path: Path, name: str) -> MemberCheck:
    """The check of a member, made once in a process as long as size and time of the file stay the same."""
    status = path.stat()
    return _member_check(path, name, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _member_check(path: Path, name: str, size: int, time: int) -> MemberCheck:
    return MemberCheck(path, name)
