"""Signals of a terminal or a scheduler that stop a command.

During the start a command ends at once (`end_at_signals`). Later a signal raises KeyboardInterrupt. During
training the state is saved first.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from diffusion_cli.system.compat import run_exit_functions

UNFINISHED = 75
"""Exit code after a signal: progress is saved, and the same command continues (EX_TEMPFAIL)."""
STOPPED = "diffuse: stopped; run the same command again to continue"

STOPPING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Ctrl-C, a scheduler's time limit, a closed terminal, and the warning signals of a scheduler."""


def handled() -> list[signal.Signals]:
    """Return the signals of `STOPPING` to handle; SIGHUP is excluded under `nohup`."""
    hangup = getattr(signal, "SIGHUP", None)
    return [n for n in STOPPING if n != hangup or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context that calls `handler` at every stop signal; it has an effect only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in handled()}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def end_at_signals(code: int = UNFINISHED, line: str = STOPPED) -> None:
    """From now on, end at any stop signal at once with an exit code, and print a line unless it is empty.

    This works at any time, even during an import.
    """

    def at_once(number: int, frame: object) -> None:
        with suppress(OSError):  # a closed terminal
            os.write(2, f"{line}\n".encode() if line else b"")
        os._exit(code)

    for number in handled():
        signal.signal(number, at_once)


def block(blocked: bool) -> None:
    """Block or unblock the stop signals in this thread and in processes that it starts; Windows cannot."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, STOPPING)


def leave_group() -> None:
    """Leave the process group of the parent, which forwards signals, so that Ctrl-C arrives once."""
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def forward(number: int, pid: int) -> None:
    """Send a signal to a process that has called `leave_group`."""
    if hasattr(
        os, "setpgid"
    ):  # on Windows the console sends Ctrl-C to all, and os.kill would end the process
        os.kill(pid, number)


def end(code: int) -> NoReturn:
    """End one of several processes without finalising the interpreter, which network threads would abort."""
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
