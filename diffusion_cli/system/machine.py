"""Cores and memory of this machine, also where the system has no POSIX calls."""

import os
import sys

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


def physical_memory() -> int:
    """Return the bytes of RAM of this machine; 8 GiB if the system does not report them."""
    if not hasattr(os, "sysconf"):  # Windows
        return 8 * 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
