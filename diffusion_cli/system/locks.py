"""Locks of run folders and of files, on this machine or on a file system that several machines share.

A lock is a lease of filelock: a file, created atomically, whose modification time the holder renews every
`Heartbeat.beat` seconds. Its last line identifies the holder: host, machine, process id, start time and the
scheduler's job. A process that finds the file tests, in this order:

1. The holder runs on this machine: the process table shows whether it is alive.
2. The scheduler has restarted the holder's job: the earlier process has ended.
3. The file changes within `Heartbeat.patience`: the holder is alive, otherwise it is dead.

A process removes the file of a dead holder, then creates its own. filelock itself takes over a file only where
the file system can exchange two names, which NFS and Lustre cannot. A holder whose file was replaced ends at
once and saves nothing. Clocks of different machines are never compared.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.process_identity import has_ended, machine_id, start_time
from diffusion_cli.system.temporary_files import create_linked, remove_abandoned, temporary_path

if TYPE_CHECKING:
    from filelock import LeaseCompromise

LOCK = ".lock"
LONGEST = 4096  # bytes read of a lock file, which is untrusted
OURS = b"diffuse="  # start of the line that this program adds to the record of filelock


class Heartbeat(NamedTuple):
    """Times of a lock, in seconds of each machine's monotonic clock."""

    beat: float
    """Interval of the holder's heartbeat."""
    patience: float
    """Time without a heartbeat after which the holder counts as dead."""


PACE = Heartbeat(beat=10, patience=60)


@contextlib.contextmanager
def run_lock(folder: Path, pace: Heartbeat = PACE) -> Iterator[None]:
    """Context that locks a run folder; the folder is created if missing, and removed at the end if empty.

    Raises UsageError, which names the holder, if another process has the lock, or if the folder cannot be
    written.
    """

    def held(process: str) -> UsageError:
        problem = f"is being trained by {process}"
        return UsageError("name", folder.name, problem, "wait for that process, or end it")

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(folder, held, pace))
        except OSError as error:
            raise UsageError(
                "output_dir",
                folder.parent,
                f"cannot lock the run {folder.name} ({error})",
                "use a writable folder on a disk with free space",
            ) from error
        yield


@contextlib.contextmanager
def folder_lock(folder: Path, held: Callable[[str], UsageError], pace: Heartbeat = PACE) -> Iterator[None]:
    """Context that locks a folder, which is created if missing, and removed at the end if empty.

    Args:
        folder: the folder.
        held: returns the error to raise if another process has the lock, from words that describe that process.
        pace: times of the lock.

    Raises:
        UsageError: that of `held`.
        OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _Lock(folder / LOCK, pace)
        except _Held as other:
            raise held(_described(other.owner)) from other
        with lock:
            yield


@contextlib.contextmanager
def locked(path: Path, pace: Heartbeat = PACE) -> Iterator[None]:
    """Context that waits for the lock of a file, which processes of any machine may change.

    In a read-only folder nothing is locked, because no process can change the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _waited_for(path.with_name(f".{path.name}{LOCK}"), pace)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            raise
        lock = contextlib.nullcontext()
    with lock:
        yield


def holder(folder: Path) -> str | None:
    """Describe the process that has the lock of a run folder; None without a lock, or if that process has ended.

    A process of another machine may have ended without removing its lock.
    """
    owner = _owner(folder / LOCK)
    return None if not owner or _is_over(owner) else _described(owner)


def locking_job(folder: Path) -> str | None:
    """Return the number of the scheduler's job that locked a run folder, which may have ended; None without one."""
    job = _owner(folder / LOCK).get("job")
    return job if isinstance(job, str) else None


def _waited_for(path: Path, pace: Heartbeat) -> "_Lock":
    """Return a lock once its holder has released it; after a second, print the holder."""
    start, named = time.monotonic(), False
    while True:
        try:
            return _Lock(path, pace, quiet=named)
        except _Held as held:
            if not named and time.monotonic() - start > 1:
                print(f"diffuse: {path}: waiting for {_described(held.owner)}", file=sys.stderr)
                named = True
            time.sleep(1 if named else 0.05)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Held(Exception):
    """Another process has the lock."""

    def __init__(self, owner: dict[str, Any]) -> None:
        super().__init__(owner)
        self.owner = owner


class _Found(NamedTuple):
    """A lock file that a process has found."""

    state: tuple[int, int, int, int]
    """Changes with each heartbeat, and with another file."""
    owner: dict[str, Any]


