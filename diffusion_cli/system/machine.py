"""Cores and memory of this machine, also where the system has no POSIX calls."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.errors import UsageError


def usable_cores() -> int:
    """Return the number of cores available to this process, respecting the CPU affinity set by batch systems."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def check_cores(key: str, processes: int) -> None:
    """Raise UsageError, with the name of the key, if `processes` exceeds the cores available to this process."""
    cores = usable_cores()
    if processes > cores:
        raise UsageError(key, processes, f"CPU cores found: {cores}", f"use at most {cores}")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of RAM available to this process: free on the machine, and in the cgroups of its job.

    Returns half of all RAM if the system reports no number, and 4 GiB on Windows. `root` is the folder of `proc`
    and `sys`.
    """
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
            if hasattr(os, "sysconf")
            else 4 * 2**30
        )
    return max(0, min([free, *_free_in_cgroups(root)]))


class _Cgroups(NamedTuple):
    """File and entry names of a cgroup version for the memory of a group."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    reclaimable: str
    """Entry of `memory.stat` with the bytes of cached files that the kernel frees first."""


VERSION_1 = _Cgroups(
    ("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
VERSION_2 = _Cgroups(
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"
)


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Yield the free bytes of this process's cgroup, and of each above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = VERSION_2 if number == "0" else VERSION_1
        for mount in (root / name for name in version.mounts):
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    with suppress(OSError, ValueError):  # no such group, or "max": no limit
                        yield _free_in(folder, version)


def _free_in(folder: Path, version: _Cgroups) -> int:
    limit = int((folder / version.limit).read_text())
    used = int((folder / version.usage).read_text())
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + int(statistics.get(version.reclaimable, 0))
