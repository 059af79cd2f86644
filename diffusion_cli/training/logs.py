"""Where the numbers of a run are written."""

import csv
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from diffusion_cli.checkpoint import whole_file, writing
from diffusion_cli.foreign import read


class LoggerConfig(ABC):
    """A kind of log, as configured."""

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
        return TensorBoardLogger(run, name="", version="tensorboard")


class CSVFile(Logger):
    """A CSV file with a row a log, taken up again with the run.

    Lightning's own CSV logger deletes the file of an earlier start. This one keeps it, less the rows that lie
    after the step that the run goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file; None: it is to be written anew
        if path.exists():
            self.rows = [row for row in _read_rows(path) if int(row["step"]) <= step]

    @property
    def name(self) -> str:
        """Part of Lightning's interface."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Part of Lightning's interface."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; the file is appended to, or written anew where a column is new."""
        row = {"step": step, **metrics}
        columns = list(dict.fromkeys([*(self.rows[-1] if self.rows else ()), *row]))
        self.rows.append({column: row.get(column, "") for column in columns})
        if columns == self._columns:
            with writing(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerow(self.rows[-1])
            return
        with whole_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        self._columns = columns


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log; ValueError if it is not a regular file, as a pipe, or too large."""
    try:
        text = read(path).decode(errors="replace")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; move it away") from error
    return [row for row in csv.DictReader(StringIO(text, newline="")) if _is_whole(row)]


def _is_whole(row: Mapping[str | None, Any]) -> bool:
    """Whether a row was written to its end: the last one may not be, where the process was killed or the disk full."""
    return None not in row.values() and None not in row and str(row.get("step")).isdecimal()
