"""Attributes of each dataset: they stay with their images in both splits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.conditions import Condition
from diffusion_cli.data import Dataset, Digits, Images
from diffusion_cli.data.base import Split
from diffusion_cli.data.digits import stroke_widths
from diffusion_cli.errors import UsageError
from helpers.data import array, folder, save

SPECIES = ("ant", "cat", "frog")
NAMES = ("age", "species", "glasses")


def age(number: int) -> float | None:
    return None if number % 5 == 4 else number / 2


def photos(path: Path, count: int = 20) -> Path:
    """Images with equal pixels of their number, and a table in another order; each fifth age is missing."""
    lines = []
    for number in range(count):
        save(path / f"{number:02}.png", np.full((8, 8, 3), number, np.uint8))
        given = {"file": f"{number:02}.png", "species": SPECIES[number % 3], "glasses": number % 2 == 0}
        lines.append(given if age(number) is None else {**given, "age": age(number)})
    (path / "labels.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    return path


def whole(images: Images) -> tuple[torch.Tensor, Condition]:
    rows = torch.arange(len(images))
    condition = images.condition(rows, images[rows])
    assert condition is not None
    return images[rows], condition


def check(dataset: Dataset, split: Split) -> list[int]:
    """Check that the values of each image follow from its pixels; return the numbers of the images."""
    pixels, condition = whole(dataset.load(split))
    numbers = pixels[:, 0, 0, 0].tolist()
    ages = [float("nan") if age(number) is None else age(number) for number in numbers]
    assert_close(condition.values["age"], torch.tensor(ages), rtol=0, atol=0, equal_nan=True)
    species = torch.tensor([number % 3 for number in numbers])
    assert_close(condition.values["species"], species, rtol=0, atol=0)
    assert_close(condition.values["glasses"], 1 - torch.tensor(numbers) % 2, rtol=0, atol=0)
    assert_close(dataset.load(split).labels, species)
    return numbers


def descriptions(dataset: Dataset) -> list[str]:
    return [str(each).partition(",")[0] for each in dataset.attributes]


@pytest.mark.parametrize("in_memory", [True, False])
def test_values_of_a_folder_stay_with_their_images(tmp_path, in_memory):
    dataset = folder(photos(tmp_path), label=[*NAMES], val_fraction=0.3, in_memory=in_memory)
    numbers = {split: check(dataset, split) for split in ("train", "val")}
    assert sorted(numbers["train"] + numbers["val"]) == [*range(20)]
    assert min(map(len, numbers.values())) > 0
    assert descriptions(dataset) == ["age: number", "species: 3 classes", "glasses: yes/no"]
    assert dataset.class_names == SPECIES
    seen = [value for number in numbers["train"] if (value := age(number)) is not None]
    assert (dataset.attributes[0].low, dataset.attributes[0].high) == (min(seen), max(seen))
    (line,) = [line for line in dataset.remarks() if line.startswith("dataset.label")]
    assert "(4 missing); species: 3 classes; glasses: yes/no" in line


def test_unreadable_images_take_their_values_along(tmp_path):
    path = photos(tmp_path / "photos")
    for number in (0, 7):
        (path / f"{number:02}.png").write_bytes(b"none")
    dataset = folder(path, label=[*NAMES], unreadable="skip", data_dir=str(tmp_path / "data"))
    assert check(dataset, "train") == [number for number in range(20) if number not in (0, 7)]


def test_labels_and_label_contradict(tmp_path):
    with pytest.raises(UsageError, match=r"^dataset\.labels=none: contradicts dataset\.label; leave one"):
        folder(photos(tmp_path), label="age", labels="none")


def test_a_table_without_the_column_label_names_the_remedy(tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "labels.csv").write_text("file,age,species\na.png,1,cat\n")
    with pytest.raises(UsageError, match=r"choose columns with dataset\.label=\[age,species\]$"):
        folder(tmp_path)


def test_integers_of_the_column_label_are_classes_with_a_line(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", np.zeros((8, 8), np.uint8))
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(4))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    inferred = folder(tmp_path)
    assert inferred.class_names == ("0", "1")
    line = "has 2 classes, one for each integer in the column label; dataset.label={label: number} makes it a number"
    assert line in inferred.remarks()[0]
    assert not any("one for each integer" in line for line in folder(tmp_path, labels="csv").remarks())
    number = folder(tmp_path, label={"label": "number"})
    assert (number.class_names, descriptions(number)) == (None, ["label: number"])
    assert number.missing_classes == "dataset.label chooses no category"


def test_arrays_by_name_are_attributes(tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    columns = {
        "labels": np.arange(4) % 2,
        "class_names": np.array(["x", "y"]),
        "size": np.array([1.5, np.nan, 2, 3]),
    }
    np.savez(
        tmp_path / "a.npz", images=images, kind=np.array(["b", "", "a", "b"]), wide=np.ones((4, 2)), **columns
    )
    dataset = array(tmp_path / "a.npz", label=["label", "size", "kind"], val_fraction=0.0)
    _, condition = whole(dataset.load("train"))
    assert dataset.class_names == ("x", "y")
    assert condition.values["label"].tolist() == [0, 1, 0, 1]
    assert condition.values["kind"].tolist() == [1, -1, 0, 1]
    assert condition.values["size"].isnan().tolist() == [False, True, False, False]
    with pytest.raises(
        UsageError, match=r"has 'wide' of dtype float64 and shape \(4, 2\); attributes are texts"
    ):
        array(tmp_path / "a.npz", label="wide")
    with pytest.raises(UsageError, match=r"label=sizes: no such column in a\.npz; did you mean size\?"):
        array(tmp_path / "a.npz", label="sizes")


def test_digits_have_stroke_widths():
    dataset = Digits("", label=["label", "stroke_width"])
    for split in ("train", "val"):
        pixels, condition = whole(dataset.load(split))
        assert_close(condition.values["stroke_width"], stroke_widths(pixels))
        assert_close(condition.values["label"], Digits("").load(split).labels)
    assert [each.name for each in dataset.attributes] == ["label", "stroke_width"]
    assert dataset.class_names == Digits.class_names
    assert Digits("", label="stroke_width").class_names is None
    assert Digits("").attributes == ()


@pytest.mark.parametrize(("width", "length"), [(1, 40), (2, 60), (4, 100)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_stroke_width_of_a_bar(width, length, turned):
    bar = torch.zeros(1, 1, 128, 128, dtype=torch.uint8)
    bar[..., 10 : 10 + length, 20 : 20 + width] = 255
    found = stroke_widths(bar.transpose(2, 3) if turned else bar)
    # A = w l, and P = 2 (w + l), where one corner has a gradient of sqrt(2) in place of 2.
    exact = 2 * width * length / (2 * (width + length) + 2**0.5 - 2)
    assert_close(found, torch.tensor([exact]))


def test_an_image_without_ink_has_no_stroke_width():
    assert stroke_widths(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).isnan().all()
