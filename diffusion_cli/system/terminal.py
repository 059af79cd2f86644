"""Output for a terminal: text cannot command it, and an output that is full or closed ends no work."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from diffusion_cli.system.untrusted import escaped

LAYOUT = re.compile(r"(\r?\n|\t)")
"""Line breaks and tabs."""
MOVES = re.compile(r"(\x1b\[A|[\n\r\t])")
"""How a progress bar moves among its lines."""


class Output:
    """A text stream in whose place it is used: control characters are escaped, and no write fails.

    After the first failure the stream leads to the null device, so that work continues without its output.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The first failure."""
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str, moves: bool = False) -> int:
        """Write text, escaped; with `moves` it may return to the start of its line, and to lines above."""
        layout = MOVES if moves else LAYOUT
        with self._forgiving():
            parts = (part if layout.fullmatch(part) else escaped(part) for part in layout.split(text))
            self._stream.write("".join(parts))
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        with self._forgiving():
            self._stream.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError, AttributeError):  # a stream of no file
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextmanager
def guarded() -> Iterator[None]:
    """Put an `Output` in the place of stdout and of stderr."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if isinstance(stream, Output) else Output(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def lost_output() -> str | None:
    """One line about text that stdout could not take; None if it took all, or if its reader closed the pipe."""
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, Output) else None
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return f"stdout: cannot be written ({error.strerror}); the printed text is lost"


def open_closed_streams() -> None:
    """Open the null device in the place of standard streams that were closed before the start.

    Otherwise the next file that is opened would get the number of stdout or stderr, and the messages of libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
