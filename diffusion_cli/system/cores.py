"""The CPU cores of this machine."""

import os

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
