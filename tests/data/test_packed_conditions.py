"""Packed files train as the dataset: attributes of any name, captions, and what cannot be packed."""

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.data import Array, Batches, Dataset, Images, Pack
from diffusion_cli.data.base import Split
from diffusion_cli.data.captions import CaptionTable
from diffusion_cli.data.packed_conditions import ATTRIBUTES, CAPTIONS, array_name
from diffusion_cli.errors import UsageError
from helpers.data import array, folder, save, take
from helpers.pairs import pairs, write_pairs

COLUMNS = {
    "age": [1.5, None, 3, 0.1, 20240132, 7],
    "code": ["10", "9", "", "10", "9", "7"],
    "glasses": ["no", "yes", "yes", "", "no", "yes"],
}
KINDS = {"code": "category"}


def photos(path: Path, columns: dict[str, list], captions: list | None = None) -> Path:
    rows = []
    for number in range(6):
        save(path / f"{number}.png", np.full((8, 8, 3), number, np.uint8))
        row = {"file": f"{number}.png", **{name: cells[number] for name, cells in columns.items()}}
        rows.append(row if captions is None else {**row, "text": captions[number]})
    (path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def packed(dataset: Dataset, path: Path, **changes) -> Array:
    Pack(processes=1)(dataset, path)
    return array(path, val_fraction=None, **changes)


def captions_of(images: Images) -> CaptionTable:
    assert images.captions is not None
    return images.captions


def assert_equal_training(packed: Dataset, given: Dataset) -> None:
    """Both have equal conditions and batches of both splits."""
    assert (packed.attributes, packed.class_names) == (given.attributes, given.class_names)
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        found = [dataset.load(split) for dataset in (packed, given)]
        if packed.captions:
            one, other = map(captions_of, found)
            assert [*one.texts] == [*other.texts]
            assert one.digest() == other.digest()
        batches = [take(Batches(images, 3, seed=1, flip=True), 4) for images in found]
        for one, other in zip(*batches, strict=True):
            assert_close(one.images, other.images, rtol=0, atol=0)
            assert [*one.condition.values] == [*other.condition.values]
            for name, values in other.condition.values.items():
                assert_close(one.condition.values[name], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("in_memory", [True, False])
def test_attributes_of_all_types_are_equal(tmp_path, in_memory):
    given = folder(
        photos(tmp_path / "x", COLUMNS),
        label={"age": "number", **KINDS, "glasses": "yes_no"},
        val_fraction=0.4,
    )
    assert len(given.load("val"))
    again = packed(given, tmp_path / "x.npz", label=[*COLUMNS], in_memory=in_memory)
    assert_equal_training(again, given)
    assert given.attributes[1].values == ("7", "9", "10")


NAMES = ["y", "images", "val", "form", "labels", "arr_1", "class_names", "x", "a/b", "../c", "d\0", "d", "é"]


def test_attributes_have_any_names(tmp_path):
    columns = {name: [float(number) + shift for number in range(6)] for shift, name in enumerate(NAMES)}
    given = folder(photos(tmp_path / "x", columns), label=[*columns], val_fraction=0.4)
    assert_equal_training(packed(given, tmp_path / "x.npz", label=[*columns]), given)


@pytest.mark.parametrize("label", ["code", {"label": "number", "code": "category"}, ["label", "glasses"]])
def test_classes_are_equal_with_missing_ones_too(tmp_path, label):
    label = {"code": "category"} if label == "code" else label
    columns = {
        **COLUMNS,
        "label": [4, 2, 1, 5, 3, 0] if isinstance(label, dict) else ["b", "", "a", "c", "a", "b"],
    }
    given = folder(photos(tmp_path / "x", columns), label=label, val_fraction=0.4)
    names = [attribute.name for attribute in given.attributes]
    assert_equal_training(packed(given, tmp_path / "x.npz", label=names), given)


CAPTIONS_OF = ["a cat", ["two", "lines\u2028 é"], None, [], '"quoted"', "x"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_captions_are_equal(tmp_path, in_memory):
    given = folder(photos(tmp_path / "x", COLUMNS, CAPTIONS_OF), label=["age", "glasses"], val_fraction=0.4)
    again = packed(given, tmp_path / "x.npz", label=["age", "glasses"], in_memory=in_memory)
    assert_equal_training(again, given)
    train, val = captions_of(again.load("train")), captions_of(again.load("val"))
    line = f"2 images without a caption, such as image {[*train.texts, *val.texts].index(())}"
    assert train.remarks() == [f"dataset.path={tmp_path / 'x.npz'}: {line}"]


def test_a_table_without_captions_is_packed_without(tmp_path):
    given = folder(photos(tmp_path / "x", COLUMNS), label="age")
    assert given.captions
    assert not packed(given, tmp_path / "x.npz").captions


def test_captions_that_cannot_be_read_are_refused(tmp_path):
    given = folder(photos(tmp_path / "x", COLUMNS, [3, *CAPTIONS_OF[1:]]), labels="none")
    with pytest.raises(UsageError, match=r"^dataset\.captions=auto: .* is no text and no list of texts"):
        Pack(processes=1)(given, tmp_path / "x.npz")


def test_condition_images_are_refused(tmp_path):
    line = "dataset: targets has condition images, which cannot be packed; train without packing"
    with pytest.raises(UsageError, match=f"^{line}$"):
        Pack(processes=1)(pairs(write_pairs(tmp_path)), tmp_path / "x.npz")


def test_the_command_names_the_attributes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    columns = {"age": COLUMNS["age"], "a, b": COLUMNS["glasses"], "null": COLUMNS["code"]}
    photos(tmp_path / "x", columns)
    words = [
        "dataset=folder",
        "dataset.path=x",
        "dataset.resolution=8",
        "dataset.label=[age,'a, b','null']",
        "output=y",
    ]
    assert run(["data", *words]) == 0
    assert 'dataset.path=y.npz \'dataset.label=[age,"a, b","null"]\'\n' in capsys.readouterr().out


@pytest.mark.parametrize(("captions", "end"), [(CAPTIONS_OF, ""), (None, " dataset.flip=true")])
def test_the_command_mirrors_no_captioned_images(tmp_path, monkeypatch, capsys, captions, end):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "x", {}, captions)
    words = ["dataset=folder", "dataset.path=x", "dataset.resolution=8", "dataset.label=null", "output=y"]
    assert run(["data", "pack", *words]) == 0
    assert f"dataset.path=y.npz{end}\n" in capsys.readouterr().out


def changed(path: Path, **entries: bytes | None) -> Path:
    """Replace entries of an archive."""
    with ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w") as archive:
        for name, data in {**content, **entries}.items():
            if data is not None:
                archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("stored", "line"),
    [
        (b"[1]", "has a damaged entry attributes.json; pack it again"),
        (b'[{"name": "image", "kind": "number"}]', "has a damaged entry attributes.json; pack it again"),
        (b"{", "is not JSON"),
        (
            json.dumps([{"name": "code", "kind": "category", "values": ["a"]}]).encode(),
            "has a damaged attribute code",
        ),
    ],
)
def test_damaged_attributes_are_one_line(tmp_path, stored, line):
    packed(folder(photos(tmp_path / "x", COLUMNS), label=KINDS | {"age": "number"}), tmp_path / "x.npz")
    changed(tmp_path / "x.npz", **{ATTRIBUTES: stored})
    with pytest.raises(UsageError, match=r"^dataset\.path=") as caught:
        array(tmp_path / "x.npz", label="code")
    assert line in str(caught.value)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("stored", "line"), [(b'{"text": "a"}', "has captions of 1 images, not of 6"), (b"[", "not JSON")]
)
def test_damaged_captions_are_one_line(tmp_path, stored, line):
    packed(folder(photos(tmp_path / "x", {}, CAPTIONS_OF)), tmp_path / "x.npz")
    table = captions_of(array(changed(tmp_path / "x.npz", **{CAPTIONS: stored})).load("train"))
    with pytest.raises(UsageError, match=r"^dataset\.path=") as caught:
        _ = table.texts
    assert line in str(caught.value)


def test_a_packed_number_is_that_of_the_file(tmp_path):
    packed(folder(photos(tmp_path / "x", COLUMNS), label="age"), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert_close(torch.from_numpy(file[array_name("age")])[[0, 2]], torch.tensor([1.5, 3]))
        stored = [AttributeDescription(**each) for each in json.loads(file[ATTRIBUTES])]
    assert [str(each) for each in stored] == ["age: number, 0.1 to 2.02401e+07"]
