"""Files that cannot be decoded: all named in one error, or skipped, listed and found once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.data.encoded import EncodedImages
from diffusion_cli.data.unreadable import LISTS
from diffusion_cli.errors import UsageError
from helpers import TINY
from helpers.data import folder, labels_of, save, write_images, zipped


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Six images, three of which are damaged: the first, one in the middle, and one of another depth."""
    path = write_images(tmp_path / "photos", 6)
    (path / "a" / "0.png").write_bytes(b"none")
    whole = (path / "b" / "3.png").read_bytes()
    (path / "b" / "3.png").write_bytes(whole[: len(whole) // 2])
    save(path / "a" / "4.png", np.zeros((8, 8), np.uint16))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_unreadable_files_are_skipped_and_listed(damaged, tmp_path, kind, monkeypatch):
    source = damaged if kind == "folder" else zipped(damaged, tmp_path / "photos.zip")
    with pytest.raises(UsageError, match="cannot use 3 of the images"):
        folder(source).load("train")
    settings = {"unreadable": "skip", "data_dir": str(tmp_path / "data")}
    dataset = folder(source, **settings)
    assert dataset.files == ["a/2.png", "b/1.png", "b/5.png"]
    for name in ("a/0.png", "b/3.png", "a/4.png"):
        (damaged / name).unlink()
    clean = folder(damaged)
    everything = torch.arange(3)
    assert_close(dataset.load("train")[everything], clean.load("train")[everything], rtol=0, atol=0)
    assert_close(labels_of(dataset.load("train")), labels_of(clean.load("train")))
    assert dataset.load("train").fingerprint() == clean.load("train").fingerprint()
    (listed,) = (tmp_path / "data" / LISTS).iterdir()
    line, *_ = dataset.remarks()
    start = f"dataset.path={source}: 3 files are unreadable and skipped, as listed in {listed}: a/0.png (is not an"
    assert line.startswith(start)
    assert "; a/4.png (has uint16 pixels, and the first file uint8;" in line


def test_images_are_checked_once_until_they_change(damaged, tmp_path, monkeypatch):
    settings = {"unreadable": "skip", "data_dir": str(tmp_path / "data")}
    checked, unreadable = [], EncodedImages.unreadable
    monkeypatch.setattr(
        EncodedImages, "unreadable", lambda self: checked.append(len(self)) or unreadable(self)
    )
    assert len(folder(damaged, **settings).files) == len(folder(damaged, **settings).files) == 3
    assert checked == [6]
    save(damaged / "a" / "0.png", np.zeros((8, 8, 3), np.uint8))
    assert len(folder(damaged, **settings).files) == 4
    assert checked == [6, 6]
    assert len(folder(damaged, resolution=4, **settings).files) == 4
    assert checked == [6, 6, 6]  # by another decoder
    for place in (tmp_path / "data" / LISTS).iterdir():
        place.write_text("damaged")
    assert len(folder(damaged, **settings).files) == 4
    assert checked == [6, 6, 6, 6]


def test_a_folder_without_a_readable_file_is_a_mistake(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(b"none")
    with pytest.raises(UsageError, match=r"none of the 2 files is readable \(0.png: is not an image in"):
        folder(tmp_path, unreadable="skip", data_dir=str(tmp_path / "data"))


def test_a_broken_link_is_an_unreadable_file(tmp_path):
    path = write_images(tmp_path / "photos", 4)
    (path / "a" / "0.png").unlink()
    (path / "a" / "0.png").symlink_to(tmp_path / "gone.png")
    settings = {"unreadable": "skip", "data_dir": str(tmp_path / "data")}
    assert folder(path, **settings).files == ["a/2.png", "b/1.png", "b/3.png"]
    save(tmp_path / "gone.png", np.zeros((8, 8, 3), np.uint8))
    assert len(folder(path, **settings).files) == 4


def test_a_broken_first_mask_is_skipped_with_its_image(tmp_path):
    path = write_images(tmp_path / "photos", 4)
    for image in path.rglob("*.png"):
        save(tmp_path / "masks" / image.relative_to(path), np.zeros((8, 8), np.uint16))
    (tmp_path / "masks" / "a" / "0.png").write_bytes(b"none")
    settings = {"unreadable": "skip", "data_dir": str(tmp_path / "data"), "masks": str(tmp_path / "masks")}
    dataset = folder(path, **settings)
    assert dataset.files == ["a/2.png", "b/1.png", "b/3.png"]
    assert dataset.load("train").shape == (4, 8, 8)


def test_a_broken_first_volume_is_skipped(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((4, 8, 8), number, np.float32))
    (tmp_path / "0.npy").write_bytes(b"none")
    settings = {"resolution": [4, 8, 8], "channels": 1, "range": [0, 2], "data_dir": str(tmp_path / "data")}
    with pytest.raises(UsageError, match=r"0.npy: Binary block is wrong size"):
        folder(tmp_path, **settings)
    dataset = folder(tmp_path, unreadable="skip", **settings)
    assert dataset.files == ["1.npy", "2.npy"]
    assert_close(dataset.load("train")[torch.arange(2)].mean((1, 2, 3, 4)), torch.tensor([0.0, 1.0]))
    (tmp_path / "1.npy").write_bytes(b"none")
    (tmp_path / "2.npy").unlink()
    with pytest.raises(UsageError, match=r"0.npy: Binary block is wrong size"):
        folder(tmp_path, unreadable="skip", **settings)


def test_whole_files_give_no_remark(tmp_path):
    write_images(tmp_path / "photos", 4)
    dataset = folder(tmp_path / "photos", unreadable="skip", data_dir=str(tmp_path / "data"))
    assert not [line for line in dataset.remarks() if "unreadable" in line]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_of_an_earlier_version_continues_and_one_with_fewer_images_does_not(damaged, tmp_path, capsys):
    words = [word for word in TINY if not word.startswith("name=")]
    words += [
        "dataset=folder",
        f"dataset.path={damaged}",
        "dataset.resolution=8",
        "model=unet_tiny",
        "name=run",
    ]
    words += [f"output_dir={tmp_path}", f"data_dir={tmp_path}/data", "batch_size=2"]
    assert run([*words, "dataset.unreadable=skip", "max_steps=1"]) == 0
    stored = tmp_path / "run" / "config.yaml"
    stored.write_text(stored.read_text().replace("  unreadable: skip\n", ""))
    assert run([*words, "dataset.unreadable=skip", "max_steps=2"]) == 0
    assert "3 files are unreadable and skipped" in capsys.readouterr().err
    save(damaged / "a" / "0.png", np.zeros((8, 8, 3), np.uint8))
    assert run([*words, "dataset.unreadable=skip", "max_steps=3"]) == 2
    assert "restore the data, or choose another name=" in capsys.readouterr().err
