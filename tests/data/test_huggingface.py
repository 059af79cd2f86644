"""Datasets of the library `datasets`: the same images, classes and splits as those of folders and arrays."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.data import HuggingFace, tables
from diffusion_cli.errors import UsageError
from helpers.data import array, folder, labels_of, save, write_images

library = pytest.importorskip("datasets")
pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """The library's cache in a folder of the test, and no network."""
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    library.disable_progress_bars()


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", 12, size=12)


@pytest.fixture
def saved(tmp_path, images) -> Path:
    """The same images as `save_to_disk` writes them."""
    library.load_dataset(str(images), split="train").save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def hub(path: Path | str, **changes) -> HuggingFace:
    settings = {
        "data_dir": "",
        "resolution": 8,
        "flip": False,
        "val_fraction": 0.0,
        "in_memory": True,
        "num_workers": 0,
    }
    return HuggingFace(path=str(path), **(settings | changes))


def tables_of(tmp_path: Path, **columns) -> str:
    """A saved table of three images with further columns."""
    pixels = [Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    features = {name: feature for name, (feature, _) in columns.items()}
    table = library.Dataset.from_dict(
        {"image": pixels} | {name: values for name, (_, values) in columns.items()},
        features=library.Features({"image": library.Image(), **features}),
    )
    table.save_to_disk(tmp_path / "table")
    return str(tmp_path / "table")


def shards(tmp_path: Path, count: int = 4) -> str:
    """Two tar files with images and classes, and their pattern."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for number in range(count):
                picture = io.BytesIO()
                Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(picture, "png")
                for suffix, data in {"png": picture.getvalue(), "cls": b"%d" % (number % 2)}.items():
                    entry = tarfile.TarInfo(f"{shard}{number}.{suffix}")
                    entry.size = len(data)
                    file.addfile(entry, io.BytesIO(data))
    return str(tmp_path / "*.tar")


def assert_equal_sets(one, other) -> None:
    assert (one.shape, one.class_names) == (other.shape, other.class_names)
    for split in ("train", "val"):
        mine, theirs = one.load(split), other.load(split)
        everything = torch.arange(len(theirs))
        assert len(mine) == len(theirs)
        assert_close(mine[everything], theirs[everything], rtol=0, atol=0)
        assert_close(mine.labels, theirs.labels)


def test_a_saved_set_equals_the_folder_of_its_images(images, saved, tmp_path):
    for changes in ({}, {"channels": 1}, {"resolution": [6, 10]}, {"range": [0, 300]}):
        assert_equal_sets(hub(saved, **changes), folder(images, **changes))
    parquet = tmp_path / "images.parquet"
    library.load_from_disk(saved).to_parquet(parquet)
    for other in (hub(images), hub(parquet), hub(images, builder="imagefolder"), hub(saved, in_memory=False)):
        assert_equal_sets(other, folder(images))
    assert hub(parquet).name == "images"


def test_streamed_images_are_stored_and_equal_the_folder(images, saved, tmp_path, monkeypatch):
    for source in (images, saved):
        streamed = hub(source, data_dir=str(tmp_path / "data"), streaming=True, max_images=12)
        assert_equal_sets(streamed, folder(images))
    assert len(list((tmp_path / "data" / tables.STREAMS).iterdir())) == 2
    monkeypatch.setattr(tables.Source, "_opened", None)  # the stored images need no source
    assert_equal_sets(
        hub(images, data_dir=str(tmp_path / "data"), streaming=True, max_images=12), folder(images)
    )


def test_rows_are_split_as_those_of_an_array(images, saved, tmp_path):
    given = folder(images).load("train")
    np.savez(tmp_path / "a.npz", images=given[torch.arange(12)].numpy(), labels=labels_of(given).numpy())
    settings = {"val_fraction": 0.3}
    rows, mine = array(tmp_path / "a.npz", **settings), hub(saved, **settings)
    for split in ("train", "val"):
        assert_close(mine.load(split)[torch.arange(3)], rows.load(split)[torch.arange(3)])
        assert_close(mine.load(split).labels, rows.load(split).labels)


def test_a_column_of_groups_decides_the_split(tmp_path):
    path = tables_of(tmp_path, patient=(library.Value("string"), ["a", "b", "a"]))
    dataset = hub(path, val_fraction=0.4, group="patient")
    assert {len(dataset.load("train")), len(dataset.load("val"))} == {1, 2}
    with pytest.raises(
        UsageError, match=r"^dataset\.group=patients: no such column in table; did you mean patient\?"
    ):
        hub(path, val_fraction=0.4, group="patients")
    with pytest.raises(UsageError, match=r"^dataset\.group=patient: applies to dataset\.val_fraction, and"):
        hub(path, val_split="test", group="patient")


def test_a_validation_split_of_the_set_is_used(images, tmp_path):
    whole = library.load_dataset(str(images), split="train")
    library.DatasetDict(train=whole.select(range(9)), test=whole.select(range(9, 12))).save_to_disk(
        tmp_path / "two"
    )
    dataset = hub(tmp_path / "two", val_split="test")
    assert [len(dataset.load(split)) for split in ("train", "val")] == [9, 3]
    assert len(hub(tmp_path / "two", val_split="test", max_images=2).load("train")) == 2
    with pytest.raises(UsageError, match=r"dataset.split=all: no such split; choose from train, test"):
        hub(tmp_path / "two", split="all")


def test_columns_of_integers_and_texts_are_classes_if_named(tmp_path):
    path = tables_of(
        tmp_path, n=(library.Value("int64"), [2, 0, 2]), word=(library.Value("string"), ["b", "a", "b"])
    )
    unnamed = hub(path)
    assert unnamed.class_names is None
    assert unnamed.missing_classes == "no column has the type ClassLabel; name one with dataset.label"
    assert hub(path, label="n").class_names == ("0", "1", "2")
    assert_close(hub(path, label="n").load("train").labels, torch.tensor([2, 0, 2]))
    assert hub(path, label="word").class_names == ("a", "b")
    assert_close(hub(path, label="word").load("train").labels, torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("settings", [{}, {"streaming": True, "max_images": 3}])
def test_the_library_shows_no_bars_for_local_files(images, tmp_path, capfd, settings):
    library.enable_progress_bars()
    hub(images, data_dir=str(tmp_path / "data"), **settings)
    assert capfd.readouterr() == ("", "")
    assert not library.are_progress_bars_disabled()


def test_web_datasets_have_images_and_classes(tmp_path):
    pattern = shards(tmp_path)
    whole = hub(pattern, label="cls")
    assert (len(whole.load("train")), whole.class_names) == (8, ("0", "1"))
    streamed = hub(pattern, data_dir=str(tmp_path / "data"), label="cls", streaming=True, max_images=5)
    assert_close(streamed.load("train")[torch.arange(5)], whole.load("train")[torch.arange(5)])
    assert_close(streamed.load("train").labels, torch.tensor([0, 1, 0, 1, 0]))


def test_images_on_disk_can_be_sent_to_other_processes(saved):
    images = hub(saved, in_memory=False).load("train")
    copy = pickle.loads(pickle.dumps(images))
    assert_close(copy[torch.tensor([3, 1])], images[torch.tensor([3, 1])])
    assert copy.fingerprint() == images.fingerprint()


def test_remarks_are_those_of_folders(images, saved):
    (mine,), (theirs,) = hub(saved, resolution=24).remarks(), folder(images, resolution=24).remarks()
    assert mine == theirs
    assert hub(saved, val_fraction=0.01).remarks() == [
        "dataset.val_fraction=0.01: 12 images are too few to split; training uses all of them"
    ]


def test_unreadable_images_are_named(tmp_path):
    save(tmp_path / "images" / "0.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "images" / "1.png").write_bytes(b"none")
    with pytest.raises(
        UsageError, match=r"cannot use 1 of the images; repair or remove image 1 of train \(is not"
    ):
        hub(tmp_path / "images").load("train")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_elsewhere_that_a_table_names_are_not_read(images, tmp_path, streaming):
    private, own = images / "a" / "0.png", tmp_path / "set" / "0.png"
    save(own, np.zeros((8, 8, 3), np.uint8))
    paths = [str(own), str(private), "http://localhost:1/a.png"]
    for name, chosen in {"own": paths[:1], "all": paths}.items():
        rows = [{"bytes": None, "path": path} for path in chosen]
        table = pyarrow.table({"image": rows}, library.Features({"image": library.Image()}).arrow_schema)
        parquet.write_table(table, tmp_path / "set" / f"{name}.parquet")
    settings = {"streaming": streaming, "max_images": 3, "data_dir": str(tmp_path / "data")}
    assert len(hub(tmp_path / "set" / "own.parquet", **settings).load("train")) == 1
    with pytest.raises(UsageError, match=rf"{private}, outside of the dataset; store the images") as error:
        hub(tmp_path / "set" / "all.parquet", **settings).load("train")
    assert len(error.value.lines) == 1


WRONG = {
    "owner/name": (
        {},
        r"path=owner/name: no such file or folder here, and the Hugging Face Hub .*; run diffuse data fetch with",
    ),
    "no/such/path": ({}, "no such file or folder; give one, or a name on the Hub: owner/name"),
    "saved": ({"split": "foo"}, r"dataset.split=foo: no such split; choose from train"),
    "saved/": ({"val_split": "foo"}, r"dataset.val_split=foo: no such split; choose from train"),
    "images": ({"split": "foo"}, r"dataset.split=foo: no such split; choose from train"),
    "images/": ({"name": "foo"}, r"dataset.name=foo: no such configuration; choose from default"),
    "images/.": ({"revision": "v1"}, r"dataset.revision=v1: applies to datasets of the Hub"),
    "images/a/0.png": ({}, r"0.png: not a .parquet, .tar or .arrow file; set dataset.builder"),
    "./images": ({"builder": "parquet"}, r"dataset.path=.*images: cannot be read"),
    "nothing/*.tar": ({}, r"dataset.path=nothing/\*.tar: no file has such a name; correct"),
    "./saved": ({"image": "x"}, r"dataset.image=x: no such column; choose from image, label"),
    "././saved": ({"label": "x"}, r"dataset.label=x: no such column; choose from image, label"),
    "saved/.": (
        {"streaming": True},
        r"dataset.streaming=true: needs the number of images .*; set dataset.max_images",
    ),
}


@pytest.mark.parametrize("path", WRONG)
def test_mistakes_have_one_line(path, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, line = WRONG[path]
    with pytest.raises(UsageError, match=line) as error:
        hub(path, data_dir=str(tmp_path / "data"), **settings)
    assert len(error.value.lines) == 1


def test_ambiguous_and_wrong_columns_are_mistakes(tmp_path):
    two = tables_of(tmp_path, second=(library.Image(), [None] * 3), x=(library.Value("float32"), [0.5] * 3))
    with pytest.raises(
        UsageError, match=r"image=null: there are several columns of images; choose from image, second"
    ):
        hub(two)
    assert hub(two, image="image").class_names is None
    with pytest.raises(UsageError, match=r"dataset.label=x: has one value only, '0.5'; leave it out"):
        hub(two, image="image", label="x")
    with pytest.raises(
        UsageError, match=r"cannot use 3 of the images.*image 0 of train, .*image 2 of train \(has no image\)"
    ):
        hub(two, image="second").load("train")
    classes = library.ClassLabel(names=["a", "b"])
    library.Dataset.from_dict({"n": [1]}).save_to_disk(tmp_path / "none")
    with pytest.raises(UsageError, match=r"image=null: there is no column of images; choose from n"):
        hub(tmp_path / "none")
    hidden = hub(tables_of(tmp_path / "hidden", y=(classes, [-1, -1, -1])))
    assert (hidden.class_names, hidden.missing_classes) == (
        None,
        "the labels of dataset.split=train are hidden",
    )
    with pytest.raises(UsageError, match=r"dataset.label=y: has no class for 1 image, for example image 2"):
        hub(tables_of(tmp_path / "some", y=(classes, [0, 1, -1])))
    several = hub(tables_of(tmp_path / "several", y=(classes, [0, 1, 1]), z=(classes, [0, 1, 1])))
    assert several.missing_classes == "the columns y, z have classes; name one with dataset.label"


def test_damaged_files_have_one_line(tmp_path, saved):
    (tmp_path / "short").mkdir()
    shards(tmp_path / "short")
    whole = (tmp_path / "short" / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2000])
    (table,) = saved.glob("*.arrow")
    table.write_bytes(table.read_bytes()[:500])
    for path in (tmp_path / "cut.tar", saved):
        with pytest.raises(UsageError, match=rf"dataset.path={path}: cannot be read \(.+\)") as error:
            hub(path)
        assert len(error.value.lines) == 1


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"needs the package datasets; install it: pip install 'diffuse-cli\[hf\]'"
    ):
        hub("owner/name")


def test_fetch_downloads_a_set_and_list_does_not(saved, tmp_path, monkeypatch, capsys):
    words = ["dataset=huggingface", f"dataset.path={saved}", f"data_dir={tmp_path}/data"]
    assert run(["data", "fetch", *words, "dataset.streaming=true", "dataset.max_images=10"]) == 0
    assert capsys.readouterr().out == "saved: 9 images for training, 1 for validation\n"
    assert (tmp_path / "data" / tables.STREAMS).is_dir()
    monkeypatch.setattr(tables.Source, "_opened", None)
    assert run(["data", "list", *words]) == 0
    assert capsys.readouterr().out.startswith("These options need no published files")


def test_a_saved_set_given_as_a_folder_names_its_option(saved):
    with pytest.raises(
        UsageError, match="has no images; it was saved by the library datasets; use dataset=hugg"
    ):
        folder(saved)


def test_columns_of_each_type_are_attributes(tmp_path):
    path = tables_of(
        tmp_path,
        age=(library.Value("float64"), [0.5, None, 2.0]),
        word=(library.Value("string"), ["b", "a", None]),
        smiles=(library.Value("bool"), [True, False, True]),
        kind=(library.ClassLabel(names=["z", "y", "x"]), [2, 0, -1]),
    )
    dataset = hub(path, label=["age", "word", "smiles", "kind"])
    assert [str(each) for each in dataset.attributes] == [
        "age: number, 0.5 to 2", "word: 2 classes", "smiles: yes/no", "kind: 3 classes",
    ]  # fmt: skip
    images = dataset.load("train")
    condition = images.condition(torch.arange(3), images[torch.arange(3)])
    assert condition is not None
    assert condition.values["age"].nan_to_num(-1).tolist() == [0.5, -1, 2]
    assert condition.values["word"].tolist() == [1, 0, -1]
    assert condition.values["smiles"].tolist() == [1, 0, 1]
    assert condition.values["kind"].tolist() == [2, 0, -1]
    alone = hub(path, label="age")
    assert (alone.class_names, len(alone.attributes)) == (None, 1)


def test_a_named_column_of_integers_is_classes_with_a_line(tmp_path):
    path = tables_of(tmp_path, n=(library.Value("int64"), [2, 0, 2]))
    line = "dataset.label: n: 3 classes, one for each integer; dataset.label={n: number} makes it a number"
    assert line in hub(path, label="n").remarks()
    assert [str(each) for each in hub(path, label={"n": "number"}).attributes] == ["n: number, 0 to 2"]


def test_attributes_of_two_splits_stay_with_their_images(tmp_path):
    path = tables_of(tmp_path, age=(library.Value("float64"), [1.0, 2.0, 9.0]))
    table = library.load_from_disk(path)
    library.DatasetDict(train=table.select([0, 1]), test=table.select([2])).save_to_disk(tmp_path / "two")
    dataset = hub(tmp_path / "two", val_split="test", label="age")
    images = dataset.load("val")
    condition = images.condition(torch.arange(1), images[torch.arange(1)])
    assert condition is not None
    assert condition.values["age"].tolist() == [9]
    assert str(dataset.attributes[0]) == "age: number, 1 to 2"
