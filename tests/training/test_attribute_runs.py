"""Training with attributes, from the command line to the checkpoint."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from diffusion_cli.cli import run
from diffusion_cli.commands.train_checks import check_data
from diffusion_cli.commands.train_conditions import described
from diffusion_cli.conditions import AttributeDescription, Condition, Conditions
from diffusion_cli.conditions.rows import attribute_rows, encoded_rows
from diffusion_cli.config import TrainConfig, load
from diffusion_cli.data import Digits
from diffusion_cli.data.image_rows import ImageRows, image_rows
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import UsageError
from diffusion_cli.generate import rows_in_turn
from diffusion_cli.runs.load import load_model
from diffusion_cli.training import evaluation
from diffusion_cli.training.previews import Preview
from helpers import TINY, checkpoint_info

CHOSEN = "dataset.label=[label,stroke_width]"


def val_condition(count: int) -> Condition:
    """The conditions of evenly spread validation images of the digits."""
    rows = image_rows(Digits("", label=["label", "stroke_width"]).load("val"), count)
    return rows.rows(torch.arange(count))


def training(*words: str) -> TrainConfig:
    config = load("train", [*words])
    assert isinstance(config, TrainConfig)
    return config


def conditional(*words: str) -> bool:
    return training(*words).model["class_conditional"]


def test_chosen_columns_condition_the_network_unless_a_key_states_otherwise():
    assert conditional(CHOSEN)
    assert conditional("dataset.label=label")
    assert not conditional()
    assert not conditional(CHOSEN, "model.class_conditional=false")
    mapping = training("dataset.label={label: category, stroke_width: number}")
    assert mapping.dataset["label"] == {"label": "category", "stroke_width": "number"}


def test_a_run_with_attributes_stores_and_continues_them(tmp_path, capsys):
    words = [*TINY, f"output_dir={tmp_path}", "name=w", "preview_every=1", "preview_steps=1"]
    assert run([*words, CHOSEN, "max_steps=2"]) == 0
    shown = capsys.readouterr().err
    assert "diffuse: dataset.label: label: 10 classes; stroke_width: number, 1.09" in shown
    assert (tmp_path / "w/previews/step_00000001.png").is_file()
    model = load_model(tmp_path / "w", "raw", torch.device("cpu")).denoiser
    assert model.conditions.attributes == Digits("", label=["label", "stroke_width"]).attributes
    x, t = torch.zeros(2, 1, 8, 8), torch.full((2,), 0.5)
    assert model(x, t, Condition({"stroke_width": torch.tensor([1.2, float("nan")])})).x0.isfinite().all()
    assert run([*words, CHOSEN, "max_steps=3"]) == 0
    assert run(["train", f"run={tmp_path}/w", "max_steps=4"]) == 0
    stored = yaml.safe_load((tmp_path / "w/config.yaml").read_text())
    assert stored["dataset"]["label"] == ["label", "stroke_width"]
    capsys.readouterr()
    assert run([*words, "dataset.label=[stroke_width]", "max_steps=5"]) == 2
    assert "dataset.label=[stroke_width]: the run in" in capsys.readouterr().err


def test_tasks_with_classes_alone_refuse_several_columns(tmp_path, capsys):
    words = ["train", f"output_dir={tmp_path}", "max_steps=1", "trainer=cpu", CHOSEN]
    assert run([*words, "task=classifier"]) == 2
    line = (
        "diffuse: dataset.label=[label,stroke_width]: a model of task=classifier learns from classes alone; choose one "
        "column of classes, or leave it out\n"
    )
    assert capsys.readouterr().err == line
    assert run([*words[:-1], "task=classifier", "dataset.label=stroke_width"]) == 2
    line = "task=classifier: the dataset has no classes: dataset.label chooses no category; use a dataset with classes"
    assert line in capsys.readouterr().err


def test_networks_with_classes_alone_refuse_several_columns():
    attributes = Digits("", label=["label", "stroke_width"]).attributes
    points: Any = SimpleNamespace(attributes=attributes, class_names=None)
    config = training("model=set_tiny")
    with pytest.raises(
        UsageError, match=r"=\[label,stroke_width\]: SetTransformer takes class labels alone; choose"
    ):
        described(config, points, Denoiser)


def test_rows_of_a_condition_give_it_again():
    dataset = Digits("", label=["label", "stroke_width"])
    condition = val_condition(8)
    condition = condition.dropped(["stroke_width"], torch.arange(8) == 3).dropped(
        ["label"], torch.arange(8) == 5
    )
    rows = attribute_rows(condition, dataset.attributes)
    assert [len(row) for row in rows] == [2, 2, 2, 1, 2, 1, 2, 2]
    assert all(isinstance(row["label"], str) for row in rows if "label" in row)
    again = encoded_rows(rows, Conditions(attributes=dataset.attributes))
    for name, value in condition.values.items():
        torch.testing.assert_close(again.values[name], value, rtol=0, atol=0, equal_nan=True)


def test_few_rows_are_repeated():
    images = MemoryImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3))
    condition = rows_in_turn(range(8), image_rows(images, 8), torch.device("cpu"))
    assert condition is not None
    labels = condition.get("label")
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_each_row_of_a_preview_has_a_title_also_of_few_validation_images(tmp_path, monkeypatch):
    seen: list[list[str]] = []
    init = Preview.__init__

    def recorded(*given, titles, **named):
        seen.append(titles)
        init(*given, titles=titles, **named)

    monkeypatch.setattr(Preview, "__init__", recorded)
    assert run([*TINY, f"output_dir={tmp_path}", CHOSEN, "max_steps=1", "dataset.val_fraction=0.002"]) == 0
    (titles,) = seen
    few = len(Digits("", label=["label", "stroke_width"], val_fraction=0.002).load("val"))
    assert 0 < few < Preview.ROWS == len(titles)
    assert titles == [titles[number % few] for number in range(Preview.ROWS)]
    assert len({*titles}) == few


def test_an_evaluation_in_training_samples_the_conditions_of_validation_images(tmp_path, monkeypatch):
    seen: list[Condition] = []
    turn = evaluation.rows_in_turn
    monkeypatch.setattr(
        evaluation, "rows_in_turn", lambda *given: seen.append(turn(*given) or Condition()) or turn(*given)
    )
    sizes, rows = [], ImageRows.rows
    monkeypatch.setattr(ImageRows, "rows", lambda held, index: sizes.append(len(index)) or rows(held, index))
    words = ["max_steps=1", "preview_every=null", "eval_every=1", "eval_samples=20", "eval_steps=1"]
    metric = ["features=classifier", "features.steps=1", "metric=kid", "metric.kid.subset_size=3"]
    assert run([*TINY, f"output_dir={tmp_path}", CHOSEN, *words, *metric]) == 0
    assert sizes
    assert max(sizes) <= 16  # rows of one batch at a time
    expected = val_condition(20)
    for name in ("label", "stroke_width"):
        torch.testing.assert_close(seen[0].values[name].cpu(), expected.values[name][:16])


def test_a_run_keeps_the_names_of_its_values(tmp_path):
    species = AttributeDescription(name="species", kind="category", values=("cat", "frog"))
    renamed = species.model_copy(update={"values": ("dog", "frog")})
    before, now = (
        checkpoint_info(conditions=Conditions(attributes=(each,)).model_dump()) for each in (species, renamed)
    )
    check_data(tmp_path, before, before)
    with pytest.raises(UsageError, match=r"^conditions: have other names, values or ranges than those"):
        check_data(tmp_path, now, before)
