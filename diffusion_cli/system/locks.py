"""Locks on file systems that several machines share, with or without flock.

A lock is a file, created atomically with its content (a hard link, else O_CREAT | O_EXCL), so that exactly
one process creates it. Its JSON identifies the holder: host, machine, process id, start time and the
scheduler's job. It also has a counter, `beat`, which the holder increments every `Heartbeat.beat` seconds. A
process that finds the file tests, in this order:

1. Another process has the flock of the file: the holder is alive.
2. The holder runs on this machine: the process table shows whether it is alive.
3. The scheduler has restarted the holder's job: the earlier process has ended.
4. The counter changes within `Heartbeat.patience`: the holder is alive, otherwise it is dead.

A process overwrites the file of a dead holder. If neither flock nor the scheduler rules out that two
processes do so at once, each waits `Heartbeat.settle` seconds, and has the lock if the file still contains
its token. A holder that finds another token in its file ends at once and saves nothing. Clocks of different
machines are never compared.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:
    fcntl = None

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.process_identity import boot_id, has_ended, is_running, machine_id, start_time
from diffusion_cli.system.temporary_files import NO_LINKS, remove_abandoned, temporary_path

LOCK = ".lock"
LONGEST = 4096  # bytes read of a lock file, which is untrusted


class Heartbeat(NamedTuple):
    """Times of a lock, in seconds of each machine's monotonic clock."""

    beat: float
    """Interval of the holder's heartbeat."""
    patience: float
    """Time without a heartbeat after which the holder counts as dead."""
    settle: float
    """Time in which a competing process would overwrite the lock."""


PACE = Heartbeat(beat=10, patience=60, settle=2)


@contextlib.contextmanager
def run_lock(folder: Path, pace: Heartbeat = PACE) -> Iterator[None]:
    """Context that locks a run folder; the folder is created if missing, and removed at the end if empty.

    Raises UsageError, which names the holder, if another process has the lock, or if the folder cannot be
    written.
    """
    if fcntl is None:  # Windows
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _Lock(folder / LOCK, pace)
        except _Held as held:
            raise UsageError(
                "name",
                folder.name,
                f"is being trained by {_described(held.owner)}",
                "wait for that process, or end it",
            ) from held
        except OSError as error:
            if error.errno == errno.ELOOP and (folder / LOCK).is_symlink():
                raise UsageError(folder / LOCK, NO_VALUE, "is a link", "remove it") from error
            raise UsageError(
                "output_dir",
                folder.parent,
                f"cannot lock the run {folder.name} ({error})",
                "use a writable folder on a disk with free space",
            ) from error
        with lock:
            yield


@contextlib.contextmanager
def locked(path: Path, pace: Heartbeat = PACE) -> Iterator[None]:
    """Context that waits for the lock of a file, which processes of any machine may change.

    In a read-only folder nothing is locked, because no process can change the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:  # Windows
        yield
        return
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
    try:
        owner = _owner(folder / LOCK)
    except OSError:
        return None
    ended = has_ended(owner.get("machine"), owner.get("pid"), owner.get("start"))
    return None if not owner or ended else _described(owner)


def locking_job(folder: Path) -> str | None:
    """Return the number of the scheduler's job that locked a run folder, which may have ended; None without one."""
    try:
        job = _owner(folder / LOCK).get("job")
    except OSError:
        return None
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


_descriptors: set[int] = set()


