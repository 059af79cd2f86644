"""Charts: styles of curves, SVG for the page, and the curves in a run's log."""

import re
import warnings
from xml.etree import ElementTree

import pytest

from diffusion_cli.captions import dejavu
from diffusion_cli.charts import (
    COLOURS,
    DASHES,
    Curve,
    Panel,
    canvas,
    draw_panel,
    line_style,
    save_panels,
    svg,
)
from diffusion_cli.errors import FormatError
from diffusion_cli.runs.curves import read_curves


def path_of(panel: Panel) -> list[tuple[float, float]]:
    """The points of the only line in the first colour."""
    (path,) = (
        node.get("d", "")
        for node in ElementTree.fromstring(svg(panel)).iter("{http://www.w3.org/2000/svg}path")
        if COLOURS[0].lower() in node.get("style", "") and "clip-path" in node.attrib
    )
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_every_style_is_another_until_colours_and_dashes_are_used_up():
    count = len(COLOURS) * len(DASHES)
    assert len({line_style(number) for number in range(count)}) == count
    assert line_style(count) == line_style(0) == (COLOURS[0], ())


def test_a_curve_is_drawn_to_scale():
    curve = Curve("accuracy", [(0, 0.0), (100, 0.5), (200, 1.0)], 0)
    (x0, y0), (x1, y1), (x2, y2) = path_of(Panel("", "", [curve], x_min=0, y_min=0))
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=1e-5)
    assert x0 < x2
    assert y2 < y0, "larger values are higher"


def test_a_logarithmic_axis_places_values_by_their_ratio():
    curve = Curve("loss", [(0, 0.01), (1, 0.1), (2, 1.0)], 0)
    (_, y0), (_, y1), (_, y2) = path_of(Panel("", "", [curve], log_y=True))
    assert y1 == pytest.approx((y0 + y2) / 2, abs=1e-5)


def labels_of(points: list[tuple[float, float]], name: str) -> list[str]:
    """The labels on one of the logarithmic axes of a curve."""
    with canvas(4, 3) as figure:
        axes = figure.add_subplot()
        draw_panel(axes, Panel("", "", [Curve("", points)], log_x=True, log_y=True), [""])
        figure.draw_without_rendering()
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = axis.get_view_interval()
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        return [label.get_text() for place, label in ticks if low <= place <= high]


def test_logarithmic_axes_have_plain_numbers():
    points = [(5.0, 19.1), (10.0, 4.2), (20.0, 0.61), (50.0, 0.58)]
    assert labels_of(points, "x") == ["5", "10", "20", "50"]
    assert labels_of(points, "y") == ["0.5", "1", "2", "5", "10", "20"]
    assert labels_of([(float(n), 0.5) for n in range(1, 10)], "x")[:3] == ["1", "2", "5"]
    assert labels_of([(1.0, 1e-3), (2.0, 10.0)], "y") == ["0.001", "0.01", "0.1", "1", "10"]
    assert labels_of([(7.0, 0.3)], "x") == ["7"]


def test_letters_without_a_font_are_escapes_in_a_legend(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_cli.charts.font_file", lambda text: None if "猫" in text else dejavu())
    monkeypatch.setattr("diffusion_cli.captions.font_file", lambda text: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_panels([Panel("x", "y", [Curve("猫 1", [(0, 1.0)])], title="кошка")], tmp_path / "x.svg")
    drawing = (tmp_path / "x.svg").read_text()
    assert "\\u732b 1</text>" in drawing
    assert ">кошка</text>" in drawing


def test_a_single_point_is_a_large_mark():
    with canvas(4, 3) as figure:
        curves = [Curve("a", [(1, 1.0)]), Curve("b", [(1, 1.0), (2, 2.0)])]
        one, two = draw_panel(figure.add_subplot(), Panel("", "", curves), ["a", "b"])
    assert one.get_marker() == two.get_marker() == "o"
    assert one.get_markersize() > two.get_markersize()


def test_a_long_curve_is_small_and_keeps_its_extremes():
    points = [(step, float(step * 7919 % 7)) for step in range(20000)]
    points[12345] = (12345, 99.0)
    panel = Panel("", "", [Curve("loss", points, 0)], x_min=0, y_min=0)
    drawn = path_of(panel)
    assert len(svg(panel)) < 80_000
    floor, top = max(y for _, y in drawn), min(y for _, y in drawn)
    usual = sorted(y for _, y in drawn)[1:]
    assert (floor - min(usual)) / (floor - top) == pytest.approx(6 / 99, abs=0.01)


def test_equal_panels_give_equal_bytes_without_texts_of_the_user():
    panel = Panel("x", "y", [Curve("$\\frac$ <script>", [(0, 1.0)], 0)], title="<b>")
    assert svg(panel) == svg(panel)
    assert "script" not in svg(panel)
    assert "frac" not in svg(panel)


def test_cells_that_are_no_number_and_rows_cut_short_are_passed_over(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,val_loss\n1,nan,0.5\n2,inf,\n3,0.25,0.125\nx,1,1\n4,y,1e300\n5,0.2")
    assert read_curves(path) == {
        "loss": [(3, 0.25), (5, 0.2)],
        "val_loss": [(1, 0.5), (3, 0.125)],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no column step"), ("time,loss\n1,2\n", "no column step"), ("step" + ",a" * 200, "more than 200")],
)
def test_a_table_without_steps_is_refused(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_curves(path)
