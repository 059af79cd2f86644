"""The classes of a data set, from its files through a run to samples that are a data set again."""

import io
import json
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.outputs import claim, keep_labels, keep_seeds
from diffusion_cli.commands.samples import given_samples
from diffusion_cli.config import CONF
from diffusion_cli.data import Array, Folder, file_names, given_images, relabelled
from diffusion_cli.data.folder import RULES, image_files
from diffusion_cli.data.labels import class_labels
from diffusion_cli.data.masks import mask_files
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.schema import parse_info
from diffusion_cli.training import callbacks, evaluation
from helpers import checkpoint_info

TINY = [
    "model=unet_tiny",
    "model.channels=8",
    "model.norm_groups=4",
    "model.num_heads=1",
    "model.head_channels=null",
    "batch_size=6",
    "preview_steps=1",
    "logger=csv",
    "trainer=cpu",
    "precision=fp32",
    "model.class_conditional=true",
]


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def folder(path: Path, **changes) -> Folder:
    node = yaml.safe_load((CONF / "dataset" / "folder.yaml").read_text())["dataset"]
    options = {**node, "path": str(path), "resolution": 8, "channels": 1, "val_fraction": 0, **changes}
    return Folder(".", **{key: value for key, value in options.items() if key != "_target_"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on classes with names that tables must quote, or that look like words of the command line."""
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("red, blue", "none", "caf\xe9")):
        for image in range(4):
            write(root / "data" / name / f"{image}.png", 50 * number + image)
    words = [
        f"dataset.path={root / 'data'}",
        "dataset.resolution=8",
        "dataset.channels=1",
        "dataset.val_fraction=0",
    ]
    words += ["max_steps=1", "name=run", f"output_dir={root}"]
    assert run(["train", "dataset=folder", *words, *TINY]) == 0
    return root / "run"


def sample(trained: Path, output: Path, *words: str) -> int:
    return run(["sample", f"run={trained}", f"output={output}", "steps=1", "device=cpu", *words])


# --- Samples as a data set -------------------------------------------


def test_samples_of_classes_are_a_data_set_with_these_classes(trained, tmp_path):
    assert sample(trained, tmp_path, "label=all", "num_samples=7") == 0
    assert (tmp_path / "labels.csv").read_text().splitlines()[:3] == [
        "file,label",
        "000000.png,café",
        "000001.png,none",
    ]
    synthetic = folder(tmp_path)
    assert synthetic.class_names == ("café", "none", "red, blue")
    assert synthetic.labels is not None
    assert synthetic.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    words = [
        "dataset.resolution=8",
        "dataset.channels=1",
        "max_steps=1",
        "name=again",
        f"output_dir={tmp_path / 'o'}",
    ]
    assert run(["train", "dataset=folder", f"dataset.path={tmp_path}", *words, *TINY]) == 0


def test_the_table_of_samples_grows_with_them(trained, tmp_path):
    assert sample(trained, tmp_path, "label=[none,café]", "num_samples=2") == 0
    assert sample(trained, tmp_path, "label=[none,café]", "num_samples=1", "seed=4") == 0
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines == ["file,label", "000000.png,none", "000001.png,café", "000004.png,none"]


def test_samples_without_labels_get_no_table(trained, tmp_path):
    assert sample(trained, tmp_path, "label=[]", "num_samples=1") == 0
    assert not (tmp_path / "labels.csv").exists()


def test_samples_are_evaluated_before_their_table_is_complete(trained, tmp_path):
    assert sample(trained, tmp_path, "label=all", "num_samples=3") == 0
    (tmp_path / "000003.png").write_bytes((tmp_path / "000000.png").read_bytes())
    samples = given_samples(tmp_path, folder(trained.parent / "data"), None)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 0]


def test_recorded_seeds_without_a_file_get_no_row(tmp_path):
    model: Any = SimpleNamespace(step=1, info=checkpoint_info())
    claim(tmp_path, {"labels": [0, 1]}, model)
    for name in (
        "000002.png",
        "000005.png",
        "1000000.png",
        "9999999.png",
        "000003.txt",
        "grid.png",
        "0000004.png",
        "0000005.png",
    ):
        (tmp_path / name).touch()
    keep_seeds(tmp_path, range(3))
    keep_seeds(tmp_path, range(5, 3_000_001))
    keep_labels(tmp_path, ("a", "b"), ".png")
    assert (tmp_path / "labels.csv").read_text().splitlines() == [
        "file,label", "000002.png,a", "000005.png,b", "1000000.png,a"
    ]  # fmt: skip


def test_tasks_that_share_a_folder_leave_the_labels_of_all_their_samples(tmp_path):
    model: Any = SimpleNamespace(step=1, info=checkpoint_info())
    settings = {"labels": [0, 2], "label_shares": [3, 1]}

    def task(number: int) -> None:
        claim(tmp_path / "out", settings, model)
        for seed in range(8 * number, 8 * number + 8):
            (tmp_path / "out" / f"{seed:06d}.png").touch()
        keep_seeds(tmp_path / "out", range(8 * number, 8 * number + 8))
        keep_labels(tmp_path / "out", ("a", "b", "c"), ".png")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(task, range(16))) == [None] * 16
    rows = [line.split(",") for line in (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:]]
    assert [file for file, _ in rows] == [f"{seed:06d}.png" for seed in range(128)]
    assert Counter(label for _, label in rows) == {"a": 96, "c": 32}


# --- Classes without a training image --------------------------------


@pytest.fixture(scope="module")
def gap(tmp_path_factory) -> Path:
    """A run on labels 1 and 3 of 0..3."""
    root = tmp_path_factory.mktemp("gap")
    images = np.concatenate([np.full((6, 8, 8), value, np.uint8) for value in (0, 200)])
    np.savez(root / "data.npz", images=images, labels=np.repeat([1, 3], 6))
    words = [
        "dataset=array",
        f"dataset.path={root / 'data.npz'}",
        "dataset.val_fraction=0",
        "max_steps=1",
        "name=run",
    ]
    assert run(["train", *words, f"output_dir={root}", *TINY]) == 0
    return root / "run"


def labels_in(output: Path) -> list[int]:
    return json.loads((output / "manifest.json").read_text())["settings"]["labels"]


@pytest.mark.parametrize(
    ("label", "expected"), [("", [1, 3]), ("label=all", [1, 3]), ("label=[0,3]", [0, 3])]
)
def test_classes_without_a_training_image_are_made_by_name_only(gap, tmp_path, capsys, label, expected):
    assert sample(gap, tmp_path, *filter(None, [label]), "num_samples=2") == 0
    assert labels_in(tmp_path) == expected
    warned = "label: '0': no training images of this class" in capsys.readouterr().err
    assert warned == (0 in expected)


def test_classes_without_a_training_image_are_neither_drawn_nor_measured_in_training(
    tmp_path, capsys, monkeypatch
):
    for name in ("a", "b"):
        for image in range(9):
            write(tmp_path / "data" / name / f"{image}.png", image)
    write(tmp_path / "data" / "c" / "3.png")  # for validation by its name
    seen: list[Any] = []
    for module in (callbacks, evaluation):
        labels_of = module.labels_of
        monkeypatch.setattr(
            module, "labels_of", lambda *given, own=labels_of: seen.append(given[1]) or own(*given)
        )
    words = [
        "dataset.resolution=8",
        "dataset.channels=1",
        "name=run",
        f"output_dir={tmp_path}",
        "max_steps=1",
    ]
    words += ["preview_every=1", "eval_every=1", "eval_samples=4", "eval_steps=1"]
    words += [
        "features=classifier",
        "features.steps=1",
        f"cache_dir={tmp_path}",
        f"dataset.path={tmp_path / 'data'}",
    ]
    assert run(["train", "dataset=folder", *words, *TINY]) == 0
    assert "classes without training images: 'c' (1 of 3)" in capsys.readouterr().err
    assert len(seen) == 2
    assert all(set(labels) == {0, 1} for labels in seen)


def test_a_run_that_did_not_count_its_images_makes_all_classes():
    names = ("a", "b", "c")
    assert checkpoint_info(class_names=names).trained_classes == [0, 1, 2]
    assert checkpoint_info(class_names=names, class_counts=[0, 5, 2]).trained_classes == [1, 2]


def test_images_of_classes_in_a_checkpoint_are_checked(gap):
    entry = read(gap / LAST).state["diffuse"]
    assert parse_info(entry).class_counts == [0, 6, 0, 6]
    assert (
        parse_info({key: value for key, value in entry.items() if key != "class_counts"}).class_counts is None
    )
    for counts in ([0, 6, 0], [0, 0, 0, 0], [0, -1, 0, 6], "x"):
        with pytest.raises(UsageError, match="class_counts"):
            parse_info({**entry, "class_counts": counts})


# --- The same data again ---------------------------------------------


def known(dataset: Any) -> list[str]:
    return [dataset.load(split).fingerprint() for split in ("train", "val")]


def test_a_fingerprint_is_that_of_the_files_in_memory_or_not(tmp_path):
    for number in range(100):
        write(tmp_path / "a" / f"{number:03d}.png", number)
    before = known(folder(tmp_path, in_memory=True, val_fraction=0.5))
    assert before == known(folder(tmp_path, in_memory=False, val_fraction=0.5))
    assert len(set(before)) == 2
    write(tmp_path / "a" / "000.png", 200)
    changed = known(folder(tmp_path, val_fraction=0.5))
    assert sum(one != other for one, other in zip(before, changed, strict=True)) == 1
    write(tmp_path / "a" / "000.png", 0)
    (tmp_path / "a" / "050.png").rename(tmp_path / "a" / "050b.png")
    assert known(folder(tmp_path, val_fraction=0.5)) != before


@pytest.mark.parametrize("compressed", [False, True])
def test_a_fingerprint_is_that_of_the_rows_in_memory_or_not(tmp_path, compressed):
    path, images = tmp_path / "x.npz", np.arange(200 * 64, dtype=np.uint8).reshape(200, 8, 8)

    def fingerprints(images: np.ndarray, **changes) -> list[str]:
        (np.savez_compressed if compressed else np.savez)(path, images=images)
        options = {"range": None, "flip": False, "val_fraction": 0.5, "in_memory": None, **changes}
        return known(Array(".", path=str(path), **options))

    before = fingerprints(images)
    assert before == fingerprints(images, in_memory=True)
    assert before == fingerprints(images, in_memory=None if compressed else False)
    assert all(one != other for one, other in zip(before, fingerprints(images + 1), strict=True))


def test_a_run_is_not_continued_on_other_pixels_of_the_same_names(tmp_path, capsys):
    for number in range(6):
        write(tmp_path / "data" / f"{number}.png", number)

    def train(steps: int) -> int:
        words = [
            "dataset=folder",
            "dataset.resolution=8",
            "dataset.channels=1",
            f"dataset.path={tmp_path / 'data'}",
        ]
        unlabelled = [word for word in TINY if "conditional" not in word]
        return run(["train", *words, "name=run", f"output_dir={tmp_path}", f"max_steps={steps}", *unlabelled])

    assert train(1) == train(2) == 0
    write(tmp_path / "data" / "3.png", 99)
    assert train(3) == 2
    assert (
        "dataset: the images or their names differ from those that the run started with"
        in capsys.readouterr().err
    )
    write(tmp_path / "data" / "3.png", 3)
    path = tmp_path / "run" / LAST
    checkpoint = read(path).state
    del checkpoint["diffuse"]["data_sha256"]  # as of an earlier version
    torch.save(checkpoint, tmp_path / "old.ckpt")  # the tensors are mapped from the file that is there
    (tmp_path / "old.ckpt").replace(path)
    write(tmp_path / "data" / "3.png", 99)
    assert train(4) == 0


# --- Where classes are found -----------------------------------------


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
    assert "labels.csv has labels such as '0.5', '37.2'; set dataset.labels=csv" in found.remarks()[0]
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
