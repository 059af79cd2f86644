"""Where the classes of a folder or archive are found."""

import io
import zipfile
from itertools import product
from pathlib import Path
from unicodedata import normalize

import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.data import file_names, given_images, relabelled
from diffusion_cli.data.file_names import RULES, image_files
from diffusion_cli.data.labels import class_labels
from diffusion_cli.data.masks import mask_files
from helpers.classes import TINY, folder, write


def classes(path: Path, rules: int = RULES) -> tuple[tuple[str, ...] | None, list[int] | None, list[str]]:
    found = class_labels(
        path, names := file_names(path, rules=rules), image_files(path, names), "auto", rules
    )
    return found.names, None if found.labels is None else found.labels.tolist(), list(found.remarks)


def zipped(path: Path, *entries: str) -> Path:
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in entries:
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, b"" if name[-1] in "/\\" else data.getvalue())
    return path


def test_backslashes_of_an_archive_separate_folders(tmp_path):
    path = zipped(tmp_path / "win.zip", "cat\\", "cat\\0.png", "dog\\0.png", "dog\\1.png")
    assert classes(path) == (("cat", "dog"), [0, 1, 1], [])
    assert folder(path).load("train")[torch.arange(3)].shape == (3, 1, 8, 8)
    assert classes(path, rules=1)[0] is None
    assert file_names(zipped(tmp_path / "mixed.zip", "a/0.png", "b\\0.png")) == ["a/0.png", "b\\0.png"]


def test_a_folder_of_an_archive_is_no_image_whatever_its_name_ends_in(tmp_path):
    path = zipped(tmp_path / "x.zip", "birds.jpg/", "birds.jpg/a.png", "fish.jpg/", "fish.jpg/a.png")
    assert classes(path) == (("birds.jpg", "fish.jpg"), [0, 1], [])


def test_an_image_beside_class_folders_is_named(tmp_path, capsys):
    for name in ("a/0", "a/1", "b/0", "preview"):
        write(tmp_path / f"{name}.png")
    line = "'preview.png' lies beside the class folders 'a', 'b'; move it into class folders or away, or set "
    line += "dataset.labels=none"
    assert classes(tmp_path) == (None, None, [f"dataset.path={tmp_path}: no classes: {line}"])
    words = [
        "dataset=folder",
        f"dataset.path={tmp_path}",
        "dataset.resolution=8",
        "name=x",
        f"output_dir={tmp_path}",
    ]
    assert run(["train", *words, *TINY]) == 2
    assert f"model.class_conditional=true: the dataset has no classes: {line}" in capsys.readouterr().err
    (tmp_path / "preview.png").unlink()
    assert classes(tmp_path)[0] == ("a", "b")


def test_folders_of_splits_are_no_classes(tmp_path):
    for split, name in product(("Train", "val"), "ab"):
        write(tmp_path / "data" / split / name / "0.png")
    names, labels, (line,) = classes(tmp_path)
    assert (names, labels) == (("a", "b"), [0, 1, 0, 1])
    assert "the folders Train, val are splits, and those inside are the classes" in line
    assert classes(tmp_path, rules=1) == (("Train", "val"), [0, 0, 1, 1], [])


def test_folders_of_a_split_without_class_folders_are_no_classes(tmp_path):
    write(tmp_path / "train" / "0.png")
    write(tmp_path / "test" / "0.png")
    assert classes(tmp_path) == (None, None, [])
    write(tmp_path / "car" / "0.png")
    assert classes(tmp_path)[0] == ("car", "test", "train")


def test_names_in_two_unicode_forms_are_one(tmp_path):
    composed, decomposed = (normalize(form, "caf\xe9") for form in ("NFC", "NFD"))
    for name in (composed, decomposed, "dog"):
        write(tmp_path / "two" / name / "0.png")
    assert classes(tmp_path / "two")[1] == [0, 0, 1]
    write(tmp_path / "table" / f"{decomposed}.png")
    (tmp_path / "table" / "labels.csv").write_text(f"file,label\n{composed}.png,x\n")
    assert classes(tmp_path / "table")[:2] == (("x",), [0])
    assert mask_files([f"{decomposed}.png"], [f"{composed}.png"]) == [f"{composed}.png"]
    given = given_images(tmp_path / "two", "samples", (1, 8, 8))
    assert relabelled(given, ("dog", composed)) is not None


def table(path: Path, *labels: str) -> Path:
    for number in range(len(labels)):
        write(path / f"{number}.png")
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    return path


def test_measured_numbers_are_no_classes_unless_asked_for(tmp_path):
    path = table(tmp_path / "x", "0.5", "37.2", "1", "nan")
    found = folder(path)
    assert found.class_names is None
    assert (
        "labels.csv has labels such as '0.5', '37.2'; set dataset.label=label for a number"
        in found.remarks()[0]
    )
    assert folder(path, labels="csv").class_names == ("0.5", "1", "37.2", "nan")
    assert folder(table(tmp_path / "whole", "1.0", "2.0", "10")).class_names == ("1.0", "10", "2.0")
    assert folder(table(tmp_path / "mixed", "0.5", "half")).class_names == ("0.5", "half")
    (path / "manifest.json").write_text("{}")  # as beside samples of classes with such names
    assert folder(path).class_names == ("0.5", "1", "37.2", "nan")


def test_a_line_doubts_classes_of_an_image_each(tmp_path):
    names = [f"{number}" for number in range(11)]
    for place, labels, doubted in (
        ("one", names, True),
        ("two", [*names, *names], False),
        ("ten", names[:10], False),
    ):
        line = f"{len(set(labels))} classes for {len(labels)} images"
        assert (line in " ".join(folder(table(tmp_path / place, *labels)).remarks())) == doubted
