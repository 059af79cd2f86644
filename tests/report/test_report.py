"""The report: curves, results and configurations, without markup from a user."""

import base64
import html
import json
import re

import pytest
import torch

from diffusion_cli import config
from diffusion_cli.charts import COLOURS, DASHES, line_style
from diffusion_cli.cli import run as diffuse
from diffusion_cli.metrics import Report, Result
from diffusion_cli.report.explanations import explained
from diffusion_cli.report.page import comparable, panels, side_by_side
from diffusion_cli.runs.overview import data_name
from helpers.reports import HOSTILE, make, picture, text_of, written


def result(name: str = "fid", value: float = 1.5, steps: int = 50, **protocol) -> dict:
    sampling = {
        "step": 1200,
        "weights": "ema",
        "sampler": {"_target_": "diffusion_cli.samplers.DDIM"},
        "steps": steps,
        "guidance": {"_target_": "diffusion_cli.diffusion.guidance.ClassifierFree", "scale": 1.5},
    }
    environment = {"device": "cpu", "versions": {"diffuse": "0.0.7", "torch": "2.99"}}
    about = {
        "samples": 100,
        "features": {"name": "inception"},
        "sampling": sampling,
        "environment": environment,
    }
    about |= protocol
    return {"name": name, "value": value, "details": {"reference_distance": 0.25}, "protocol": about}


# --- Curves ------------------------------------------------------------


def test_columns_that_belong_together_share_a_panel_whatever_they_are_called():
    points = [(50, 0.5), (100, 0.25)]
    columns = ["loss", "loss_q1", "loss_q2", "loss_q3", "lr", "val_loss", "fid_ema"]
    (one, levels, lr, fid) = panels({"a": dict.fromkeys(columns, points)})
    assert [curve.label for curve in one.curves] == ["loss", "val_loss"]
    assert [curve.label for curve in levels.curves] == ["loss_q1", "loss_q2", "loss_q3"]
    assert [panel.log_y for panel in (one, levels, lr, fid)] == [True, True, False, False]
    assert [curve.style for curve in levels.curves] == [0, 1, 2]
    assert [panel.title for panel in panels({"a": {"val_accuracy": points}})] == ["val_accuracy"]


def test_axes_begin_at_zero_unless_values_are_negative_or_on_a_log_scale():
    points = {"lr": [(50, 0.5)], "bound": [(50, -0.5), (60, 0.5)], "loss": [(50, 0.5)]}
    assert [(panel.x_min, panel.y_min) for panel in panels({"a": points})] == [(0, 0), (0, None), (0, None)]
    (negative,) = panels({"a": {"loss": [(0, 1.0), (1, -1.0)]}})
    assert not negative.log_y
    assert negative.y_min is None


def test_a_run_has_one_colour_in_every_panel():
    points = [(50, 0.5), (100, 0.25)]
    a = dict.fromkeys(["loss", "val_loss", "loss_q1", "loss_q2", "loss_q3"], points)
    found = panels({"a": a, "b": {"loss": points, "loss_q3": points}})
    assert [panel.title for panel in found] == ["loss", "loss_q1", "loss_q2", "loss_q3"]
    styles = [(curve.label, *line_style(curve.style or 0)) for curve in found[0].curves]
    assert styles == [
        ("a: loss", COLOURS[0], DASHES[0]),
        ("a: val_loss", COLOURS[0], DASHES[1]),
        ("b: loss", COLOURS[1], DASHES[0]),
    ]
    assert [(curve.label, curve.style) for curve in found[3].curves] == [("a", 0), ("b", 1)]


def test_the_page_shows_each_panel_with_a_legend_in_the_colours_of_its_curves(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "two")
    page = written(tmp_path, "run=[one,two]")
    drawings = re.findall(r'<img class="chart" src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', page)
    assert [title for _, title in drawings] == ["loss over steps", "lr over steps"]
    legend = re.findall(r'stroke="(#\w+)" stroke-dasharray=""/></svg>(\w+)</li>', page)
    assert legend == [(COLOURS[0], "one"), (COLOURS[1], "two")] * 2
    for content, _ in drawings:
        drawing = base64.b64decode(content).decode()
        assert all(colour.lower() in drawing for colour in COLOURS[:2])
        assert "<script" not in drawing


# --- The text about runs ------------------------------------------------------------


def test_keys_that_differ_come_first_and_an_absent_one_differs_from_null():
    rows = side_by_side([{"same": 1, "lr": 0.1, "path": None}, {"same": 1, "lr": 0.2}])
    assert [tuple(row) for row in rows] == [
        ("lr", ["0.1", "0.2"], True),
        ("path", ["null", "–"], True),
        ("same", ["1", "1"], False),
    ]
    assert [tuple(row) for row in side_by_side([None, {"a": 1}])] == [("a", ["–", "1"], False)]


