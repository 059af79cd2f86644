"""Identity of a process across machines, to detect whether it has ended."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


@cache
def machine_id() -> str:
    """Return eight hex digits that identify the host, its boot and its PID namespace.

    Two containers on a host may use the same process id for different processes.
    """
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    boot = BOOT.read_text().strip() if BOOT.is_file() else ""  # changes at each boot of Linux
    facts = "\n".join([socket.gethostname(), boot, namespace])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def start_time(pid: int) -> str | None:
    """Return the start time of a process of this machine, in ticks since boot; None if unknown or ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the process name before it may contain any character
    return None if fields[0] in b"ZX" else fields[19].decode()


def has_ended(machine: object, pid: object, start: object = None) -> bool:
    """Return whether a process has certainly ended: it ran on this machine, and its id is free or reused.

    `machine` and `start` are results of `machine_id` and `start_time`, of any type because files may be
    damaged.
    """
    if machine != machine_id() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    if os.name != "posix":  # there os.kill would end the process
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
