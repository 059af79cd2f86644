"""Loggers of training: CSV and TensorBoard."""

import csv
import sys
import threading
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.migrate import migrated_column
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import atomic_write, set_aside, writing
from diffusion_cli.system.untrusted import printable, read


class LoggerConfig(ABC):
    """Configuration of a logger."""

    @abstractmethod
    def logger(self, run: Path, step: int) -> Logger:
        """Return the logger of a run that is at `step`."""


class CSV(LoggerConfig):
    """One CSV file, `metrics.csv`."""

    def logger(self, run: Path, step: int) -> Logger:
        return CSVFile(run / "metrics.csv", step)


class TensorBoard(LoggerConfig):
    """TensorBoard event files."""

    def logger(self, run: Path, step: int) -> Logger:
        threading.excepthook = partial(_on_thread_error, threading.excepthook)
        return TensorBoardFiles(run, name="", version="tensorboard")


def _on_thread_error(otherwise: Callable[[Any], Any], error: threading.ExceptHookArgs) -> None:
    """Print no traceback of the event-file thread: the logger reports its error at the next call."""
    writes_events = error.thread is not None and type(error.thread).__module__.startswith("tensorboard.")
    if not (writes_events and isinstance(error.exc_value, OSError)):
        otherwise(error)


class TensorBoardFiles(TensorBoardLogger):
    """Lightning's logger; if a write fails, it prints one line and stops, and training continues."""

    _ended = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        with self._attempt() as open_:
            if open_:
                super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Part of Lightning's interface."""
        with self._attempt() as open_:
            if open_:
                super().log_hyperparams(params, *args, **kwargs)

    @rank_zero_only
    def save(self) -> None:
        """Write pending points."""
        with self._attempt() as open_:
            if open_:
                super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write pending points, and close the files."""
        with self._attempt() as open_:
            if open_:
                super().finalize(status)

    @contextmanager
    def _attempt(self) -> Iterator[bool]:
        """Yield whether logging is active; on a failure, print one line and stop logging."""
        try:
            yield not self._ended
        except (OSError, ValueError) as error:  # Lightning wraps the writer's error
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self._ended = True
            print(
                f"diffuse: {printable(f'{self.log_dir}: cannot be written ({cause.strerror or cause})')}; training "
                "continues without logger=tensorboard",
                file=sys.stderr,
            )


class CSVFile(Logger):
    """A CSV file with a row per log, continued when the run resumes.

    Lightning's CSV logger deletes an existing file. This one keeps it, but removes the rows after the step at
    which the run resumes. A damaged file is renamed, and its complete rows are copied. While the file cannot
    be written, rows are kept in memory.
    """

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file; None: the next write replaces it
        self._failed = False
        if Distributed().is_main and path.exists():
            rows, damaged = _read_rows(path)
            self.rows = [row for row in rows if int(row["step"]) <= step]
            if damaged:
                aside = set_aside(path)
                print(
                    f"diffuse: {printable(str(path))}: is damaged; renamed to {aside.name}, and its complete rows "
                    "are copied",
                    file=sys.stderr,
                )

    @property
    def name(self) -> str:
        """Part of Lightning's interface."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Part of Lightning's interface."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; rewrite the file if a column is new or the last write failed."""
        row = {"step": step, **metrics}
        columns = list(dict.fromkeys([*(self.rows[-1] if self.rows else ()), *row]))
        self.rows.append({column: row.get(column, "") for column in columns})
        try:
            self._write(columns)
        except OSError as error:
            self._columns = None
            if not self._failed:
                print(
                    f"diffuse: {printable(str(error))}; training continues, and rows are kept in memory",
                    file=sys.stderr,
                )
            self._failed = True
        else:
            self._columns, self._failed = columns, False

    def _write(self, columns: list[str]) -> None:
        if columns == self._columns:
            with writing(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerow(self.rows[-1])
            return
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the complete rows of a log, and whether it is damaged before its last row.

    A truncated last row is no damage: a stop may cause it. Raises UsageError for a file that is too large or
    not regular.
    """
    try:
        text = read(path).decode(errors="replace")
    except FormatError as error:
        raise UsageError(path, NO_VALUE, str(error), "move it away") from error
    damaged = any(letter == "\ufffd" or not (letter.isprintable() or letter in "\r\n") for letter in text)
    rows: list[dict[Any, Any]] = []
    try:  # diffuse writes no quotes; a quote is damage and must not join lines
        rows += csv.DictReader(StringIO(text, newline=""), quoting=csv.QUOTE_NONE)
    except csv.Error:
        damaged = True
    whole = [_readable(row) for row in rows if _is_whole(row)]
    return whole, damaged or not all(map(_is_whole, rows[:-1])) or (bool(rows) and "step" not in rows[0])


def _readable(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a row without columns that have damaged names."""
    return {
        migrated_column(key): text for key, text in row.items() if key.isprintable() and "\ufffd" not in key
    }


def _is_whole(row: Mapping[Any, Any]) -> bool:
    """Return whether a row has a step, and a number or nothing in each column."""
    if None in row or None in row.values() or not str(row.get("step")).isdecimal():
        return False
    return all(_is_number(text) for text in row.values() if text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