def report(*results: dict) -> Report:
    return Report([Result(**one) for one in results], [])


def test_the_newest_result_of_a_name_stands_for_it():
    histories = [[report(result("fid", 9.0), result("is", 4.0)), report(result("fid", 3.0))]]
    assert [(row.name, row.results[0].value) for row in comparable(histories) if row.results[0]] == [
        ("fid", 3.0),
        ("is", 4.0),
    ]


@pytest.mark.parametrize(
    ("name", "ratio", "samples", "said"),
    [
        ("fid", 0.59, 2000, "0.59 times the distance of 359 other real images from the reference. The ratio depends on "
         "the numbers of images, and there are 2,000 samples."),
        ("fd_dinov2", 1.3, 359, "1.3 times as far from the reference as other real images are. 1 is as close as real "
         "images."),
        ("frechet_classifier", 0.9, 359, "below 1 is chance, or samples that resemble training images."),
        ("frechet_classifier", None, 300, "Distance between the features of the samples and of real images"),
        ("frechet_classifier", "<b>", 300, "Distance between the features of the samples and of real images"),
        ("rfrechet_classifier", None, 300, "reconstructions and of their originals"),
        ("precision_classifier", None, 300, "Share of the samples that are near real images"),
        ("is", None, 300, "at least 1"),
        ("my_own", None, 300, ""),
    ],
)  # fmt: skip
def test_each_number_has_a_sentence(name, ratio, samples, said):
    details = {} if ratio is None else {"ratio_to_reference": ratio, "reference_distance_images": 359}
    sentence = explained(Result(name, 1.5, details, {"samples": samples}))
    assert said in sentence
    assert bool(said) == bool(sentence)


def test_the_distance_for_equal_numbers_of_images_comes_first():
    details = {"ratio_to_reference": 0.0848, "reference_distance_images": 359}
    details |= {"equal_size_ratio": 0.353, "equal_size_images": 359}
    sentence = explained(Result("fid", 0.05, details, {"samples": 1000}))
    assert sentence == (
        "With 359 images each, 0.35 times as far from the reference as other real images are. 1 is as close as real "
        "images; below 1 is chance, or samples that resemble training images."
    )


def test_every_metric_of_this_program_has_a_sentence():
    sources = "".join(file.read_text() for file in (config.HERE / "metrics").glob("*.py"))
    written = re.findall(r'(?:NAME = |name = |MetricValue\(|named\(|\b_mean\()"(\w+)"', sources)
    assert len(set(written)) > 10
    assert [name for name in written if not explained(Result(name, 1.0, {}, {})) and name != "pixels"] == []


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ({"_target_": "diffusion_cli.data.FashionMNIST"}, "fashion_mnist"),
        ({"_target_": "diffusion_cli.data.CIFAR10", "path": None}, "cifar10"),
        ({"_target_": "diffusion_cli.data.Folder", "path": "/home/me/my photos"}, "my photos"),
    ],
)
def test_data_have_the_name_that_the_user_wrote(node, name):
    assert data_name(node) == name


def test_results_of_unlike_protocols_are_not_to_be_compared():
    first, steps = [report(result(steps=50))], [report(result(steps=10))]
    fewer = [report(result(samples=70))]
    assert comparable([first, steps])[0].unlike == [], "how samples are made is what is compared"
    assert comparable([first, [], fewer])[0].unlike == ["samples"]
    of_model = [[report(result("bits_per_dim", sampling={}, model={"step": step}))] for step in (1, 2)]
    assert comparable(of_model)[0].unlike == []


