"""Charts of curves, with colours for the colour-blind, as PNG, PDF or SVG."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffusion_cli.captions import dejavu, font_file, readable
from diffusion_cli.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

# Okabe and Ito 2008, "Color Universal Design", without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Lengths of dashes and gaps in line widths; the first line is solid.
DASHES = ((), (3.7, 1.6), (1, 1.65), (6.4, 1.6, 1, 1.6))
FEW = 20  # curves with at most this number of points have markers
WIDTH, HEIGHT = 3.8, 2.9  # of a panel in inches
MOST_PLACES = 8  # values of a logarithmic axis that are labelled themselves
APART = 1.4  # ratio of such values, so that their labels do not overlap
DECADES = 200  # ratio of the ends of an axis, below which 2 and 5 are labelled beside 1
WIDE = 5.2  # of a panel without legend in inches


Points = Sequence[tuple[float, float]]
"""(x, y) points of a curve."""


class LineStyle(NamedTuple):
    """Colour and dashes of a curve."""

    colour: str
    dashes: tuple[float, ...]


class Curve(NamedTuple):
    """A curve of a panel."""

    label: str
    points: Points
    style: int | None = None
    """Index of `line_style`; None: by label."""

    @property
    def x(self) -> list[float]:
        """x of each point."""
        return [x for x, _ in self.points]

    @property
    def y(self) -> list[float]:
        """y of each point."""
        return [y for _, y in self.points]


class Panel(NamedTuple):
    """Axes with curves; only axis labels may contain TeX mathematics."""

    x_label: str
    y_label: str
    curves: list[Curve]
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[float] = ()
    """Positions of dotted vertical lines."""
    x_min: float | None = None
    """Lower limit of the x-axis; None: automatic."""
    y_min: float | None = None
    """Lower limit of the y-axis; None: automatic."""


def line_style(number: int) -> LineStyle:
    """Return the style of an index: first all colours with solid lines, then with each type of dashes."""
    dashes, colour = divmod(number, len(COLOURS))
    return LineStyle(COLOURS[colour], DASHES[dashes % len(DASHES)])


def save_panels(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels side by side with a common legend, and save them as png, pdf or svg by the suffix of `path`."""
    columns = len(panels) if len(panels) <= 3 else math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    legend_width = 0.7 + 0.08 * max(map(len, labels))
    with canvas(WIDTH * columns + legend_width, HEIGHT * rows) as figure:
        drawn = {}
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
            _with_letters(axes.set_title(panel.title, parse_math=False))
            for curve, line in zip(panel.curves, draw_panel(axes, panel, labels), strict=True):
                drawn.setdefault(curve.label, line)
        legend = figure.legend(list(drawn.values()), labels, loc="outside right upper", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
            _with_letters(text)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:])


def svg(panel: Panel) -> str:
    """Return a panel as small SVG without texts; equal panels give equal bytes."""
    with canvas(WIDE, HEIGHT, tolerance=0.5) as figure:
        draw_panel(figure.add_subplot(), panel, [curve.label for curve in panel.curves])
        text = StringIO()
        unstamped = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(text, format="svg", transparent=True, metadata=unstamped)
    return text.getvalue()


@contextmanager
def canvas(width: float, height: float, tolerance: float = 1 / 9) -> Iterator["Figure"]:
    """Context with an empty figure of a size in inches.

    Points of long curves may be omitted if the line moves by less than `tolerance` pixels (points for pdf and svg).
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "pdf.fonttype": 42,  # text stays searchable in vector formats
            "svg.fonttype": "none",
            "svg.hashsalt": "diffuse",
            "font.sans-serif": ["DejaVu Sans", "Arial"],
            "axes.formatter.min_exponent": 4,  # 0.3 instead of 3 x 10^-1
            "path.simplify_threshold": tolerance,
        }
    ):
        yield Figure(figsize=(width, height), dpi=200, layout="constrained")


def _with_letters(text: "Text") -> None:
    """Choose a font with the letters of a text, or write them as escapes."""
    from matplotlib.font_manager import FontProperties

    words = text.get_text()
    font = font_file(words)
    if font is None:
        text.set_text(readable(words))
    elif font != dejavu():
        text.set_fontproperties(FontProperties(fname=font))


def _plain_numbers(axis: "Axis", values: Sequence[float]) -> None:
    """Label a logarithmic axis with 20 and 0.05 instead of powers of ten, or with its values if few and whole."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    if axis.get_scale() != "log":
        return
    places = sorted({value for value in values if value > 0})
    low, high = places[0], places[-1]
    apart = all(after >= APART * before for before, after in pairwise(places))
    if apart and len(places) <= MOST_PLACES and all(float(value).is_integer() for value in places):
        axis.set_major_locator(FixedLocator(places))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < DECADES * low else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def draw_panel(axes: "Axes", panel: Panel, labels: Sequence[str]) -> list["Line2D"]:
    """Draw the curves of a panel, and return their lines in order."""
    lines = []
    for curve in panel.curves:
        style = line_style(labels.index(curve.label) if curve.style is None else curve.style)
        lines += axes.plot(
            curve.x,
            curve.y,
            color=style.colour,
            linestyle=(0, style.dashes or None),
            linewidth=1.5,
            marker="o" if len(curve.points) <= FEW else "",
            markersize=3.5 if len(curve.points) > 1 else 7,
        )
    for mark in panel.marks:
        axes.axvline(mark, color="#999999", linestyle=":", linewidth=1)
    axes.set_xscale("log" if panel.log_x else "linear")
    axes.set_yscale("log" if panel.log_y else "linear")
    for axis, values in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        _plain_numbers(axis, [value for each in panel.curves for value in getattr(each, values)])
    axes.set_xlim(left=panel.x_min)
    axes.set_ylim(bottom=panel.y_min)
    axes.grid(which="both", color="#808080", alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return lines
