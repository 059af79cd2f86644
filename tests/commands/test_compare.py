"""`diffuse compare`: one table of runs, samplers and steps."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands import compare
from diffusion_cli.config import EvalConfig
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction
from helpers import TINY
from helpers.evaluation import WORDS, evaluate, other_forms


def test_runs_are_set_beside_each_other_and_unlike_protocols_refused(eval_runs, capsys):
    for name in "ab":
        assert evaluate(eval_runs, f"run={name}", "num_samples=70", "metric=is", "metric.is.splits=2") == 0
    capsys.readouterr()
    assert run(["eval", f"output_dir={eval_runs}/o", "compare=[a,b]"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "is_classifier" in head
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| a", "| b"]
    assert evaluate(eval_runs, "run=b", "num_samples=70", "metric=is", "metric.is.splits=5") == 0
    capsys.readouterr()
    assert run(["eval", f"output_dir={eval_runs}/o", "compare=[a,b]"]) == 2
    assert (
        "is_classifier of a and b: splits); measure them alike, or set force=true" in capsys.readouterr().err
    )
    assert run(["eval", f"output_dir={eval_runs}/o", "compare=[a,b]", "force=true"]) == 0
    assert "*" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_measures_each_combination_once(eval_runs, capsys):
    words = [
        "compare",
        "run=a",
        f"output_dir={eval_runs}/o",
        f"cache_dir={eval_runs}/cache",
        "features=classifier",
    ]
    words += ["features.steps=20", "num_samples=70", "metric=[fid,is]"]
    assert run([*words, "sampler=[ddim,ddpm]", "steps=[1,2]"]) == 0
    seen = capsys.readouterr()
    assert "[4/4] sampler=ddpm steps=2" in seen.err
    folder = Path(seen.out.strip().rpartition("Table and plot: ")[2])
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler"], row["steps"], row["network calls"]) for row in rows] == [
        ("ddim", "1", "1"), ("ddim", "2", "2"), ("ddpm", "1", "1"), ("ddpm", "2", "2"),
    ]  # fmt: skip
    assert all(float(row["frechet_classifier"]) > 0 for row in rows)
    assert Image.open(folder / "plot.png").size[0] > 500
    assert run([*words, "sampler=[ddim,ddpm,euler]", "steps=[2,1]"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert told == ["[5/6] sampler=euler steps=2", "[6/6] sampler=euler steps=1"]
    store = sorted((eval_runs / "o" / "a" / "compared").iterdir())
    for file, text in zip(store, ("{", "[]", '{"row": 1}'), strict=False):
        file.write_text(text)
    assert run([*words, "sampler=[ddim,ddpm,euler]", "steps=[2,1]"]) == 0
    lines = capsys.readouterr().err.splitlines()
    damaged = {line.partition(" is damaged")[0] for line in lines if line.startswith("diffuse")}
    assert damaged == {f"diffuse: {file}:" for file in store[:3]}
    assert sum(line.startswith("[") for line in lines) == 3


@pytest.mark.slow
def test_a_comparison_without_costs_has_a_table_and_no_plot(eval_runs, capsys):
    words = [
        "compare",
        "run=a",
        f"output_dir={eval_runs}/o",
        f"cache_dir={eval_runs}/cache",
        "precision=fp32",
    ]
    coarse = [f"metric.flow_likelihood.{word}" for word in ("num_images=2", "rtol=0.1", "atol=0.1")]
    assert run([*words, "metric=flow_likelihood", *coarse, "weights=[ema,raw]"]) == 0
    out = capsys.readouterr().out
    assert "raw" in out
    folder = Path(out.strip().rpartition("\nTable: ")[2])
    assert (folder / "table.csv").is_file()
    assert not (folder / "plot.png").exists()


def entry_of(details: dict[str, float], notes: list[str], samples: int = 500) -> dict:
    result = {"name": "fid", "value": 2.0, "details": details, "protocol": {"samples": samples}}
    return {"reports": [{"results": [result], "notes": notes}]}


def test_biased_distances_are_marked_in_the_table_and_the_plot(eval_runs, tmp_path, capsys, monkeypatch):
    panels = []
    monkeypatch.setattr(compare, "save_panels", lambda drawn, path: panels.extend(drawn))
    words = [f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", f"output={tmp_path}/table", *WORDS]
    few = ["metric=[fid,is]", "metric.is.splits=1", "num_samples=9", "force=true"]
    assert run(["compare", "run=a", *words, *few, "steps=[1,2]"]) == 0
    head, _, one, two, mark, *_ = capsys.readouterr().out.splitlines()
    column = head.split(" | ").index("frechet_classifier")
    for row in (one, two):
        assert [place for place, cell in enumerate(row.split(" | ")) if cell.endswith("*")] == [column]
    assert mark == "(*) frechet_classifier: biased, because it needs at least 65 samples and real images"
    assert {panel.y_label for panel in panels} == {"frechet_classifier*", "is_classifier"}


def test_notes_are_about_numbers_of_the_table():
    about_details = [
        "reference distance: 359 real images of val",
        "equal_size: 359 samples, and 359 real images",
    ]
    details = {"reference_distance": 3.0, "equal_size_images": 359}
    entry = entry_of(details, [*about_details, "class shares: those of digits/val"])
    assert list(compare._notes(entry)) == ["class shares: those of digits/val"]


@pytest.mark.parametrize(("samples", "repeats", "noted"), [(500, 1, True), (1000, 1, False), (500, 5, False)])
def test_a_note_names_few_samples(samples, repeats, noted):
    job = compare.ComparisonJob({}, EvalConfig.model_construct(repeats=repeats), None)  # pyright: ignore
    notes = compare._on_noise([job], [entry_of({}, [], samples)])
    assert bool(notes) == noted
    assert all("with 500 samples; raise num_samples, or set repeats=5" in note for note in notes)


def test_the_line_of_real_images_is_that_of_as_many_images():
    details = {"reference_distance": 3.0, "reference_distance_images": 359}
    equal = {"equal_size_reference": 4.0, "equal_size_images": 100}
    for found, label, value in ((details, "359 real images", 3.0), (details | equal, "100 real images", 4.0)):
        points = [{"steps": steps, compare.CALLS: steps, "fid": 5.0} for steps in (5, 10)]
        panels = compare._panels(points, [{"fid": compare._distance_of_real(found)}], ["steps"])
        line = panels[0].curves[-1]
        assert (line.label, set(line.y)) == (label, {value})
    assert compare._distance_of_real({}) is None


def test_the_first_call_of_a_network_is_not_timed(eval_runs, monkeypatch):
    """Times are those of a clock that counts network calls."""
    calls, times, forward = [0], [], Denoiser.forward

    def counting(*arguments: Any) -> Prediction:
        calls[0] += 1
        return forward(*arguments)

    def clock() -> float:
        times.append(calls[0])
        return calls[0]

    monkeypatch.setattr(Denoiser, "forward", counting)
    monkeypatch.setattr("diffusion_cli.commands.samples.time.perf_counter", clock)
    words = [f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *WORDS, "run=b", "metric=is"]
    assert run(["compare", *words, "steps=[3]", "num_samples=12", "metric.is.splits=1"]) == 0
    assert times[0] == 1
    assert calls[0] == 1 + 3


def test_memory_that_runs_out_names_the_batch_size(eval_runs, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("diffusion_cli.diffusion.denoiser.Denoiser.forward", refuse)
    shared = [
        f"output_dir={eval_runs}/o",
        f"cache_dir={eval_runs}/cache",
        *WORDS,
        "run=b",
        "metric=is",
        "num_samples=11",
    ]
    for words in (["eval", "steps=2"], ["compare", "steps=[2,3]"]):
        assert run([*words, *shared]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "diffuse: " in line]
    assert len(lines) == 2
    assert all("batch_size=50: cpu is out of memory; try batch_size=25, or auto" in line for line in lines)


def poisoned(entry: dict, kind: str) -> None:
    """Change an entry of a comparison as a bit flip, a stranger, or a copy from another run would."""
    if kind != "number":
        del entry["crc32"]
    if kind in ("number", "row"):
        entry["row"]["is_classifier"] += 0.5
    if kind == "number":
        entry["reports"][0]["results"][0]["value"] += 0.5
    if kind == "weights":
        del entry["facts"]
        entry["reports"][0]["results"][0]["protocol"]["sampling"]["weights_sha256"] = "0" * 64
    if kind == "settings":
        entry["facts"]["seed"] = 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["number", "row", "weights", "settings", "notes", "earlier version"])
def test_stored_numbers_are_held_to_their_checksum_weights_and_settings(eval_runs, capsys, kind):
    words = ["compare", "run=b", f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *WORDS]
    words += ["num_samples=10", "metric=is", "metric.is.splits=1", "steps=[1,2]"]
    assert run(words) == 0
    expected = capsys.readouterr().out
    file = min((eval_runs / "o" / "b" / "compared").iterdir())
    entry = json.loads(file.read_text())
    poisoned(entry, kind)
    if kind == "notes":
        entry["reports"][0]["notes"] = ["\x1b]0;title\x07\nnote: \x1b[31mred"]
    if kind == "earlier version":
        del entry["facts"]
    file.write_text(json.dumps(entry))
    assert run(words) == 0
    seen = capsys.readouterr()
    assert ("is damaged" in seen.err) == (kind not in ("notes", "earlier version"))
    assert seen.out.replace("\n", "").isprintable()
    assert len(seen.out.splitlines()) == len(expected.splitlines()) + (kind == "notes")
    file.unlink()


def test_a_comparison_is_made_anew_where_what_it_depends_on_changed(eval_runs, images, tmp_path, capsys):
    (real,) = [path for path in other_forms(images, tmp_path) if path.suffix == ".npy"]
    words = [
        "compare",
        "run=a",
        f"output_dir={eval_runs}/o",
        f"cache_dir={eval_runs}/cache",
        "features=classifier",
    ]
    words += ["features.steps=20", "num_samples=30", "metric=precision_recall", "steps=[1,2]"]
    words += ["reference=images", f"reference.path={real}", f"output={tmp_path}/table"]
    assert run(words) == 0
    first = (tmp_path / "table" / "table.csv").read_text()
    assert run(words) == 0
    assert (tmp_path / "table" / "table.csv").read_text() == first  # to the second
    np.save(real, np.random.RandomState(0).randint(0, 256, (50, 8, 8)).astype(np.uint8))
    capsys.readouterr()
    assert run(words) == 0
    assert "[2/2] steps=2" in capsys.readouterr().err


def test_a_comparison_of_runs_marks_numbers_of_unlike_protocols(eval_runs, tmp_path, capsys):
    words = ["max_steps=1", "dataset.val_fraction=0.5", f"output_dir={eval_runs}/o", "name=c"]
    assert run([*TINY, *words]) == 0
    words = ["steps=1", "num_samples=20", "metric=[is,precision_recall]", "metric.is.splits=2", "run=[b,c]"]
    common = ["compare", f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *WORDS]
    assert run([*common, *words, f"output={tmp_path}/table"]) == 0
    table = (tmp_path / "table" / "table.md").read_text()
    (first, second) = [line for line in table.splitlines() if line.startswith(("| b ", "| c "))]
    assert "*" not in first
    assert second.count("*") == 3
    assert "(*) precision_classifier: the protocols of run=c and run=b differ in features, reference" in table
    assert "*" not in (tmp_path / "table" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["steps=2"], "compare: nothing to compare; give lists"),
        (
            ["label=[1,2]"],
            "label: the samples get its values in turn, so there is nothing to compare; write label.",
        ),
        (["processes=[1,2]"], "processes: does not change the results; give one value, not a list"),
        (["steps=[1,2]", "keep=true"], "keep=true: unknown key"),
        (["steps=[1,2]", "output={mine}"], "is not empty and not written by diffuse compare"),
        (["steps=[1,2]", "num_samples=5"], "num_samples=5: 5 images are fewer than the 65"),
    ],
)
def test_a_wrong_comparison_gets_one_line(eval_runs, tmp_path, capsys, words, line):
    (tmp_path / "table.md").write_text("precious")
    filled = [word.format(mine=tmp_path) for word in words]
    common = ["compare", "run=a", f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *WORDS]
    assert run([*common, *filled]) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.startswith("diffuse:")]
    assert len(err) == 1
    assert line in err[0]
    assert (tmp_path / "table.md").read_text() == "precious"
