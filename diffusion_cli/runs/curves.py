"""Read the curves in the `metrics.csv` of a run."""

from pathlib import Path

from diffusion_cli.errors import FormatError
from diffusion_cli.runs.migrate import migrated_column
from diffusion_cli.system.untrusted import read_csv

MOST_COLUMNS = 200
EXTREME = 1e100
"""Bound of drawable values: zero, or a magnitude between 1 / EXTREME and EXTREME."""


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of a `metrics.csv`: pairs (step, value) of each column, without values that cannot be drawn.

    Raises FormatError for a file that is not CSV, lacks the column `step` or has more than 200 columns.
    """
    header, *rows = read_csv(path) or [[]]
    if len(header) > MOST_COLUMNS:
        raise FormatError(f"has more than {MOST_COLUMNS} columns")
    if "step" not in header:
        raise FormatError("has no column step")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:  # the last row may be incomplete
        numbers = {migrated_column(name): _number(text) for name, text in zip(header, row, strict=False)}
        step = numbers.pop("step", None)
        for column, number in numbers.items():
            if step is not None and number is not None:
                curves.setdefault(column, []).append((step, number))
    return curves


def _number(text: str) -> float | None:
    """Return the number in a cell; None if it cannot be drawn."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number == 0 or 1 / EXTREME < abs(number) < EXTREME else None
