"""The classes of a data set, from its files through a run to samples that are a data set again."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.outputs import claim, keep_labels, keep_seeds
from diffusion_cli.commands.sample_files import SampleFiles
from diffusion_cli.commands.samples import given_samples
from diffusion_cli.data import Array
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.schema import parse_info
from diffusion_cli.training import evaluation, previews
from helpers import checkpoint_info
from helpers.classes import TINY, folder, write


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


# --- Samples as a data set ------------------------------------------------------------


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
    keep_labels(SampleFiles(tmp_path, ".png"), ("a", "b"))
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
        keep_labels(SampleFiles(tmp_path / "out", ".png"), ("a", "b", "c"))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(task, range(16))) == [None] * 16
    rows = [line.split(",") for line in (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:]]
    assert [file for file, _ in rows] == [f"{seed:06d}.png" for seed in range(128)]
    assert Counter(label for _, label in rows) == {"a": 96, "c": 32}


# --- Classes without a training image ------------------------------------------------------------


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
    for module in (previews, evaluation):
        rows_in_turn = module.rows_in_turn
        monkeypatch.setattr(
            module,
            "rows_in_turn",
            lambda *given, own=rows_in_turn: seen.append(given[1].values["label"].tolist()) or own(*given),
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


# --- The same data again ------------------------------------------------------------


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