class _Lock:
    """A lock of this process; _Held if another process has it, UsageError if the path is not a file."""

    def __init__(self, path: Path, pace: Heartbeat, quiet: bool = False) -> None:
        from filelock import SoftFileLease

        self.path, self.pace, self.quiet = path, pace, quiet
        self.mine = _whereabouts()
        self.over = threading.Event()
        self.lease = SoftFileLease(
            path, lease_duration=pace.patience, heartbeat_interval=pace.beat, on_compromise=self._lost,
            thread_local=False, blocking=False,
        )  # fmt: skip
        while not self._take():
            pass
        remove_abandoned(path.parent)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.lease.release()

    def _take(self) -> bool:
        """Create the file; if another process has created it, return False once that file is removed."""
        from filelock import LeaseSettingsMismatch, Timeout

        found = _look(self.path)
        # filelock compares host names, which machines may share.
        if found is None or found.owner.get("machine") == machine_id():
            try:
                self.lease.acquire()
            except (Timeout, LeaseSettingsMismatch):
                found = _look(self.path)
            else:
                self._sign()
                return True
        if found is not None:
            if found.owner.get("machine") != machine_id():
                self._watch(found)
            elif not _is_over(found.owner):
                raise _Held(found.owner)
            _remove(self.path, found)
        return False

    def _sign(self) -> None:
        """Add the identity of this process to the record of filelock, which ignores other lines."""
        try:
            with self.path.open("ab") as file:
                file.write(OURS + json.dumps(self.mine).encode() + b"\n")
        except OSError:
            self.lease.release()
            raise

    def _watch(self, found: _Found) -> None:
        """Return if the file stays unchanged, at once if the scheduler has restarted its job; _Held if it changes."""
        owner, mine = found.owner, self.mine
        if (
            mine["job"] is not None
            and owner.get("job") == mine["job"]
            and owner.get("restart") != mine["restart"]
        ):
            return
        who, start, named = _described(owner), time.monotonic(), self.quiet
        while time.monotonic() < start + self.pace.patience:
            time.sleep(min(1.0, self.pace.patience / 10))
            now = _look(self.path)
            if now is None:
                return
            if now.state != found.state:
                raise _Held(now.owner)
            if not named:
                print(
                    f"diffuse: {self.path}: locked by {who}; waiting {self.pace.patience:.0f} s for its heartbeat",
                    file=sys.stderr,
                )
                named = True
        print(f"diffuse: {self.path}: taken over from {who}, which sent no heartbeat", file=sys.stderr)

    def _lost(self, loss: "LeaseCompromise") -> None:
        """End this process if another has replaced the file; without a file, or if it cannot be renewed, go on."""
        if loss.reason != "owner-changed":
            why = getattr(loss.error, "strerror", loss.error)
            print(f"diffuse: {self.path}: heartbeat cannot be written ({why})", file=sys.stderr)
            while self._renew():
                if self.over.wait(self.pace.beat):
                    return
        # As after suspension of this machine. Save nothing: the folder is the other's.
        owner = _described(_owner(self.path))
        print(f"diffuse: {self.path}: taken over by {owner}; this process ends", file=sys.stderr)
        os._exit(1)

    def _renew(self) -> bool:
        """Renew the file if it is still there; return whether no other process has it."""
        owner = _owner(self.path)
        if owner == self.mine:
            with contextlib.suppress(OSError):
                os.utime(self.path)
        return owner in ({}, self.mine)


def _look(path: Path) -> _Found | None:
    """Return the lock file at a path, None without one; UsageError if there is something else."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UsageError(
                path, NO_VALUE, "is a link" if path.is_symlink() else "is not a file", "remove it"
            )
        with path.open("rb") as file:  # network file systems update their cache on open
            status, text = os.fstat(file.fileno()), file.read(LONGEST)
    except FileNotFoundError:
        return None
    state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return _Found(state, _parsed(text))


def _parsed(text: bytes) -> dict[str, Any]:
    """Return the identity of a holder in a lock file; {} without one. Earlier versions wrote nothing else."""
    try:
        owner = json.loads(text.partition(b"\n" + OURS)[2] or text)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _owner(path: Path) -> dict[str, Any]:
    """Return the identity of the holder of a lock; {} without a readable lock file."""
    with contextlib.suppress(OSError, UsageError):
        if found := _look(path):
            return found.owner
    return {}


def _remove(path: Path, found: _Found) -> None:
    """Remove the lock file of a dead holder, but not one that another process has created meanwhile."""
    now = _look(path)
    if now is None or now.state != found.state:
        return
    aside = temporary_path(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)  # of several processes, one gets the file
        now = _look(aside)
        if now is not None and now.state != found.state:
            create_linked(aside, path)
        aside.unlink()


def _is_over(owner: dict[str, Any]) -> bool:
    return has_ended(owner.get("machine"), owner.get("pid"), owner.get("start"))


def _whereabouts() -> dict[str, Any]:
    """Return the identity of this process: machine, process id, start time, scheduler job and restarts."""
    return {
        "host": socket.gethostname(),
        "machine": machine_id(),
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _described(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    job = f" (job {owner['job']})" if owner.get("job") else ""
    words = f"process {owner['pid']} on host {owner.get('host')}{job}, since {owner.get('since')}"
    return "".join(letter for letter in words[:200] if letter.isprintable())
