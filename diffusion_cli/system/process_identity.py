"""The identity of a process among all machines, by which others find out whether it has ended."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


@cache
def boot_id() -> str | None:
    """The number that Linux draws at each start of the machine; None elsewhere."""
    return BOOT.read_text().strip() if BOOT.is_file() else None


@cache
def machine_id() -> str:
    """Eight hex digits of the host, its last start and the name space of its process numbers.

    Two containers on one host may use the same number for different processes.
    """
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    facts = "\n".join([socket.gethostname(), boot_id() or "", namespace])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def start_time(pid: int) -> str | None:
    """The start of a process of this machine, in ticks since the machine's start; None if unknown or ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before it may contain anything
    return None if fields[0] in b"ZX" else fields[19].decode()


def has_ended(machine: object, pid: object, start: object = None) -> bool:
    """Whether a process has certainly ended: it ran on this machine, and its number is free or another's now.

    `machine` and `start` are what `machine_id` and `start_time` returned there; any type, for files may be damaged.
    """
    if machine != machine_id() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    if os.name != "posix":  # where os.kill ends the process instead
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user, which /proc may hide
        return start_time(pid) not in (None, start) and start is not None
    now = start_time(pid)
    if now is None:
        return Path("/proc/self/stat").is_file()  # a zombie, where /proc shows it
    return start is not None and now != start


def is_running(machine: object, pid: object, start: object) -> bool:
    """Whether a process certainly runs: on this machine, with the start time that the process of its number has."""
    return machine == machine_id() and isinstance(pid, int) and start is not None and start_time(pid) == start