def test_a_page_says_what_the_folder_holds(tmp_path):
    folder = make(tmp_path / "demo", "max_steps=2400")
    picture(folder / "samples" / "ddim-50-abc" / "grid.png", 99)
    manifest = {
        "settings": {"steps": 50, "sampler": {"eta": 0.5}},
        "step": 1200,
        "seeds": [[0, 1], 2],
        "versions": {},
    }
    (folder / "samples" / "ddim-50-abc" / "manifest.json").write_text(json.dumps(manifest))
    picture(folder / "samples" / "ddim-50-abc" / "strip.png", 97)
    picture(folder / "previews" / "real.png", 96)
    picture(folder / "edits" / "inpaint-abc" / "grid.png", 95)
    picture(folder / "comparisons" / "samplers" / "plot.png", 98)
    (folder / "comparisons" / "samplers" / "table.csv").write_text(
        'sampler,calls,seconds\n"ddim, eta 0",50,0.0012345678\n'
    )
    history = [
        {"results": [result("fid", 9.125), result("is", 4.5)], "notes": ["an old note"]},
        {"results": [result("fid", 3.0625)], "notes": ["a new note"]},
    ]
    (folder / "metrics.json").write_text(json.dumps(history))
    page = written(tmp_path)
    seen = text_of(page)
    for words in (
        "1,200 of 2,400", "1 × 8 × 8", "0.15M", "1,438 images of digits", "cat, dog", "sampler.eta 0.5", "images 3",
        "lightning 2.88", "diffuse 0.0.7, torch 2.99, cpu", f"torch {torch.__version__} and Python",
        "fid 3.0625 step 1200, DDIM, 50 steps, ClassifierFree of scale 1.5, 100 samples",
        "smaller is better. reference_distance 0.25",
        "features.name inception", "a new note", "from noise to image", "real images", "inpaint-abc",
        "Distance between the features of the samples and of real images; smaller is better.",
        "sampler calls seconds ddim, eta 0 50 0.001235", "model.channels", "step 1000",
    ):  # fmt: skip
        assert words in seen, words
    values = re.findall(
        r'<td class="numeric">(\d+)</td><td>(\w+)</td><td class="numeric">([\d.]+)</td>', page
    )
    assert values == [("2", "fid", "3.0625"), ("1", "fid", "9.125"), ("1", "is", "4.5")], (
        "history, newest first"
    )
    for file in [*folder.rglob("*.png")]:
        assert base64.b64encode(file.read_bytes()).decode() in page


@pytest.mark.parametrize(
    "target", ["diffusion_cli.guidance.Unguided", "diffusion_cli.diffusion.guidance.NoGuidance"]
)
def test_samples_without_guidance_are_described_without_one(tmp_path, target):
    plain = result()
    plain["protocol"]["sampling"]["guidance"] = {"_target_": target}
    folder = make(tmp_path / "demo")
    (folder / "metrics.json").write_text(json.dumps([{"results": [plain], "notes": []}]))
    assert "DDIM, 50 steps, 100 samples" in text_of(written(tmp_path))


def test_everything_is_in_one_file(tmp_path):
    make(tmp_path / "demo")
    page = written(tmp_path)
    asked = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]*)""", page)
    assert asked
    assert all(value.startswith("data:") for value in asked)
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page, "and a browser would refuse it"


def test_what_a_user_wrote_is_text(tmp_path):
    folder = make(tmp_path / HOSTILE, "data_dir='<b>bold</b>'", classes=("<script>cat", "dog"))
    (folder / "metrics.csv").write_text('step,loss,"<i>x</i>"\n1,2,3\n2,3,4\n')
    hostile = {"results": [result("<u>fid</u>", label="<s>x</s>")], "notes": ["<em>note</em>"]}
    (folder / "metrics.json").write_text(json.dumps([hostile]))
    (folder / "comparisons" / "<tt>").mkdir(parents=True)
    (folder / "comparisons" / "<tt>" / "table.csv").write_text("<q>,1\n<q>,2\n")
    page = written(tmp_path)
    for words in (
        HOSTILE, "<b>bold</b>", "<script>cat", "<i>x</i>", "<u>fid</u>", "<s>x</s>", "<em>note</em>", "<tt>", "<q>"
    ):  # fmt: skip
        assert html.escape(words).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
        assert words not in page
    assert page.count("<script") == 1
    assert "|safe" not in (config.HERE / "report" / "template.html").read_text().replace(" ", "")


def test_runs_side_by_side_mark_the_keys_that_differ(tmp_path):
    make(tmp_path / "one", "optimizer.lr=0.125")
    make(tmp_path / "two", "optimizer.lr=0.25", steps=(250, 1000))
    assert diffuse(["report", "run=[one,two]", f"output_dir={tmp_path}"]) == 0
    page = (tmp_path / "report.html").read_text()
    configuration = page[page.index('id="configuration"') : page.index('id="environment"')]
    rows = re.findall(r"<tr( class=\"differs\")?>\s*<th>([^<]*)</th>((?:<td>[^<]*</td>)*)", configuration)
    marked = [(key, re.findall(r"<td>([^<]*)</td>", cells)) for differs, key, cells in rows if differs]
    assert marked == [("optimizer.lr", ["0.125", "0.25"])]
    assert next(key for _, key, cells in rows if cells) == "optimizer.lr"
    assert 'data-steps="250 500 1000"' in page


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [make(tmp_path / place / "demo") for place in ("a", "b")]
    page = text_of(written(tmp_path, f"run=[{folders[0]},{folders[1]},{folders[0]}]"))
    assert "2 runs side by side" in page, "the same folder twice is one run"
    assert f"{folders[0]} · {folders[1]}" in page


def test_the_report_explains_the_ratio_of_distances():
    sentence = explained(Result("memorization_classifier", 0.1, {"median_distance_ratio": 0.25}, {}))
    assert sentence.startswith("Share of the samples nearer to a training image")
    assert "0.25 times that of real images; far below 1 is a sign of copies." in sentence
