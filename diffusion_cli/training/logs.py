"""Loggers of training: their interface, CSV and TensorBoard."""

import csv
import json
import math
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from diffusion_cli.config.runs import flatten
from diffusion_cli.config.validate import build, build_user, target
from diffusion_cli.config.values import Node
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.migrate import migrated_column
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import atomic_write, set_aside, writing
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.untrusted import printable, read, reason

PAUSES = (60.0, 300.0, 1800.0)
"""Seconds without a logger after its first failure, the second one and each later one."""
LARGEST_DELAY = 100
"""Smallest pause in times of the failed call, so that a service without an answer takes 1 % of the training."""


class LoggerConfig(ABC):
    """Configuration of a logger."""

    package: ClassVar[str | None] = None
    """Package of an extra of the same name that the logger needs; None: it needs none."""

    def check(self, key: str) -> None:
        """Raise UsageError if the logger cannot be used; `key`: its key, such as logger.wandb."""
        if self.package is not None and find_spec(self.package) is None:
            remedy = f"install it: pip install 'diffuse-cli[{self.package}]'"
            raise UsageError(key, NO_VALUE, f"needs {self.package}", remedy)

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
        if getattr(threading.excepthook, "func", None) is not _on_thread_error:
            threading.excepthook = partial(_on_thread_error, threading.excepthook)
        return RunLogger("tensorboard", lambda: TensorBoardFiles(run, step))


def _on_thread_error(otherwise: Callable[[Any], Any], error: threading.ExceptHookArgs) -> None:
    """Print no traceback of the event-file thread: the logger reports its error at the next call."""
    writes_events = error.thread is not None and type(error.thread).__module__.startswith("tensorboard.")
    if not (writes_events and isinstance(error.exc_value, OSError)):
        otherwise(error)


