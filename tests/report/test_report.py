"""The page about runs: all of it in one file, nothing of it markup that a user wrote, and it works in a browser."""

import base64
import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_cli import config
from diffusion_cli.charts import COLOURS, DASHES, line_style
from diffusion_cli.cli import run as diffuse
from diffusion_cli.metrics import Report, Result
from diffusion_cli.report.page import comparable, panels, side_by_side
from diffusion_cli.report.record import MOST_PREVIEWS, read_record
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.runs.migrate import FORMAT
from helpers import CHROMIUM, browse

HOSTILE = """a "b" 'c' & <img src=x onerror=hacked=1><script>hacked=1"""


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path)


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


def make(
    folder: Path, *words: str, classes: tuple[str, ...] = ("cat", "dog"), steps: tuple[int, ...] = (500, 1000)
):
    """A run's folder, with a checkpoint that holds no more than the page reads."""
    trained = config.load("train", ["name=x", *words]).model_dump()
    about = {
        "format": FORMAT, "task": "diffusion", "config": trained, "shape": [1, 8, 8],
        "form": {"kind": "picture"}, "latent": None, "stages": None, "num_images": 1438,
        "num_classes": len(classes), "class_names": list(classes),
    }  # fmt: skip
    checkpoint = {
        "diffuse": about,
        "global_step": 1200,
        "pytorch-lightning_version": "2.88",
        "callbacks": {"EMA": {"network": {"weight": torch.zeros(300, 500)}}},
    }
    (folder / LAST).parent.mkdir(parents=True)
    torch.save(checkpoint, folder / LAST)
    for shade, step in enumerate(steps):
        picture(folder / "previews" / f"step_{step:08d}.png", shade)
    rows = [f"{step},{1 / step},{0.001 * step}" for step in range(50, 1250, 50)]
    (folder / "metrics.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n")
    return folder


def written(root: Path, *words: str) -> str:
    """The page of `diffuse report`, which is to be in `page.html`."""
    output = root / "page.html"
    assert diffuse(["report", f"output_dir={root}", f"output={output}", *words]) == 0
    return output.read_text()


def text_of(page: str) -> str:
    """What a reader sees, markup and style taken away."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


# --- Curves --------------------


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


# --- The text about runs --------------------


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
    picture(folder / "comparisons" / "samplers" / "plot.png", 98)
    (folder / "comparisons" / "samplers" / "table.csv").write_text('sampler,calls\n"ddim, eta 0",50\n')
    history = [
        {"results": [result("fid", 9.125), result("is", 4.5)], "notes": ["an old note"]},
        {"results": [result("fid", 3.0625)], "notes": ["a new note"]},
    ]
    (folder / "metrics.json").write_text(json.dumps(history))
    page = written(tmp_path)
    seen = text_of(page)
    for words in (
        "1,200 of 2,400", "1 × 8 × 8", "0.15M", "1,438 images of Digits", "cat, dog", "sampler.eta 0.5", "images 3",
        "lightning 2.88", "diffuse 0.0.7, torch 2.99, cpu", f"torch {torch.__version__} and Python",
        "fid 3.0625 step 1200, DDIM, 50 steps, ClassifierFree of scale 1.5, 100 samples reference_distance 0.25",
        "features.name inception", "a new note",
        "sampler calls ddim, eta 0 50", "model.channels", "step 1000",
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


# --- What is missing, damaged or in the way --------------------


def test_a_bare_run_has_a_page(tmp_path):
    folder = make(tmp_path / "demo", steps=())
    (folder / "metrics.csv").unlink()
    page = written(tmp_path)
    assert re.findall(r'<section id="(\w+)"', page) == ["configuration", "environment"]
    assert "<script" not in page
    assert "evaluated with unknown" in text_of(page)


def test_damaged_files_are_left_out_in_a_line(tmp_path):
    folder = make(tmp_path / "demo")
    picture(folder / "samples" / "x" / "grid.png", 99)
    (folder / "samples" / "x" / "manifest.json").write_text("{")
    (folder / "metrics.csv").write_text("time,loss\n1,2\n")
    (folder / "comparisons" / "x").mkdir(parents=True)
    (folder / "comparisons" / "x" / "table.csv").write_bytes(b"\xff\xfe\x00")
    record = read_record(folder, "demo")
    assert [remark.partition(" ")[0] for remark in record.remarks] == [
        "metrics.csv", "samples/x/manifest.json", "comparisons/x/table.csv",
    ]  # fmt: skip
    assert record.samples is not None
    assert record.samples.settings == {}
    assert all(
        html.escape(remark).replace("&#x27;", "&#39;") in written(tmp_path) for remark in record.remarks
    )


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda last: last.write_bytes(b"x")], ids=["gone", "damaged"]
)
def test_without_a_whole_last_checkpoint_the_page_is_of_the_one_before(tmp_path, damage):
    last = make(tmp_path / "demo") / LAST
    shutil.copy(last, last.with_name("step_00001200.ckpt"))
    damage(last)
    assert "using step 1200, step_00001200.ckpt." in text_of(written(tmp_path))


def test_of_very_many_previews_some_are_shown_and_that_is_said(tmp_path):
    folder = make(tmp_path / "demo", steps=tuple(range(10, 10 * MOST_PREVIEWS + 300, 10)))
    record = read_record(folder, "demo")
    steps = list(record.previews)
    assert (len(steps), steps[0], steps[-1]) == (MOST_PREVIEWS, 10, 10 * MOST_PREVIEWS + 290)
    assert record.remarks == [f"{MOST_PREVIEWS} of the {MOST_PREVIEWS + 29} pictures in previews are shown."]


@pytest.mark.parametrize(
    "content", ["{", '{"fid": 3}', '[{"results": [{"name": "fid"}]}]', '[{"results": 3, "notes": []}]']
)
def test_a_damaged_metrics_json_is_one_line(tmp_path, capsys, content):
    folder = make(tmp_path / "demo")
    (folder / "metrics.json").write_text(content)
    assert diffuse(["report", f"output_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffuse: {folder / 'metrics.json'}: ")
    assert line.endswith("; repair it or move it away")
    assert not (folder / "report.html").exists()


def test_only_a_page_of_ours_is_replaced(tmp_path, capsys):
    folder = make(tmp_path / "demo")
    page = folder / "report.html"
    words = ["report", f"output_dir={tmp_path}"]
    assert diffuse(words) == 0
    first = page.read_text()
    page.write_text(first.replace("diffuse 0", "diffuse 99.0", 1) + "<!-- older -->")
    assert diffuse(words) == 0
    assert page.read_text() == first, "and the same run has the same page"
    capsys.readouterr()
    for mine in ("", "<html>my notes on diffuse</html>"):
        page.write_text(mine)
        assert diffuse(words) == 2
        assert page.read_text() == mine
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"diffuse: output={page}: was not written by diffuse report; choose another file"
    assert diffuse([*words, f"output={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"diffuse: output={tmp_path}: is a folder; give a file\n"


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    make(tmp_path / "demo")
    assert diffuse(["report", "run=[demo,damo]", f"output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("diffuse: run=damo: does not exist")
    assert diffuse(["report", "run=[]", f"output_dir={tmp_path}"]) == 2
    assert "run=[]: " in capsys.readouterr().err


# --- In a browser --------------------

WATCH = """<script>
  const wrong = [];
  addEventListener("error", (event) => wrong.push(event.message || "resource"), true);
  addEventListener("securitypolicyviolation", (event) => wrong.push(event.blockedURI));
