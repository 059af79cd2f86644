"""Read the curves in the `metrics.csv` of a run."""

from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path

from diffusion_cli.errors import FormatError
from diffusion_cli.runs.migrate import migrated_column
from diffusion_cli.system.untrusted import read_csv

MOST_COLUMNS = 200
EXTREME = 1e100
"""Bound of drawable values: zero, or a magnitude between 1 / EXTREME and EXTREME."""


def last_values(path: Path) -> dict[str, tuple[int, float]]:
    """Return the last step and value of each column of a `metrics.csv`; a value may be infinite or not a number.

    Raises FormatError as `read_curves`.
    """
    last: dict[str, tuple[int, float]] = {}
    for numbers in _rows(path, float):
        step = numbers.pop("step", None)
        if step is not None and isfinite(step):
            last |= {column: (int(step), number) for column, number in numbers.items() if number is not None}
    return last


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of a `metrics.csv`: pairs (step, value) of each column, without values that cannot be drawn.

    Raises FormatError for a file that is not CSV, lacks the column `step` or has more than 200 columns.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for numbers in _rows(path, _drawable):
        step = numbers.pop("step", None)
        for column, number in numbers.items():
            if step is not None and number is not None:
                curves.setdefault(column, []).append((step, number))
    return curves


def _rows(path: Path, accepted: Callable[[float], float | None]) -> Iterator[dict[str, float | None]]:
    """Yield the numbers of each row of a `metrics.csv` by column; None for cells without an accepted number."""
    header, *rows = read_csv(path) or [[]]
    if len(header) > MOST_COLUMNS:
        raise FormatError(f"has more than {MOST_COLUMNS} columns")
    if "step" not in header:
        raise FormatError("has no column step")
    for row in rows:  # the last row may be incomplete
        yield {
            migrated_column(name): _number(text, accepted) for name, text in zip(header, row, strict=False)
        }


def _number(text: str, accepted: Callable[[float], float | None]) -> float | None:
    """Return the number in a cell; None for another text, or if it is not accepted."""
    try:
        return accepted(float(text))
    except ValueError:
        return None


def _drawable(number: float) -> float | None:
    """Return a number; None if it cannot be drawn."""
    return number if number == 0 or 1 / EXTREME < abs(number) < EXTREME else None
