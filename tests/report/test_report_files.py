"""Reports of damaged runs, and the report in a browser."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from diffusion_cli.cli import run as diffuse
from diffusion_cli.report.record import MOST_PREVIEWS, read_record
from diffusion_cli.runs.checkpoint import LAST
from helpers import CHROMIUM, browse
from helpers.reports import HOSTILE, make, picture, text_of, written

# --- What is missing, damaged or in the way ------------------------------------------------------------


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


# --- In a browser ------------------------------------------------------------

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
