"""The signals that ask a program to end, of a terminal or a scheduler, and how it ends."""

import atexit
import os
import signal
import sys
from typing import NoReturn

UNFINISHED = 75
"""Exit code of what a signal has stopped: what was done is saved, and the same command goes on (EX_TEMPFAIL)."""

STOPPING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Ctrl-C, the end that schedulers announce, and the warnings before it that a job may ask them for."""


def end(code: int) -> NoReturn:
    """End one of several processes, without the interpreter's last moments, in which network threads would abort it."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