class RunLogger(Logger):
    """Logs metrics, configuration, images and evaluations of a run by a logger of Lightning.

    If that logger fails, it prints one line, and training continues. After a pause the next call tries it again.
    Images are logged by loggers with a method `log_image(key, images, step)`, as that of Lightning's WandbLogger, and
    evaluations by those with `log_evaluation(report, step)`. Only the main process logs.

    Args:
        option: name of the logger in `logger=`.
        make: makes the logger at the first call; it may connect to a service.
        remedy: what to do if the logger fails; empty for nothing.
    """

    def __init__(self, option: str, make: Callable[[], Logger], remedy: str = "") -> None:
        super().__init__()
        self._option, self._make, self._remedy = option, make, remedy
        self._logger: Logger | None = None
        self._failures = 0
        self._failed_at: float | None = None
        """Time of the first failure since the logger last worked; None: it works."""
        self._paused_until = 0.0 if Distributed().is_main else math.inf
        self._configure: Callable[[Logger], Any] | None = None
        """Logs the configuration, if it is not logged yet."""

    @property
    def name(self) -> str:
        """Part of Lightning's interface."""
        return self._option

    @property
    def version(self) -> str:
        """Part of Lightning's interface."""
        return ""

    @property
    def experiment(self) -> Any:
        """The object of the library that logs, for callbacks of the user; None while it fails."""
        found: list[Any] = []
        self._attempt(lambda logger: found.append(getattr(logger, "experiment", None)))
        return found[0] if found else None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        self._attempt(lambda logger: logger.log_metrics(dict(metrics), step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the configuration of the run."""
        self._configure = lambda logger: logger.log_hyperparams(params, *args, **kwargs)
        self._attempt(lambda logger: None)

    def log_image(self, key: str, path: Path, step: int) -> None:
        """Log a PNG file as the image of a step."""
        self._optional("log_image", key, [str(path)], step)

    def log_evaluation(self, report: Mapping[str, Any], step: int) -> None:
        """Log the results of an evaluation with their protocols, as plain data."""
        self._optional("log_evaluation", report, step)

    def save(self) -> None:
        """Write pending points."""
        self._attempt(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        """Write pending points, and close the logger."""
        if self._logger is not None:
            self._attempt(lambda logger: logger.finalize(status))

    def _optional(self, method: str, *arguments: Any) -> None:
        """Call a method that not every logger has."""
        self._attempt(lambda logger: getattr(logger, method, lambda *_: None)(*arguments))

    def _attempt(self, act: Callable[[Logger], Any]) -> None:
        """Act on the logger unless it has just failed; print one line when it fails and when it works again."""
        start = time.monotonic()
        if start < self._paused_until:
            return
        try:
            self._logger = self._logger or self._make()
            if self._configure is not None:
                self._configure(self._logger)
                self._configure = None
            act(self._logger)
        except Exception as error:  # libraries of services raise errors of many types
            now = time.monotonic()
            pause = PAUSES[min(self._failures, len(PAUSES) - 1)]
            self._paused_until = now + max(pause, LARGEST_DELAY * (now - start))
            self._failures += 1
            if self._failed_at is not None:
                return
            self._failed_at = start
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            what = getattr(cause, "strerror", None) or f"{type(cause).__name__}: {reason(cause)}"
            what = re.sub(r"://[^/@\s]*@", "://***@", what)  # user and password of an address
            what = what.partition(" [SQL: ")[0]
            ending = f"training continues without it until it works{self._remedy and f'; {self._remedy}'}"
            self._print(f"{what}; {ending}")
        else:
            if self._failed_at is not None:
                missing = ProgressBar.format_interval(time.monotonic() - self._failed_at)
                self._print(f"works again; values of {missing} are missing")
            self._failed_at = None

    def _print(self, what: str) -> None:
        ProgressBar.write(printable(f"diffuse: logger={self._option}: {what}"), file=sys.stderr)


class TensorBoardFiles(TensorBoardLogger):
    """Lightning's logger, with images, evaluations and the table of hyperparameters.

    Points after the step at which a run resumes are hidden from TensorBoard, because the run logs them again.
    """

    def __init__(self, run: Path, step: int) -> None:
        super().__init__(run, name="", version="tensorboard", purge_step=step + 1 if step else None)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add the run to the table of hyperparameters, with its losses."""
        flat = self._sanitize_params(flatten(vars(params) if isinstance(params, Namespace) else params))
        writer = self.experiment._get_file_writer()
        for summary in hparams(
            flat, {"loss": 0.0, "val_loss": 0.0}
        ):  # names of curves; the values are not used
            writer.add_summary(summary)

    @rank_zero_only
    def log_image(self, key: str, images: list[str], step: int) -> None:
        """Add PNG files."""
        for path in images:
            with Image.open(path) as image:
                self.experiment.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def log_evaluation(self, report: Mapping[str, Any], step: int) -> None:
        """Add the report as text."""
        self.experiment.add_text("evaluation", f"```json\n{json.dumps(report, indent=1)}\n```", step)


def log_metrics(
    trainer: Trainer, values: Mapping[str, float], step: int, aliases: Mapping[str, float] | None = None
) -> None:
    """Log values with all loggers, and show them to callbacks in `trainer.callback_metrics`, there also by aliases."""
    shown = {**values, **(aliases or {})}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in shown.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def make_loggers(nodes: Mapping[str, Node], run: Path, step: int) -> list[Logger]:
    """Return the loggers of a run that is at `step`, from checked nodes by name."""
    loggers: list[Logger] = []
    for name, node in nodes.items():
        if issubclass(target(node), LoggerConfig):
            loggers.append(build(node).logger(run, step))
        else:
            loggers.append(_user_logger(name, node))
    return loggers


def _user_logger(name: str, node: Node) -> RunLogger:
    """Return a logger of a library or a plugin; the main process builds it at once, so that a mistake is an error."""
    made: Logger = build_user(f"logger.{name}", node) if Distributed().is_main else DummyLogger()
    return RunLogger(name, lambda: made)


def run_loggers(trainer: Trainer) -> list[RunLogger]:
    """Return the loggers that also log images and evaluations."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]


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
