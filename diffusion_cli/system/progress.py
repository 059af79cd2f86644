"""Progress bars on a terminal, the only output that may move the cursor, and progress lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from diffusion_cli.system.terminal import Output
from diffusion_cli.system.untrusted import escaped

REDRAW = 0.2
"""Seconds between updates of a bar on a terminal."""
LINES = 15.0
"""Seconds between lines where stderr is no terminal."""
MEASURED = 5.0
"""Seconds of work from which the time that remains is estimated."""
LONG = 120.0
"""Remaining seconds from which an estimate is printed."""

BAR = "{l_bar}{bar}| {done}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE = "{desc}: {percentage:.0f}%, {done}/{total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
ENDLESS_LINE = "{desc}: {done} {unit}s [{elapsed}, {rate_fmt}{postfix}]"


class ProgressBar(tqdm):
    """A progress bar of tqdm on stderr; control characters in its description are escaped.

    Where stderr is no terminal, it prints a line every 15 seconds. If the work takes long, it prints one line with
    the time that remains. Updates may be fractions of an item.

    Args:
        arguments: those of tqdm.
        desc: name of the work.
        total: number of items.
        seconds_left: returns the seconds until `max_time` stops the work, or None without a limit.
        options: those of tqdm.
    """

    def __init__(
        self,
        *arguments: Any,
        desc: str | None = None,
        total: float | None = None,
        seconds_left: Callable[[], float | None] = lambda: None,
        **options: Any,
    ) -> None:
        self._estimated, self._seconds_left = False, seconds_left
        self._first: tuple[float, float] | None = None
        on_terminal = sys.stderr.isatty()
        endless = total is None and not (arguments and hasattr(arguments[0], "__len__"))
        line = ENDLESS_LINE if endless else LINE
        bar = None if endless else BAR
        super().__init__(
            *arguments,
            desc=desc and escaped(desc),
            total=total,
            file=_Moving(sys.stderr) if on_terminal else _Log(sys.stderr),
            dynamic_ncols=True,
            mininterval=REDRAW if on_terminal else LINES,
            miniters=0,  # compare the time at each update, because updates take unequal times
            bar_format=bar if on_terminal else line,
            **options | {"disable": options.get("disable", False) or total == 0},
        )

    @property
    def format_dict(self) -> Any:
        """The fields of a line: those of tqdm, with whole items, on a terminal of unknown width too."""
        fields = super().format_dict
        number = fields["n"] + 1e-6  # sums of shares
        done = self.format_sizeof(number) if fields["unit_scale"] else str(int(number))
        return {**fields, "ncols": fields["ncols"] or None, "done": done}

    def update(self, n: float | None = 1) -> bool | None:
        """Add n items; return whether the bar was drawn."""
        drawn = super().update(n)
        if self._first is None:  # the time until then includes preparation
            self._first = time.time(), self.n
        if drawn and not self._estimated:
            self._estimate()
        return drawn

    def _estimate(self) -> None:
        """Print the time that remains, once it is measured and if it is long."""
        assert self._first is not None
        passed, done = time.time() - self._first[0], self.n - self._first[1]
        if passed < MEASURED or done <= 0 or not self.total:
            return
        self._estimated = True
        left = passed / done * (self.total - self.n)
        limit = self._seconds_left()
        if left > LONG and limit is not None and limit < left:
            reached = int(self.n + limit * done / passed)
            self.write(
                f"diffuse: {self.desc}: max_time ends it at about {self.unit} {reached:,} of {self.total:,}",
                file=sys.stderr,
            )
        elif left > LONG:
            count = self.total - int(self.n)
            self.write(
                f"diffuse: {self.desc}: about {_in_words(left)} for the remaining {count:,} {self.unit}s",
                file=sys.stderr,
            )

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Print a line above the bars."""
        if sys.stderr.isatty():
            super().write(s, file=file, end=end, nolock=nolock)
        else:
            print(s, file=file, end=end)

    @contextmanager
    def batch(self, size: int) -> Iterator[Callable[[float], None]]:
        """Context of the work on `size` items; yields a function that takes each share of it that is done."""
        end = self.n + size

        def advance(share: float) -> None:
            self.update(min(share * size, end - self.n))

        yield advance
        self.update(end - self.n)


def _in_words(seconds: float) -> str:
    """Return a duration in one unit, such as 12 minutes."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


class _Moving:
    """A stream of text that may move the cursor between lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        # tqdm.write clears the bars of the stream that it writes to.
        return self._stream is getattr(other, "_stream", other) or self._stream is other

    def __hash__(self) -> int:
        return hash(self._stream)

    def write(self, text: str) -> int:
        """Write text."""
        if isinstance(self._stream, Output):
            return self._stream.write(text, moves=True)
        return self._stream.write(text)


class _Log(_Moving):
    """A stream that is no terminal: each drawing of a bar is a line, and movements of the cursor are left out."""

    def write(self, text: str) -> int:
        """Write a line."""
        line = text.replace("\x1b[A", "").strip()
        if line:
            self._stream.write(f"{line}\n")
        return len(text)
