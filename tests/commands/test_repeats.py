"""Repeats of an evaluation: other seeds each, their mean and standard deviation, and no seeds that overlap."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.config import load, shared_seeds
from diffusion_cli.metrics import Report, Result, averaged, notes_on_seeds
from helpers.evaluation import WORDS, evaluate

FEW = ["num_samples=20", "metric=is", "metric.is.splits=2"]


def results(history: Path) -> list[dict]:
    """The first result of each entry of a metrics.json."""
    return [entry["results"][0] for entry in json.loads(history.read_text())]


def test_repeats_are_evaluations_of_the_seeds_that_follow(eval_runs):
    history = eval_runs / "o" / "b" / "metrics.json"
    for seed in (3, 23, 43):
        assert evaluate(eval_runs, "run=b", *FEW, f"seed={seed}") == 0
    assert evaluate(eval_runs, "run=b", *FEW, "seed=3", "repeats=3", "batch_size=7") == 0
    *alone, together = results(history)
    values = [result["value"] for result in alone[-3:]]
    assert together["value"] == pytest.approx(statistics.fmean(values), rel=1e-6)
    assert together["details"]["standard_deviation"] == pytest.approx(statistics.stdev(values), rel=1e-4)
    assert [together["details"][f"repeat_{r}"] for r in range(3)] == pytest.approx(values, rel=1e-6)
    sampling = together["protocol"]["sampling"]
    assert together["protocol"]["samples"] == 20
    assert (sampling["seeds"], sampling["repeats"]) == ([3, 62], 3)
    assert sampling["pixels_sha256"] == [
        result["protocol"]["sampling"]["pixels_sha256"] for result in alone[-3:]
    ]


def test_a_comparison_has_the_standard_deviation_of_its_repeats(eval_runs, capsys):
    words = ["compare", "run=a", f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *WORDS, *FEW]
    assert run([*words, "steps=[1,2]", "repeats=2"]) == 0
    folder = Path(capsys.readouterr().out.strip().rpartition("Table and plot: ")[2])
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["is_classifier (std)"]) > 0 for row in rows)


def test_the_mean_keeps_what_all_repeats_have_alike():
    reports = [
        Report(
            [
                Result(
                    "fid",
                    value,
                    {"reference_distance": 2.0, "ratio": value / 2},
                    {"sampling": {"pixels_sha256": "x"}},
                )
            ],
            ["n"],
        )
        for value in (1.0, 2.0)
    ]
    (result,) = averaged([*reports, Report(reports[0].results, ["n"])]).results
    assert result.details["reference_distance"] == 2.0
    assert result.details["ratio"] == pytest.approx(4 / 6)
    assert averaged([reports[0], Report([], [])]).results == []
    assert averaged(reports).notes == ["n"]


def test_the_interval_of_one_repeat_is_not_that_of_the_mean():
    reports = [
        Report(
            [
                Result(
                    "fid",
                    value,
                    {
                        "low": value - 0.5,
                        "high": value + 0.5,
                        "standard_error": 0.1,
                        "at_infinity": value - 1,
                    },
                    {"sampling": {"pixels_sha256": str(value)}},
                )
            ],
            [],
        )
        for value in (1.0, 3.0)
    ]
    (result,) = averaged(reports).results
    assert result.value == 2.0
    assert result.details.keys().isdisjoint({"low", "high", "standard_error"})
    assert result.details["at_infinity"] == 1.0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            "0,1,2",
            "seed=0,1,2: 299 of 300 images are the same, since image n has seed + n; use seed=0,300,600",
        ),
        (
            "5,205",
            "seed=5,205: 100 of 300 images are the same, since image n has seed + n; use seed=5,305",
        ),
        ("0,300", None),
        ("0,0", None),
    ],
)
def test_seeds_that_share_images_are_refused(given, line):
    configs = [load("eval", [f"seed={seed}", "num_samples=300"]) for seed in given.split(",")]
    lines = shared_seeds(configs)
    assert lines == [] if line is None else str(lines[0]).startswith(line)


def test_seeds_of_unlike_evaluations_and_of_real_images_may_be_near():
    assert shared_seeds([load("eval", ["seed=0", "steps=5"]), load("eval", ["seed=1", "steps=9"])]) == []
    assert shared_seeds([load("eval", [f"seed={seed}", "metric=bits_per_dim"]) for seed in (0, 1)]) == []
    assert shared_seeds([load("sample", [f"seed={seed}"]) for seed in (0, 1)]) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["eval", "-m", "seed=0,1", "num_samples=300"], "use seed=0,300, or repeats=2"),
        (["compare", "seed=[0,1]", "num_samples=300", "repeats=2"], "use seed=[0,600], or repeats=4"),
        (
            ["compare", "seed=[0,1]", "sampler=[ddim,ddpm]"],
            "1999 of 2000 images are the same, since image n has seed + n",
        ),
        (
            ["eval", "seed=4294967295", "num_samples=1", "repeats=2"],
            "the last image's seed exceeds 4294967295",
        ),
        (["eval", "seed=4294967000"], "the last image's seed exceeds 4294967295"),
    ],
)
def test_seeds_that_cannot_be_get_one_line(tmp_path, capsys, words, line):
    assert run([*words, f"output_dir={tmp_path}"]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("diffuse:")]
    assert len(told) == 1
    assert line in told[0]


def report(first: int, last: int, **settings) -> Report:
    sampling = {"run": "a", "steps": 5, "seeds": [first, last], "pixels_sha256": str(first)} | settings
    return Report([Result("fid", 1.0, {}, {"sampling": sampling})], [])


def test_an_earlier_evaluation_of_nearly_the_same_seeds_is_noted():
    history = [report(0, 299).to_dict()]
    (note,) = notes_on_seeds(history, report(1, 300))
    assert note.startswith(
        "seeds: 299 of the 300 samples are also in the evaluation of seeds 0 to 299; set seed=300"
    )
    for other in (report(0, 299), report(300, 599), report(1, 9), report(1, 300, steps=6), Report([], [])):
        assert notes_on_seeds(history, other) == []
    for seeds in (None, [1], "x", [0, None]):
        damaged = Report([Result("fid", 1.0, {}, {"sampling": {"seeds": seeds}})], []).to_dict()
        assert notes_on_seeds([damaged], report(1, 300)) == []
