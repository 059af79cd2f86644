"""The signals that ask a program to end, of a terminal or a scheduler, and how it ends.

A signal has one of three meanings, by what a command does at that moment. While it starts, nothing has begun, and it
ends at once (`end_at_signals`). While it works, KeyboardInterrupt is raised. While it trains, the state is saved first.
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
"""Exit code of what a signal has stopped: what was done is saved, and the same command goes on (EX_TEMPFAIL)."""
STOPPED = "diffuse: stopped; run the same command again to continue"

STOPPING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Ctrl-C, the end that schedulers announce, a closed terminal, and the warnings that a job may ask a scheduler for."""


def handled() -> list[signal.Signals]:
    """The signals of `STOPPING` that this process handles: SIGHUP stays ignored where `nohup` ignores it."""
    hangup = getattr(signal, "SIGHUP", None)
    return [n for n in STOPPING if n != hangup or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` at every signal that asks to end; only the main thread of a process can choose that."""
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
    """From now on, end at any signal at once with an exit code, and print a line unless it is empty.

    It needs no working interpreter around it, such as one in the middle of an import.
    """

    def at_once(number: int, frame: object) -> None:
        with suppress(OSError):  # a closed terminal
            os.write(2, f"{line}\n".encode() if line else b"")
        os._exit(code)

    for number in handled():
        signal.signal(number, at_once)


def end(code: int) -> NoReturn:
    """End one of several processes, without the interpreter's last moments, in which network threads would abort it."""
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
