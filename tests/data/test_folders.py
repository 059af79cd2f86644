"""Folders and archives of images, their labels and splits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.data.file_images import FileImages
from diffusion_cli.errors import UsageError
from helpers.data import array, folder, labels_of, save, write_images, zipped

RNG = np.random.default_rng(0)


def test_class_folders_become_labels(tmp_path):
    for name in ("dog/1.png", "cat/deep/1.png", "dog/2.png", "bee/1.png"):
        save(tmp_path / "wrapped" / name, np.zeros((8, 8), np.uint8))
    for path in (tmp_path, tmp_path / "wrapped"):
        dataset = folder(path)
        assert dataset.class_names == ("bee", "cat", "dog")
        assert dataset.num_classes == 3
        assert_close(dataset.load("train").labels, torch.tensor([0, 1, 2, 2]))
    assert folder(tmp_path, labels="none").class_names is None
    assert folder(tmp_path, labels="none").load("train").labels is None
    assert folder(tmp_path / "wrapped/dog").class_names is None
    save(tmp_path / "wrapped/loose.png", np.zeros((8, 8), np.uint8))
    assert folder(tmp_path).class_names is None


def write_labelled(path: Path, table: str | bytes, name: str = "labels.csv") -> Path:
    """The images a/0.png, a/1.png and b.png, and a table of labels."""
    for number, image in enumerate(("a/0.png", "a/1.png", "b.png")):
        save(path / image, np.full((8, 8), number, np.uint8))
    (path / name).write_bytes(table if isinstance(table, bytes) else table.encode())
    return path


@pytest.fixture(params=["folder", "zip"])
def as_source(request, tmp_path):
    """A folder as it is, or zipped: both must be the same dataset."""
    return lambda path: path if request.param == "folder" else zipped(path, tmp_path / "source.zip")


def test_a_table_gives_labels(tmp_path, as_source):
    table = 'note, label ,file\r\n1,"red, dark",b.png\r\n\r\n2, blue , a/1.png\r\n,,\r\n3,blue,a/0.png\r\n'
    source = as_source(write_labelled(tmp_path / "images", b"\xef\xbb\xbf" + table.encode()))
    for labels in ("auto", "csv"):
        dataset = folder(source, labels=labels)
        assert dataset.class_names == ("blue", "red, dark")
        images = dataset.load("train")
        assert_close(images.labels, torch.tensor([0, 0, 1]))
        assert labels_of(images).dtype == torch.int64
    assert folder(source, labels="none").class_names is None


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (("10", "9", "-1"), ("-1", "9", "10"), [2, 1, 0]),
        (("10", "9", "x"), ("10", "9", "x"), [0, 1, 2]),
        (("07", "7", "6"), ("6", "07", "7"), [1, 2, 0]),
        (("one", "one", "one"), ("one",), [0, 0, 0]),
    ],
)
def test_classes_are_in_numeric_order_if_all_are_numbers(tmp_path, labels, names, expected):
    table = "file,label\na/0.png,{}\na/1.png,{}\nb.png,{}\n".format(*labels)
    dataset = folder(write_labelled(tmp_path, table))
    assert dataset.class_names == names
    assert_close(dataset.load("train").labels, torch.tensor(expected))


@pytest.mark.parametrize(
    ("place", "prefix"), [("", "outer/wrapped/"), ("outer/", "wrapped/"), ("outer/wrapped/", "")]
)
def test_a_table_lies_in_any_folder_that_holds_all_images(tmp_path, as_source, place, prefix):
    table = "file,label\n" + "".join(f"{prefix}{name},{name}\n" for name in ("a/0.png", "a/1.png", "b.png"))
    write_labelled(tmp_path / "images/outer/wrapped", table, "x")
    (tmp_path / "images/outer/wrapped/x").rename(tmp_path / f"images/{place}labels.csv")
    for below in ("a/labels.csv", "../labels.csv" if place == "" else "x.csv"):  # of these, none counts
        (tmp_path / "images/outer/wrapped" / below).write_text("junk")
    dataset = folder(as_source(tmp_path / "images"), labels="csv")
    assert dataset.class_names == ("a/0.png", "a/1.png", "b.png")
    assert_close(dataset.load("train").labels, torch.tensor([0, 1, 2]))


def test_auto_takes_the_table_then_the_folders(tmp_path, as_source):
    source = write_images(tmp_path / "images", 2)
    table = source / "labels.csv"
    assert folder(as_source(source)).class_names == ("a", "b")
    table.write_text("file,label\na/0.png,second\nb/1.png,first\n")
    dataset = folder(as_source(source))
    assert dataset.class_names == ("first", "second")
    assert_close(dataset.load("train").labels, torch.tensor([1, 0]))
    assert folder(as_source(source), labels="folders").class_names == ("a", "b")
    table.write_text("junk")
    with pytest.raises(ValueError, match=r"labels\.csv needs a header"):
        folder(as_source(source))
    assert folder(as_source(source), labels="folders").class_names == ("a", "b")
    assert folder(as_source(source), labels="none").class_names is None


def test_labels_asked_for_must_be_there(tmp_path, as_source):
    source = as_source(write_labelled(tmp_path / "images", "file,label\n", "other.csv"))
    with pytest.raises(ValueError, match=r"^dataset\.labels=csv: no labels\.csv.*; create it"):
        folder(source, labels="csv")
    with pytest.raises(ValueError, match=r"^dataset\.labels=folders: .* two or more class folders; sort"):
        folder(source, labels="folders")
    assert folder(source).class_names is None


ROWS = "a/0.png,x\na/1.png,x\nb.png,y\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "needs a header line .* begins with ''; add 'file,label'"),
        (ROWS, r"needs a header line .* begins with 'a/0\.png,x'; add"),
        ("file,class\n" + ROWS, "needs a header line .* begins with 'file,class'; add"),
        ("file;label\na/0.png;x\n", "needs a header line .* begins with 'file;label'; add"),
        ("file,label,label\n" + ROWS, "has more than one column 'label'; rename them"),
        ("file,label\n", r"has no row for 'a/0\.png', 'a/1\.png', 'b\.png'; add"),
        ("file,label\nb.png,y\n", r"has no row for 'a/0\.png', 'a/1\.png'; add"),
        ("file,label\n" + ROWS + "c.png,x\n,x\n", r"names files that do not exist: 'c\.png', ''; remove"),
        (
            "file,label\n" + ROWS.replace("/", "\\") + "1,x\n2,x\n3,x\n",
            r"names files that do not exist: 'a\\\\0\.png', 'a\\\\1\.png', '1' and 2 more; .* with /",
        ),
        ('file,label\n"c\n.png",x\n' + ROWS, r"names files that do not exist: 'c\\n\.png'; remove"),
        ("file,label\n" + ROWS + "b.png,y\n", r"has more than one row for 'b\.png'; keep"),
        ("file,label\na/0.png, \na/1.png\nb.png,y\n", r"has no label for 'a/0\.png', 'a/1\.png'; complete"),
        ("file,label\n" + ROWS.replace("y", "y,z"), r"more fields than its header in 'b\.png,y,z'; quote"),
        ('file,label\n"a/0.png,x\n', r"is not valid CSV \(line 2: .*\); repair"),
        (
            ("file,label\n" + ROWS.replace("y", "é")).encode("latin-1"),
            r"is not UTF-8 \(line 4: .*\); save it",
        ),
        (b"\xef\xbb\xbf\n\n\n\xff", r"is not UTF-8 \(line 4: .*\); save it"),
        (("file,label\n" + ROWS).encode("utf-16"), r"is not UTF-8 \(line 1: .*\); save it"),
    ],
)
def test_a_table_that_does_not_match_the_images_is_refused(tmp_path, as_source, table, message):
    source = as_source(write_labelled(tmp_path / "images", table))
    for labels in ("auto", "csv"):
        with pytest.raises(ValueError, match=rf"^dataset\.path=.*: labels\.csv .*{message}") as caught:
            folder(source, labels=labels)
        assert "\n" not in str(caught.value)
    assert folder(source, labels="none").class_names is None


def test_a_damaged_table_in_an_archive_is_refused(tmp_path):
    archive = zipped(write_labelled(tmp_path / "images", "file,label\n" + ROWS), tmp_path / "x.zip")
    archive.write_bytes(archive.read_bytes().replace(b"b.png,y", b"b.png,z"))
    with pytest.raises(ValueError, match=r"x\.zip: labels\.csv cannot be read \(.*CRC.*\); repair"):
        folder(archive)


def test_labels_of_a_table_stay_with_their_images_in_both_splits(tmp_path, as_source):
    for number in range(40):
        save(tmp_path / f"images/{number}.png", np.full((8, 8), number, np.uint8))
    rows = "".join(f"{number}.png,{number}\n" for number in reversed(range(40)))
    (tmp_path / "images/labels.csv").write_text("file,label\n" + rows)
    dataset = folder(as_source(tmp_path / "images"), val_fraction=0.5)
    assert dataset.class_names == tuple(map(str, range(40)))
    seen = []
    for split in ("train", "val"):
        images = dataset.load(split)
        assert len(images) > 0
        pixels = images[torch.arange(len(images))]
        assert_close(labels_of(images), pixels[:, 0, 0, 0].long())
        seen += labels_of(images).tolist()
    assert sorted(seen) == list(range(40))


def test_what_systems_leave_behind_is_ignored(tmp_path):
    write_images(tmp_path, 2)
    for name in ("a/.DS_Store", "a/._0.png", "__MACOSX/a/0.png", ".cache/1.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"junk")
    assert folder(tmp_path).files == ["a/0.png", "b/1.png"]
    assert folder(zipped(tmp_path, tmp_path.with_suffix(".zip"))).files == ["a/0.png", "b/1.png"]


def test_an_archive_is_the_folder_it_was_made_of(tmp_path):
    source = write_images(tmp_path / "images", 7, size=20)
    archive = zipped(source, tmp_path / "images.zip")
    for split in ("train", "val"):
        from_folder, from_zip = (folder(path, val_fraction=0.5).load(split) for path in (source, archive))
        assert len(from_folder) > 0
        assert from_folder.digest() == from_zip.digest()


def test_paths_without_images_are_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.path=.*missing: does not exist"):
        folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no images"):
        folder(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="neither a folder nor a readable"):
        folder(tmp_path / "x.zip")


def test_adding_files_moves_none_between_the_splits(tmp_path):
    def names(split) -> set[str]:
        images = folder(tmp_path, val_fraction=0.25, in_memory=False, labels="none").load(split)
        assert isinstance(images, FileImages)
        return set(images.names)

    write_images(tmp_path, 200, size=1)
    train, val = names("train"), names("val")
    assert not train & val
    assert len(train | val) == 200
    assert abs(len(val) - 50) < 4 * math.sqrt(200 * 0.25 * 0.75)
    for number in range(20):
        save(tmp_path / f"a/{number}_new.png", np.zeros((1, 1), np.uint8))
    assert train < names("train")
    assert val <= names("val")


def test_a_few_images_are_divided_or_all_trained_on_with_a_line(tmp_path):
    for count in range(1, 14):
        save(tmp_path / f"{count}.png", np.zeros((8, 8), np.uint8))
        for val in (0.0, 0.001, 0.1, 0.5, 0.99):
            images = folder(tmp_path, val_fraction=val)
            trained, kept = (len(images.load(split)) for split in ("train", "val"))
            assert trained > 0
            assert trained + kept == count
            assert kept > 0 or min(round(val * count), count - 1) <= 0
            assert ("too few" in " ".join(images.remarks())) == (val > 0 and kept == 0)


def test_a_few_rows_are_divided_or_all_trained_on_with_a_line(tmp_path):
    for count in (1, 3, 9):
        np.save(tmp_path / "x.npy", np.zeros((count, 8, 8), np.uint8))
        images = array(tmp_path / "x.npy", val_fraction=0.1)
        assert [len(images.load(split)) for split in ("train", "val")] == [
            count - (count > 4),
            int(count > 4),
        ]
        assert ("too few" in " ".join(images.remarks())) == (count < 5)


def test_a_folder_has_its_whole_name(tmp_path, monkeypatch):
    for name in ("faces.v1", "faces.v2"):
        write_images(tmp_path / name, 3)
        assert folder(tmp_path / name).name == name
    assert folder(zipped(tmp_path / "faces.v1", tmp_path / "faces.v1.zip")).name == "faces.v1"
    monkeypatch.chdir(tmp_path / "faces.v2")
    assert folder(Path()).name == "faces.v2"
