"""Locks: one process trains in a run's folder, and one at a time changes a file that several add to."""

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

from diffusion_cli.config import Mistakes

LOCK = ".lock"
LONGEST = 4096  # bytes read of a lock that may be anyone's


class Pace(NamedTuple):
    """The times of a lock that is seen from several machines, in seconds of each one's own monotonic clock."""

    beat: float
    """Between the holder's signs of life."""
    patience: float
    """Without a sign, after which the holder is taken for dead."""
    settle: float
    """In which another process that takes the same lock would show."""


PACE = Pace(beat=10, patience=60, settle=2)


@contextlib.contextmanager
def only_one(folder: Path, pace: Pace = PACE) -> Iterator[None]:
    """Hold a run's folder, made if need be; a folder in which nothing else was made is removed at the end.

    On one machine the kernel's lock decides, which ends with its process. Other machines may not see it, so the
    holder also changes the file now and then: one that stands still for `pace.patience` is taken over.

    Raises Mistakes if another process holds it, or no run can be kept there.
    """
    if fcntl is None:  # Windows
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _Lock(folder / LOCK, pace)
        except OSError as error:
            if error.errno == errno.ELOOP and (folder / LOCK).is_symlink():
                raise Mistakes(f"{folder / LOCK}: is a link; remove it") from error
            raise Mistakes(
                f"output_dir={folder.parent}: cannot hold the run {folder.name} ({error}); give a folder that can be "
                "written to, on a disk that has room"
            ) from error
        with lock:
            yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for a folder that another process of this machine has locked so, and hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """Close the locks in a forked process: one that outlives its parent would go on holding them."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class _Lock:
    """A run's lock file while this process holds it: who holds it, and a count that shows that it lives."""

    def __init__(self, path: Path, pace: Pace) -> None:
        self.path, self.pace = path, pace
        self.mine: dict[str, Any] = {
            **_whereabouts(),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self.descriptor, made, kernel = self._open()
        _held.add(self.descriptor)
        try:
            watched = not made and self._watched(kernel)
            self._write()
            if watched:
                self._settle()
        except BaseException:
            if made:  # on a full disk
                self.path.unlink(missing_ok=True)
            self._close()
            raise
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # the folder may have been taken away
            if self._read().get("token") == self.mine["token"]:
                self.path.unlink()
        self._close()

    def _open(self) -> tuple[int, bool, bool]:
        """The open file, whether this process made it, and whether the kernel's lock on it is ours."""
        assert fcntl is not None
        while True:
            try:
                descriptor, made = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                try:
                    # Never through a link, which may lead to a file of the user's; never waiting for a pipe.
                    descriptor, made = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), False
                except FileNotFoundError:  # let go of just now
                    continue
            try:
                kernel = self._flock(descriptor)
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Mistakes(f"{self.path}: is not a file; remove it")
                if os.path.samestat(os.fstat(descriptor), self.path.lstat()):
                    return descriptor, made, kernel
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder has let go of it and removed it meanwhile

    def _flock(self, descriptor: int) -> bool:
        assert fcntl is not None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(self._read()) from error
        except OSError:  # some clusters' file systems have no locks
            return False
        return True

    def _watched(self, kernel: bool) -> bool:
        """Return whether the holder on record had to be watched until it was sure to be dead; Mistakes if it lives."""
        owner, here = self._read(), self.mine
        if kernel and all(owner.get(key) == here[key] for key in ("host", "boot")):
            return False  # it is dead, or the kernel's lock would not be ours
        requeued = here["job"] is not None and owner.get("job") == here["job"]
        if requeued and owner.get("restart") != here["restart"]:
            return False  # the scheduler has ended it
        if owner:
            print(
                f"diffuse: {self.path} is held by {_described(owner)}; waiting {self.pace.patience:.0f} s for a sign "
                "of life",
                file=sys.stderr,
            )
        # One without a word of its holder is being made just now, or was left so by a full disk.
        patience = self.pace.patience if owner else self.pace.settle
        start = time.monotonic()
        while time.monotonic() < start + patience:
            time.sleep(min(1.0, patience / 10))
            if self._read() != owner:
                raise self._refusal(self._read())
        if owner:
            print(f"diffuse: taken over from {_described(owner)}, which gave none", file=sys.stderr)
        return True

    def _settle(self) -> None:
        """Mistakes if another process took the lock in the same moment."""
        time.sleep(self.pace.settle)
        owner = self._read()
        if owner.get("token") != self.mine["token"]:
            raise self._refusal(owner)

    def _beat(self) -> None:
        said = False
        while not self.over.wait(self.pace.beat):
            try:
                owner = self._read()
                if owner.get("token", self.mine["token"]) != self.mine["token"]:
                    # As after a long sleep of this machine. At once, and saving nothing: the folder is the other's.
                    print(f"diffuse: {self.path} was taken over by {_described(owner)}", file=sys.stderr)
                    os._exit(1)
                self.mine["beat"] += 1
                self._write()
            except OSError as error:  # no reason to end a run
                if not said:
                    print(f"diffuse: {self.path} cannot be kept fresh ({error.strerror})", file=sys.stderr)
                said = True

    def _read(self) -> dict[str, Any]:
        """Who holds the lock; {} where nobody has written it."""
        # Opened anew: a network file system looks for changes then.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            text = os.read(descriptor, LONGEST)
        finally:
            os.close(descriptor)
        try:
            owner = json.loads(text)
        except (ValueError, RecursionError):
            return {"text": text} if text else {}
        return owner if isinstance(owner, dict) else {"text": text}

    def _write(self) -> None:
        text = json.dumps(self.mine).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))
        os.fsync(self.descriptor)

    def _close(self) -> None:
        _held.discard(self.descriptor)
        os.close(self.descriptor)

    def _refusal(self, owner: dict[str, Any]) -> Mistakes:
        folder = self.path.parent
        return Mistakes(f"name={folder.name}: is being trained by {_described(owner)}; wait, or end it")


def _whereabouts() -> dict[str, Any]:
    """What tells this process from others: machine, its start, number, and the scheduler's job and how often begun."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else None,
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def _described(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    job = f" (job {owner['job']})" if owner.get("job") else ""
    words = f"process {owner['pid']} on host {owner.get('host')}{job}, since {owner.get('since')}"
    return "".join(letter for letter in words[:200] if letter.isprintable())
