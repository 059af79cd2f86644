"""`diffuse edit edit=attribute`: attributes of the inputs are changed or kept."""

import json

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import real_images
from diffusion_cli.data import Digits, spread
from diffusion_cli.data.image_rows import ImageRows
from diffusion_cli.model import load
from helpers import TINY
from helpers.editing import edit, pixels

GUIDED = [
    "edit=attribute",
    "guidance=cfg",
    "guidance.scale=50",
]  # so that few steps of training distinguish labels


def results(folder):
    return np.stack([pixels(file) for file in sorted(folder.glob("*.png")) if file.stem != "grid"])


def test_inputs_of_a_split_keep_their_own_class_at_the_inversion(edit_runs, tmp_path):
    val = Digits("").load("val")
    assert val.labels is not None
    classes = val.labels[spread(len(val), 2)].tolist()
    assert classes[0] != classes[1]
    words = [*GUIDED, "input=val", "num_images=2"]
    assert edit(edit_runs, *words, "edit.to={label: 8}", f"output={tmp_path}/own") == 0
    assert edit(edit_runs, *words, f"edit.source={classes[0]}", "label=8", f"output={tmp_path}/told") == 0
    own, told = results(tmp_path / "own"), results(tmp_path / "told")
    assert (own[0] == told[0]).all()
    assert (own[1] != told[1]).any()


def test_a_named_source_replaces_the_class_of_the_split(edit_runs, tmp_path):
    words = [*GUIDED, "input=val", "num_images=2", "edit.source={label: 3}"]
    assert edit(edit_runs, *words, "edit.to={label: 8}", f"output={tmp_path}/own") == 0
    assert edit(edit_runs, *words, "label=8", f"output={tmp_path}/told") == 0
    assert (results(tmp_path / "own") == results(tmp_path / "told")).all()


def test_files_have_the_class_of_the_table_of_their_folder(edit_runs, tmp_path):
    sampled = ["sample", f"output_dir={edit_runs}", "run=told", "steps=4", "num_samples=2", "label=[3,5]"]
    assert run([*sampled, f"output={tmp_path}/images"]) == 0
    assert (
        edit(edit_runs, *GUIDED, f"input={tmp_path}/images", "edit.to={label: 8}", f"output={tmp_path}/own")
        == 0
    )
    words = [*GUIDED, f"input={tmp_path}/images", "edit.source=5", "label=8"]
    assert edit(edit_runs, *words, f"output={tmp_path}/told") == 0
    own, told = results(tmp_path / "own"), results(tmp_path / "told")
    assert (own[1] == told[1]).all()
    assert (own[0] != told[0]).any()


def test_files_without_a_table_are_inverted_without_a_label(edit_runs, tmp_path):
    words = [*GUIDED, f"input={edit_runs}/images"]
    assert edit(edit_runs, *words, "edit.to={label: 8}", f"output={tmp_path}/own") == 0
    assert edit(edit_runs, *words, "label=8", f"output={tmp_path}/told") == 0
    assert (results(tmp_path / "own") == results(tmp_path / "told")).all()


def test_other_attributes_of_the_inputs_are_another_edit(edit_runs, tmp_path, capsys):
    """A folder of results is never continued with other attributes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (edit_runs / "images").glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    words = [*GUIDED, f"input={folder}", "edit.to={label: 8}", f"output={tmp_path}/out"]
    for label, code in ((1, 0), (1, 0), (2, 2)):
        (folder / "labels.csv").write_text(f"file,label\na.png,{label}\nc.png,\n")
        assert edit(edit_runs, *words) == code
    assert "contains images made with other settings" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["edit"]["to"] == {"label": 8}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["edit.to={label: 12}"], "edit.to=12: out of range; use a class from 0 to 9"),
        (["edit.to={lable: 1}"], "edit.to.lable: the model has no such attribute; did you mean label?"),
        (["edit.to={label: [1,2]}"], "edit.to.label=[1, 2]: must be one value, not a list"),
        (["edit.to={}"], "edit.to={}: names no attribute; name one, or set null for label="),
        (["edit.to={label: 1}", "label=3"], "edit.to: conflicts with label=; leave one of them out"),
        (["edit.to={label: 1}", "edit.source={age: 3}"], "edit.source.age: the model has no such attribute"),
        (
            ["run=plain", "edit.to={label: 1}"],
            "edit.to: the model has neither attributes nor classes; leave it out",
        ),
        (
            ["edit.to={label: 1}", "input=FOLDER"],
            "input=a.png: its table has label=frog: unknown class; correct the table, or set edit.source",
        ),
    ],
)
def test_wrong_attributes_are_one_line(edit_runs, tmp_path, capsys, words, line):
    (tmp_path / "a.png").write_bytes((edit_runs / "images" / "a.png").read_bytes())
    (tmp_path / "labels.csv").write_text("file,label\na.png,frog\n")
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    given = [] if any(word.startswith("input=") for word in words) else ["input=val"]
    assert edit(edit_runs, "edit=attribute", "guidance=none", *given, *words) == 2
    (printed,) = (text for text in capsys.readouterr().err.splitlines() if ": ignored, because " not in text)
    assert line in printed


def test_images_bring_only_the_attributes_that_an_edit_changes():
    dataset = Digits("", label=["label", "stroke_width"])
    plain = real_images(dataset, "val", 3)
    assert all(item.condition is None for item in plain)
    widths = real_images(dataset, "val", 3, ["stroke_width", "age"])
    source, images = dataset.load("val").conditions["stroke_width"], dataset.load("val")
    expected = source.values(spread(len(images), 3), images[torch.arange(3)], None)
    for item, width in zip(widths, expected, strict=True):
        assert item.condition is not None
        assert [*item.condition.values] == ["stroke_width"]
        assert item.condition.values["stroke_width"].tolist() == [width]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder with the run `several`, of classes and widths of strokes."""
    root = tmp_path_factory.mktemp("outputs")
    words = ["dataset.label=[label,stroke_width]", "max_steps=20", "name=several", f"output_dir={root}"]
    assert run([*TINY, *words]) == 0
    return root


@pytest.mark.slow
def test_one_of_several_attributes_changes_and_the_others_stay(several, tmp_path):
    """The inversion has the attributes of the split, which are also named one by one."""
    images = Digits("", label=["label", "stroke_width"]).load("val")
    condition = ImageRows(images, torch.tensor([0])).rows(torch.tensor([0]))
    label, width = int(condition.values["label"]), float(condition.values["stroke_width"])
    words = [*GUIDED, "run=several", "input=val", "num_images=1"]
    assert edit(several, *words, "edit.to={stroke_width: 2.4}", f"output={tmp_path}/own") == 0
    source = f"edit.source={{label: {label}, stroke_width: {width}}}"
    changed = f"label={{label: {label}, stroke_width: 2.4}}"
    assert edit(several, *words, source, changed, f"output={tmp_path}/told") == 0
    other = f"label={{label: {(label + 1) % 10}, stroke_width: 2.4}}"
    assert edit(several, *words, source, other, f"output={tmp_path}/other") == 0
    own, told = results(tmp_path / "own"), results(tmp_path / "told")
    assert (own == told).all()
    assert (own != results(tmp_path / "other")).any()
    model = load(several / "several")
    overrides = [source, "edit.to={stroke_width: 2.4}", "guidance.scale=50"]
    found = model.edit("attribute", images[torch.tensor([0])], steps=4, guidance="cfg", overrides=overrides)
    assert (found[0, 0].numpy() == own[0]).all()
