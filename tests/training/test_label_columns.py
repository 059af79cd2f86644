"""Training with a column named `label` that has no classes, and with missing classes."""

from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.images import save_png
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import load_model
from helpers import TINY

EVALUATED = [
    "eval_every=1",
    "eval_samples=6",
    "eval_steps=1",
    "features=classifier",
    "features.steps=2",
    "metric=[classifier,label_error]",
    "metric.label_error.steps=1",
]


def folder(path: Path, header: str, rows: list[str]) -> Path:
    """Write images of noise with a table; row n of the table is of image n, again from the first for more images."""
    path.mkdir()
    lines = [f"file,{header}"]
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator)
        save_png(pixels, path / f"{number:02}.png")
        lines.append(f"{number:02}.png,{rows[number % len(rows)]}")
    (path / "labels.csv").write_text("\n".join(lines))
    return path


def words(tmp_path: Path, data: Path, label: str) -> list[str]:
    given = [word for word in TINY if not word.startswith("dataset=")]
    return [
        *given, "dataset=folder", f"dataset.path={data}", "dataset.resolution=8", "dataset.val_fraction=0.25",
        f"dataset.label={label}", f"output_dir={tmp_path}", "name=w", "max_steps=1",
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [["red,3", "blue,41.5", "red,7"], ["red,yes", "blue,no", "red,no"]])
def test_a_label_that_is_no_class_leaves_the_classes_of_other_columns(tmp_path, capsys, rows):
    data = folder(tmp_path / "data", "colour,label", rows)
    assert run([*words(tmp_path, data, "[colour,label]"), *EVALUATED, "preview_every=1"]) == 0
    conditions = load_model(tmp_path / "w", "raw", torch.device("cpu")).denoiser.conditions
    assert conditions.num_classes is None
    assert conditions.names == ("colour", "label")
    assert "Traceback" not in capsys.readouterr().err
    assert run(["eval", f"run={tmp_path}/w", "num_samples=6", "steps=1", *EVALUATED[3:]]) == 0


def test_a_classifier_refuses_images_without_a_class_before_training(tmp_path, capsys):
    data = folder(tmp_path / "data", "species", ["cat", "frog", ""])
    assert run([*words(tmp_path, data, "species"), "task=classifier"]) == 2
    shown = capsys.readouterr().err
    line = (
        "diffuse: dataset.label=species: 8 of 24 images have no class, which task=classifier needs; complete "
        "the column, or remove these images\n"
    )
    assert line in shown
    assert "Traceback" not in shown
    assert "Training" not in shown


def test_an_evaluation_in_training_leaves_missing_classes_out(tmp_path, capsys):
    data = folder(tmp_path / "data", "species", ["cat", "frog", ""])
    assert run([*words(tmp_path, data, "species"), *EVALUATED]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_stores_which_conditions_images_lack(tmp_path):
    data = folder(tmp_path / "data", "species,age", ["cat,3", "frog,", "cat,7", "frog,9"])
    assert run(words(tmp_path, data, "[species,age]")) == 0
    assert read(tmp_path / "w" / LAST).info.missing_conditions == ("age",)
