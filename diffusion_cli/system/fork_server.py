"""A server that forks the processes of a command: each new interpreter would import torch again, for seconds.

`diffuse` starts the server before its own imports, so that both import at the same time. The server starts no threads
and uses no device. It ends with the command, and a signal to the whole process group does not end it.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_cli.system.compat import signal_at_end_of_parent
from diffusion_cli.system.signals import block

VARIABLE = "DIFFUSE_FORK_SERVER"
"""Environment variable that only the server has."""


class _State:
    """What this process does with the server."""

    allowed = running = False


def allow() -> None:
    """From now on, `start` starts the server: this process runs one command, and keeps its output where it is."""
    _State.allowed = True


def start(modules: Sequence[str]) -> None:
    """Start the server, which imports modules and then waits, if it is allowed and the system can fork safely."""
    if not _State.allowed or _State.running or sys.platform != "linux":
        return
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # would unblock signals
    block(True)  # the server inherits this
    try:
        forkserver.set_forkserver_preload([__name__, *modules])
        with suppress(OSError), _environment():
            forkserver.ensure_running()
            _State.running = True
    finally:
        block(False)


def is_running() -> bool:
    """Return whether `start` has started the server."""
    return _State.running


@contextmanager
def _environment() -> Iterator[None]:
    """Context with the environment of the server: it finds modules where this process does, in no other folder."""
    before = dict(os.environ)
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    os.environ.update({VARIABLE: "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": paths})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if os.environ.pop(VARIABLE, None):  # in the server, before it imports torch
    signal_at_end_of_parent(signal.SIGKILL)
