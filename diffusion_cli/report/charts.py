"""The curves of runs as geometry: what the page draws, in the units of its SVG."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import NamedTuple, Self

Points = list[tuple[int, float]]
"""The (step, value) pairs of a curve, by step."""

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 10, 30
COLOURS, DASHES = 8, 4  # that the page's style has
BINS = 300


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, which are positive on a logarithmic axis."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], log: bool = False) -> Self:
        """The axis that shows all of the values; a single one has room on both sides."""
        low, high = min(values), max(values)
        room = 0.0 if low < high else abs(low) / 2 or 1.0
        return cls(low - room, high + room, log)

    def place(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Two to seven round numbers along the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5)):
                numbers = [float(Decimal(digit).scaleb(power)) for power in decades for digit in digits]
                ticks = [number for number in numbers if self.low <= number <= self.high]
                if len(ticks) >= 3:
                    return ticks[:: math.ceil(len(ticks) / 7)]
        return round_numbers(self.low, self.high)


def round_numbers(low: float, high: float) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten in [low, high], two to six of them."""
    least = (high - low) / 5
    power = math.floor(math.log10(least))
    digit = next(digit for digit in (1, 2, 5, 10) if digit * 10.0**power >= least)
    width = Decimal(digit).scaleb(power)  # in decimals, for 3 times 0.1 is not 0.3 in binary
    first, last = math.ceil(Decimal(str(low)) / width), math.floor(Decimal(str(high)) / width)
    return [float(number * width) for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A round number in few letters: 0.05, 2500, 20k, 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def thinned(points: Points) -> Points:
    """At most the lowest and the highest of each of `BINS` stretches: what a small drawing can show of many."""
    if len(points) <= 2 * BINS:
        return points
    length = math.ceil(len(points) / BINS)
    stretches = (points[at : at + length] for at in range(0, len(points), length))
    return [
        point
        for stretch in stretches
        for point in sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    ]


class Line(NamedTuple):
    """One line of a chart, with the numbers of its colour and of its dashes."""

    name: str
    colour: int
    dash: int
    points: Points


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of training, on one pair of axes."""

    title: str
    curves: Sequence[Line]
    last: int
    """The step at its right end."""
    log: bool

    @cached_property
    def x_axis(self) -> Axis:
        """The steps, from 0."""
        return Axis.around([0, *(step for curve in self.curves for step, _ in curve.points)])

    @cached_property
    def y_axis(self) -> Axis:
        """The values; where none is negative, a linear axis begins at 0."""
        values = [value for curve in self.curves for _, value in curve.points]
        origin = [] if self.log or min(values) < 0 else [0.0]
        return Axis.around([*origin, *values], self.log)

    def x_ticks(self) -> list[tuple[float, str]]:
        """Where below the drawing to write what."""
        return [(self._x(tick), tick_label(tick)) for tick in self.x_axis.ticks()]

    def y_ticks(self) -> list[tuple[float, str]]:
        """Where on the left of the drawing to write what."""
        return [(self._y(tick), tick_label(tick)) for tick in self.y_axis.ticks()]

    def polyline(self, curve: Line) -> str:
        """A curve as SVG writes it; a single point twice, which a line with round ends shows as a dot."""
        points = thinned(curve.points) if len(curve.points) > 1 else curve.points * 2
        return " ".join(f"{self._x(step)},{self._y(value)}" for step, value in points)

    def _x(self, step: float) -> float:
        return round(LEFT + self.x_axis.place(step) * (WIDTH - LEFT - RIGHT), 1)

    def _y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self.y_axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def charts(runs: Mapping[str, Mapping[str, Points]]) -> list[Chart]:
    """The curves of runs by name, each a mapping from columns of its metrics.csv, as charts of what belongs together.

    A single run has a colour a column; several have a colour each, and many columns a chart each.
    """
    families: dict[str, list[str]] = {}
    for column in dict.fromkeys(column for curves in runs.values() for column in curves):
        families.setdefault(_family(column), []).append(column)
    found = []
    for title, columns in families.items():
        if len(columns) == 1 or (len(runs) > 1 and len(columns) > 2):
            found += [_chart(column, [column], runs) for column in columns]
        else:
            found.append(_chart(title, columns, runs))
    return found


def _family(column: str) -> str:
    """What a column is about: its number on held-out images goes with it, and its quartiles go together."""
    name = column.removeprefix("held_out_")
    by_level = re.fullmatch(r"(.+)_q[1-4]", name)
    return f"{by_level[1]} by noise level" if by_level else name


def _chart(title: str, columns: Sequence[str], runs: Mapping[str, Mapping[str, Points]]) -> Chart:
    several = len(runs) > 1
    curves = []
    for number, (run, points) in enumerate(runs.items()):
        for place, column in enumerate(columns):
            if column not in points:
                continue
            colour, dash = (number, place) if several else (place, 0)
            name = column if not several else run if len(columns) == 1 else f"{run}: {column}"
            curves.append(Line(name, colour % COLOURS, dash % DASHES, points[column]))
    last = max(step for columns in runs.values() for points in columns.values() for step, _ in points)
    positive = all(value > 0 for curve in curves for _, value in curve.points)
    return Chart(title, curves, last, log="loss" in title and positive)