def _leave_to_the_parent() -> None:
    """Close the locks in a forked process, which could keep them longer than its parent."""
    while _descriptors:
        os.close(_descriptors.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class _Held(Exception):
    """Another process has the lock."""

    def __init__(self, owner: dict[str, Any]) -> None:
        super().__init__(owner)
        self.owner = owner


class _Lock:
    """A lock of this process; _Held if another process has it, UsageError if the path is not a file."""

    def __init__(self, path: Path, pace: Heartbeat, quiet: bool = False) -> None:
        self.path, self.pace, self.quiet = path, pace, quiet
        self.mine: dict[str, Any] = {
            **_whereabouts(),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self.descriptor = -1
        while not (self._take_over() if os.path.lexists(path) else self._create()):
            pass
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # the folder may have been removed
            if self._read().get("token") == self.mine["token"]:
                self.path.unlink()
        self._close()

    def _create(self) -> bool:
        """Create the file with its content; return False if another process created it first."""
        temporary = temporary_path(self.path)
        try:
            self._write_new(temporary)
            os.link(temporary, self.path)
            remove_abandoned(self.path.parent)
        except FileExistsError:
            self._close()
            return False
        except OSError as error:
            self._close()
            if error.errno in NO_LINKS:
                return self._create_without_links()
            error.filename, error.filename2 = str(self.path), None
            raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return True

    def _create_without_links(self) -> bool:
        try:
            self._write_new(self.path)
        except FileExistsError:
            return False
        except OSError:
            self._close()
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _write_new(self, path: Path) -> None:
        self._have(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
        self._flock()
        self._write()

    def _take_over(self) -> bool:
        """Take over the file of a dead holder; return False if it is gone; _Held if the holder is alive."""
        try:
            # Not through a link, which may point to a user's file; without waiting on a pipe.
            self._have(os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK))
            if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
                raise UsageError(self.path, NO_VALUE, "is not a file", "remove it")
            kernel = self._flock()
            if not os.path.samestat(os.fstat(self.descriptor), self.path.lstat()):
                raise FileNotFoundError(self.path)
            alone = self._outlived(kernel)
            self._write()
            if not alone:
                self._settle()
        except FileNotFoundError:  # released meanwhile
            self._close()
            return False
        except BaseException:
            self._close()
            raise
        return True

    def _flock(self) -> bool:
        """Return whether flock succeeded, False if unsupported; _Held if another process has the flock."""
        assert fcntl is not None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _Held(self._read()) from error
        except OSError:  # file systems without flock
            return False
        return True

    def _outlived(self, kernel: bool) -> bool:
        """Wait until the holder is certainly dead; return whether no other process can take its file now."""
        owner, here = self._read(), self.mine
        identity = owner.get("machine"), owner.get("pid"), owner.get("start")
        if is_running(*identity):
            raise _Held(owner)
        if kernel and all(owner.get(key) == here[key] for key in ("host", "boot")):
            return True  # a live holder on this host would have the flock
        if has_ended(*identity):
            return kernel
        requeued = here["job"] is not None and owner.get("job") == here["job"]
        if requeued and owner.get("restart") != here["restart"]:
            return True
        self._watch(owner)
        return False

    def _watch(self, owner: dict[str, Any]) -> None:
        """Return if the file stays unchanged; _Held if it changes, FileNotFoundError if it is removed."""
        # An empty file: an earlier version is creating it, or the disk was full.
        patience = self.pace.patience if owner else self.pace.settle
        if owner and not self.quiet:
            print(
                f"diffuse: {self.path}: locked by {_described(owner)}; waiting {patience:.0f} s for its heartbeat",
                file=sys.stderr,
            )
        start = time.monotonic()
        while time.monotonic() < start + patience:
            time.sleep(min(1.0, patience / 10))
            now = self._read()
            if now != owner:
                raise _Held(now)
        if owner:
            print(
                f"diffuse: {self.path}: taken over from {_described(owner)}, which sent no heartbeat",
                file=sys.stderr,
            )

    def _settle(self) -> None:
        """Raise _Held if another process took the lock at the same time."""
        time.sleep(self.pace.settle)
        owner = self._read()
        if owner.get("token") != self.mine["token"]:
            raise _Held(owner)

    def _beat(self) -> None:
        said = False
        while not self.over.wait(self.pace.beat):
            try:
                owner = self._read()
                if owner.get("token", self.mine["token"]) != self.mine["token"]:
                    # As after suspension of this machine. Save nothing: the folder is the other's.
                    print(
                        f"diffuse: {self.path}: taken over by {_described(owner)}; this process ends",
                        file=sys.stderr,
                    )
                    os._exit(1)
                self.mine["beat"] += 1
                self._write()
            except OSError as error:  # no reason to stop a run
                if not said:
                    print(
                        f"diffuse: {self.path}: heartbeat cannot be written ({error.strerror})",
                        file=sys.stderr,
                    )
                said = True

    def _read(self) -> dict[str, Any]:
        return _owner(self.path)

    def _write(self) -> None:
        text = json.dumps(self.mine).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))
        os.fsync(self.descriptor)

    def _have(self, descriptor: int) -> None:
        self.descriptor = descriptor
        _descriptors.add(descriptor)

    def _close(self) -> None:
        if self.descriptor in _descriptors:
            _descriptors.discard(self.descriptor)
            os.close(self.descriptor)
        self.descriptor = -1


def _owner(path: Path) -> dict[str, Any]:
    """Return the content of a lock; {} for an empty file."""
    # Opened again, because network file systems update their cache on open.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        text = os.read(descriptor, LONGEST)
    finally:
        os.close(descriptor)
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        return {"text": text} if text else {}
    return owner if isinstance(owner, dict) else {"text": text}


def _whereabouts() -> dict[str, Any]:
    """Return the identity of this process: machine, process id, start time, scheduler job and restarts."""
    return {
        "host": socket.gethostname(),
        "boot": boot_id(),
        "machine": machine_id(),
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def _described(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    job = f" (job {owner['job']})" if owner.get("job") else ""
    words = f"process {owner['pid']} on host {owner.get('host')}{job}, since {owner.get('since')}"
    return "".join(letter for letter in words[:200] if letter.isprintable())
