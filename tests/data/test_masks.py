"""Masks: joined to images, cropped alike, and label numbers from file to file."""

from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.commands.masks import completion
from diffusion_cli.data import Folder, Pack
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import HighDepthImage
from diffusion_cli.formats.pixel_readers import read_numbers
from helpers.data import array

RNG = np.random.default_rng(0)
LABELS = [0, 3, 7, 200]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pairs(root: Path, count: int = 4, size: tuple[int, int] = (10, 15), dtype: type = np.uint8) -> np.ndarray:
    """Colour images in `images` with masks in `masks`, in two classes; the masks."""
    labels = RNG.choice(np.array(LABELS, dtype), (count, *size))
    for number, mask in enumerate(labels):
        save(root / f"images/{number % 2}/{number}.png", RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
        save(root / f"masks/{number % 2}/{number}.png", mask)
    return labels


def folder(path: Path, masks: Path | str, **changes) -> Folder:
    arguments = {
        "resolution": [10, 15], "channels": 3, "range": None, "depth": "auto", "labels": "auto", "flip": False,
        "background": "white", "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder("", path=str(path), masks=str(masks), **(arguments | changes))


def numbers(dataset: Folder) -> np.ndarray:
    assert isinstance(dataset.form, HighDepthImage)
    images = dataset.load("train")
    return dataset.form.numbers(images[torch.arange(len(images))])


@pytest.mark.parametrize("place", ["images", "", "zip"])
def test_a_mask_is_the_last_channel_wherever_it_lies(tmp_path, place):
    labels = pairs(tmp_path)
    path, masks = tmp_path / place, str(tmp_path / "masks")
    if place == "zip":
        path, masks = tmp_path / "x.zip", "masks"
        with ZipFile(path, "w") as archive:
            for file in sorted(tmp_path.rglob("*.png")):
                archive.write(file, file.relative_to(tmp_path).as_posix())
    dataset = folder(path, masks)
    assert dataset.shape == (4, 10, 15)
    assert dataset.class_names == ("0", "1")
    found = numbers(dataset)
    assert found.dtype == np.uint8
    for file, image in zip(dataset.files, found, strict=True):
        stem = int(Path(file).stem)
        given = np.asarray(Image.open(tmp_path / f"images/{stem % 2}/{stem}.png")).transpose(2, 0, 1)
        np.testing.assert_array_equal(image, [*given, labels[stem]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("resolution", [6, 24, [7, 5]])
def test_labels_stay_labels_at_every_size(tmp_path, dtype, resolution):
    pairs(tmp_path, dtype=dtype)
    found = numbers(folder(tmp_path / "images", tmp_path / "masks", resolution=resolution))
    assert found.dtype == dtype
    assert set(np.unique(found[:, 3])) == set(LABELS)
    assert found[:, :3].max() <= 255


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_is_cropped_and_shrunk_as_its_image(tmp_path, dtype):
    """An image that is its own mask, of blocks of one value each."""
    blocks = RNG.integers(0, 250, (6, 14), dtype=dtype).repeat(4, 0).repeat(4, 1)
    for kind in ("images", "masks"):
        save(tmp_path / kind / "a.png", blocks)
    found = numbers(folder(tmp_path / "images", tmp_path / "masks", channels=1, resolution=24))[0]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], blocks[:, 16:40])


def test_a_range_of_its_own_spreads_the_labels(tmp_path):
    save(tmp_path / "images/a.png", np.zeros((4, 4), np.uint16))
    save(tmp_path / "masks/a.png", np.eye(4, dtype=np.uint8) * 2)
    ranges = [[0, 1000], [0, 2]]
    dataset = folder(tmp_path / "images", tmp_path / "masks", channels=1, resolution=4, range=ranges)
    assert isinstance(dataset.form, HighDepthImage)
    assert (dataset.form.dtype, dataset.form.high) == ("uint16", [1000.0, 2.0])
    x = dataset.load("train")[torch.tensor([0])][0]
    torch.testing.assert_close(x[1], 2 * torch.eye(4) - 1)


def test_labels_beyond_their_range_are_refused_and_not_made_others(tmp_path):
    save(tmp_path / "images/a.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "masks/a.png", np.array([[0, 20], [255, 1]], np.uint8).repeat(2, 0).repeat(2, 1))
    given = {"channels": 1, "resolution": 4}
    dataset = folder(tmp_path / "images", tmp_path / "masks", range=[[0, 255], [0, 20]], **given)
    said = (
        r"remove a\.png \(its mask: has labels 0 to 255, but dataset\.range limits masks to \[0,20\]; extend"
    )
    with pytest.raises(ValueError, match=said):
        dataset.load("train")
    whole = folder(tmp_path / "images", tmp_path / "masks", range=[[0, 255], [0, 255]], **given)
    assert set(np.unique(numbers(whole)[:, 1])) == {0, 1, 20, 255}


def test_masks_that_do_not_fit_are_told_by_name(tmp_path):
    pairs(tmp_path)
    images, masks = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(ValueError, match=r"dataset\.masks=.*nowhere: has no masks; give a folder"):
        folder(images, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dataset\.masks=.*: not supported for volumes"):
        folder(images, masks, resolution=[4, 4, 4])
    save(masks / "0/2.png", np.zeros((9, 15), np.uint8))
    with pytest.raises(
        ValueError, match=r"cannot use 1 .*0/2\.png \(its mask has shape \(1, 9, 15\); expected \(1, 10, 15\)"
    ):
        folder(images, masks).load("train")
    save(masks / "0/2.png", np.zeros((10, 15), np.uint16))
    with pytest.raises(ValueError, match=r"0/2\.png \(its mask: has dtype uint16; expected uint8"):
        folder(images, masks).load("train")
    save(masks / "0/2.tif", np.zeros((10, 15), np.uint8))
    with pytest.raises(ValueError, match=r"more than one mask for '0/2\.png'"):
        folder(images, masks)
    (masks / "0/2.tif").unlink()
    (masks / "0/2.png").unlink()
    with pytest.raises(ValueError, match=r"dataset\.masks=.*: has no mask for '0/2\.png'; give"):
        folder(images, masks)


def test_labels_are_not_averaged_by_growing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path, size=(8, 8))
    words = ["dataset=folder", "dataset.path=images", "dataset.masks=masks", "dataset.resolution=8",
             "dataset.range=null", "trainer=cpu", "logger=csv", "max_steps=4", "name=r"]  # fmt: skip
    assert run(["train", *words, "model=unet_tiny", "progressive=[4,8]"]) == 2
    said = "progressive=[4, 8]: not supported for images with masks, because labels cannot be averaged"
    assert said in capsys.readouterr().err


def test_a_dataset_has_masks_where_it_names_them(tmp_path):
    pairs(tmp_path)
    masked = folder(tmp_path / "images", tmp_path / "masks")
    Pack(processes=1)(masked, tmp_path / "packed.npz")
    own = np.zeros((4, 2, 8, 8), np.uint8)
    np.savez(tmp_path / "own.npz", images=own, has_masks=True)
    np.savez(tmp_path / "other.npz", images=own, has_masks=np.ones((4, 8, 8), bool))
    np.savez(tmp_path / "false.npz", images=own, has_masks=False)
    plain = array(tmp_path / "packed.npz")
    assert [masked.has_masks, plain.has_masks, array(tmp_path / "own.npz").has_masks] == [True] * 3
    without = [array(tmp_path / name) for name in ("other.npz", "false.npz")]
    assert [dataset.has_masks for dataset in without] == [False, False]
    assert not Folder("", path=str(tmp_path / "images"), resolution=8).has_masks


def test_segmentation_takes_no_opacity_for_a_mask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        save(tmp_path / f"images/{number}.png", RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8))
    words = ["dataset=folder", "dataset.path=images", "dataset.channels=4", "dataset.resolution=8",
             "condition=image", "condition.of=segmentation", "trainer=cpu", "logger=csv", "max_steps=1"]  # fmt: skip
    assert run(["train", *words, "model=unet_tiny", "name=r"]) == 2
    line = (
        "condition.of=segmentation: needs images with a mask as their last channel; "
        "set dataset.masks, or has_masks in the .npz file"
    )
    assert line in capsys.readouterr().err


@pytest.mark.slow
def test_samples_are_image_and_mask_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path, size=(8, 8))
    data = ["dataset=folder", "dataset.path=images", "dataset.masks=masks", "dataset.resolution=8",
            "dataset.range=[[0,255],[0,255],[0,255],[0,200]]", "dataset.val_fraction=0"]  # fmt: skip
    model = ["model=unet_tiny", "model.channels=32", "model.channel_mult=[1]", "model.num_res_blocks=1",
             "model.attention_resolutions=[]", "max_steps=2", "batch_size=4"]  # fmt: skip
    assert run(["train", *data, *model, "name=r", "logger=csv", "trainer=cpu"]) == 0
    assert run(["sample", "run=r", "sampler=ddim", "steps=2", "device=cpu", "num_samples=2", "output=s"]) == 0
    made = read_numbers(Path("s/000000.tif").read_bytes())
    assert (made.shape, made.dtype) == ((4, 8, 8), np.uint8)
    assert made[3].max() <= 200


def test_a_photo_is_an_input_with_its_mask(tmp_path):
    """As training reads both, from a file, by the masks of its name; a file with all channels is used as it is."""
    pairs(tmp_path)
    node = {"range": [[0, 255], [0, 255], [0, 255], [0, 200]], "depth": "auto", "background": "white"}
    dataset = folder(tmp_path / "images", tmp_path / "masks", resolution=8, range=node["range"])
    seen, form, file = dataset.load("train")[torch.arange(4)], dataset.form, tmp_path / "images/0/2.png"
    assert isinstance(form, HighDepthImage)

    def read(masks, file, fit=True):
        complete = completion(masks and str(masks), node, 2, form, dataset.shape, fit)
        return read_input(str(file), [dataset.shape], fit, None, form, complete=complete)

    (item,) = read(tmp_path / "masks", file)
    assert torch.equal(item.pixels, seen[1])
    assert torch.equal(
        torch.stack([item.pixels for item in read(tmp_path / "masks", tmp_path / "images")]), seen
    )
    form.write(item.pixels, tmp_path / "whole.tif")
    assert torch.equal(read(None, tmp_path / "whole.tif", fit=False)[0].pixels, item.pixels)
    for masks, fit, expected in (
        (None, True, "has no mask channel, with which the model was trained; set dataset.masks"),
        (tmp_path / "masks/1", True, "has no mask for"),
        (
            tmp_path / "masks",
            False,
            "is 15 x 10 colour, but must be 8 x 8 colour; convert it, or set fit=true",
        ),
    ):
        with pytest.raises(UsageError, match=rf"2\.png: .*{expected}"):
            read(masks, file, fit)
