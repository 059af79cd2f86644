"""Terminal output: control characters are escaped, and a full or closed output does not stop the work."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from diffusion_cli.system.untrusted import escaped, printable

LAYOUT = re.compile(r"(\r?\n|\t)")
"""Line breaks and tabs."""
MOVES = re.compile(r"(\x1b\[A|[\n\r\t])")
"""Cursor movements of a progress bar."""


class Output:
    """A replacement of a text stream that escapes control characters and never fails.

    After the first failed write the stream is redirected to the null device, so that work continues.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The first error of a write."""
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str, moves: bool = False) -> int:
        """Write escaped text; with `moves` it may move the cursor to the line start and to lines above."""
        layout = MOVES if moves else LAYOUT
        with self._forgiving():
            parts = (part if layout.fullmatch(part) else escaped(part) for part in layout.split(text))
            self._stream.write("".join(parts))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._forgiving():
            self._stream.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError, AttributeError):  # a stream without a file
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextmanager
def guarded() -> Iterator[None]:
    """Context that replaces stdout and stderr by an `Output`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if isinstance(stream, Output) else Output(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text in columns, with control characters escaped."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def report(*lines: str) -> None:
    """Print lines to stderr, each after the name of the program; torchrun repeats them at the end of its own report."""
    shown = [f"diffuse: {printable(line)}" for line in lines]
    print("\n".join(shown), file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": "\n".join(shown), "timestamp": int(time.time())}))


def lost_output() -> str | None:
    """Return a line about a failed write to stdout; None if none failed or the reader closed the pipe."""
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, Output) else None
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return f"stdout: cannot be written ({error.strerror}); the printed text is lost"


def open_closed_streams() -> None:
    """Open the null device for standard streams that were closed before the start.

    Otherwise the next opened file would get the descriptor of stdout or stderr, and the messages of
    libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