</script>"""

DRIVE = """<script>
  const range = document.querySelector("input[type=range]"), seen = [];
  for (let at = Number(range.max); at >= 0; at--) {
    range.value = at;
    range.dispatchEvent(new Event("input"));
    seen.push({
      text: document.querySelector("output").textContent,
      aria: range.getAttribute("aria-valuetext"),
      steps: [...document.querySelectorAll(".previews")].map((run) =>
        [...run.querySelectorAll("img")].filter((img) => img.offsetWidth > 0).map((img) => img.dataset.step)),
    });
  }
  addEventListener("load", () => {
    document.body.dataset.found = JSON.stringify({
      seen, wrong, hacked: typeof hacked,
      heading: document.querySelector("h1").textContent,
      injected: document.querySelectorAll("img[onerror], img[src=x]").length,
      scripts: document.scripts.length,
      broken: [...document.images].filter((img) => !img.naturalWidth).length,
      requests: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length,
      wider: document.documentElement.scrollWidth - innerWidth,
drawn: [...document.querySelectorAll(".chart")].map((image) => image.getBoundingClientRect().width > 300),
    });
  });
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_the_page_works_in_a_browser(tmp_path, size):
    make(tmp_path / HOSTILE, classes=(HOSTILE, "dog"))
    make(tmp_path / "other", steps=(500, 750))
    page = written(tmp_path, f"run=[{json.dumps(str(tmp_path / HOSTILE))},other]")
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{DRIVE}</body>", 1))
    dom, log = browse(driven.as_uri(), tmp_path / "profile", f"--window-size={size}")
    assert "CONSOLE" not in log, log
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, dom[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert [(at["text"], at["aria"], at["steps"]) for at in found["seen"]] == [
        ("step 1000", "step 1000", [["1000"], ["750"]]),
        ("step 750", "step 750", [["500"], ["750"]]),
        ("step 500", "step 500", [["500"], ["500"]]),
    ]
    assert found["heading"] == f"{HOSTILE} · other"
    assert found["wrong"] == []
    assert found["hacked"] == "undefined"
    assert (found["injected"], found["broken"], found["requests"]) == (0, 0, 0)
    assert found["scripts"] == 3, "the page's, and the two of this test"
    assert found["wider"] <= 0, "nothing to scroll sideways"
    assert found["drawn"] == [True, True]
