"""Images of any depth through data sets and commands."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import Array, Pack, given_images
from diffusion_cli.data.decoding import ImageDecoder
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Dicom, HighDepthImage, image_form
from diffusion_cli.formats.dicom_reader import read_scan
from diffusion_cli.formats.pixel_readers import depth_of, read_numbers
from helpers.formats import dicom, folder, images, saved

RNG = np.random.default_rng(0)


def fill(path: Path, count: int = 6, size: tuple[int, int] = (10, 15), dtype: type = np.uint16) -> np.ndarray:
    """Images of one size as PNG, their numbers."""
    path.mkdir(parents=True, exist_ok=True)
    numbers = RNG.integers(0, np.iinfo(dtype).max, (count, *size), dtype=dtype)
    for number, pixels in enumerate(numbers):
        Image.fromarray(pixels).save(path / f"{number}.png")
    return numbers


def test_a_folder_of_sixteen_bits_that_are_not_square_is_held_as_it_is(tmp_path):
    numbers = fill(tmp_path)
    dataset = folder(tmp_path, resolution=[10, 15])
    assert isinstance(dataset.form, HighDepthImage)
    np.testing.assert_array_equal(dataset.form.numbers(images(dataset))[:, 0], numbers)


def test_images_are_mirrored_and_scans_of_patients_are_not(tmp_path):
    fill(tmp_path / "png", 1)
    (tmp_path / "a.dcm").write_bytes(dicom(np.zeros((8, 8), np.int16)))
    assert folder(tmp_path / "png", flip=None).flip
    scans = folder(tmp_path, flip=None)  # by the first file
    assert isinstance(scans.form, Dicom)
    assert not scans.flip
    assert folder(tmp_path, flip=True).flip


def test_resizing_is_that_of_bytes(tmp_path):
    """To one of their 255 values, for the numbers 257 times theirs."""
    numbers = fill(tmp_path / "bytes", size=(20, 31), dtype=np.uint8)
    for number, pixels in enumerate(numbers):
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep" / f"{number}.png")
    bytes_ = images(folder(tmp_path / "bytes", resolution=[8, 12])).float()
    assert bytes_.shape[1:] == (1, 8, 12)
    deep = (images(folder(tmp_path / "deep", resolution=[8, 12])) + 1) * 127.5
    assert_close(deep, bytes_, rtol=0, atol=1.01)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [48, 400])
def test_an_image_that_is_not_square_is_cropped_to_the_aspect_around_the_centre(turned, side):
    """What is cut away is white; also of a JPEG that is decoded at a part of its size."""
    pixels = np.full((side, side), 255, np.uint8)
    pixels[side // 4 : -side // 4] = np.linspace(20, 200, side, dtype=np.uint8)
    image, options = Image.fromarray(pixels), {}
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    found = ImageDecoder((1, 8, 16), "white", False)(buffer.getvalue())[0].astype(float)
    inner = np.linspace(20, 200, side).reshape(16, -1).mean(1)
    assert abs(found[2:-2] - inner).max() < 8


@pytest.mark.parametrize("first", ["deep", "bytes"])
def test_files_of_several_depths_are_refused_by_name(tmp_path, first):
    for name, dtype in (("a", np.uint16), ("b", np.uint8)):
        other = dtype if first == "deep" else {np.uint16: np.uint8, np.uint8: np.uint16}[dtype]
        fill(tmp_path / name, 1, dtype=other)
    with pytest.raises(ValueError, match=r"cannot use 1 of the images.*b/0\.png \(has"):
        folder(tmp_path).load("train")
    assert images(folder(tmp_path, depth=8)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 3}, r"dataset\.channels=3: the images have 1; set dataset\.channels=1"),
        ({"range": "window"}, r"dataset\.range=window: applies to DICOM"),
        ({"depth": 8, "range": [0, 5]}, r"dataset\.depth=8: .*without dataset\.range"),
    ],
)
def test_what_the_files_are_not_is_told_before_they_are_read(tmp_path, changes, message):
    fill(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **changes)


def test_real_numbers_that_are_none_are_told_by_file(tmp_path):
    for name, value in (("a", 0.0), ("b", np.nan), ("c", np.inf)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.full((8, 8), value, np.float32))
    with pytest.raises(
        ValueError, match=r"cannot use 2 of.*b\.tif, c\.tif \(has values that are not finite\)"
    ):
        folder(tmp_path, range=[0, 1]).load("train")


def test_a_broken_scan_is_told_by_file(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(np.zeros((4, 5), np.int16))[:200])
    with pytest.raises(ValueError, match=r"dataset\.path=.*: cannot use a\.dcm \("):
        folder(tmp_path)


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize(("dtype", "given"), [("uint16", None), ("int16", None), ("float32", [0, 1])])
def test_arrays_of_any_depth_and_channels(tmp_path, layout, dtype, given):
    numbers = (RNG.random((6, 5, 8, 9)) * (1 if given else 30_000)).astype(dtype)
    np.save(tmp_path / "x.npy", numbers if layout == "first" else numbers.transpose(0, 2, 3, 1))
    dataset = Array("", path=f"{tmp_path}/x.npy", range=given, flip=False, val_fraction=0.0, in_memory=None)
    assert dataset.shape == (5, 8, 9)
    assert isinstance(dataset.form, HighDepthImage)
    np.testing.assert_allclose(dataset.form.numbers(images(dataset)), numbers, atol=1e-7 if given else 0)


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_a_packed_dataset_keeps_its_numbers_and_its_form(tmp_path, kind):
    if kind == "png":
        fill(tmp_path / "x")
    else:
        (tmp_path / "x").mkdir()
        for number in range(4):
            data = dicom(RNG.integers(0, 2000, (10, 15), dtype=np.int16), RescaleIntercept=-1000)
            (tmp_path / "x" / f"{number}.dcm").write_bytes(data)
    dataset = folder(tmp_path / "x", resolution=[10, 15], range=None if kind == "png" else [-1000, 1000])
    Pack(processes=0)(dataset, tmp_path / "x.npz")
    packed = Array("", path=f"{tmp_path}/x.npz", range=None, flip=False, val_fraction=None, in_memory=None)
    assert packed.form == dataset.form
    assert np.load(tmp_path / "x.npz")["images"].dtype == (np.uint16 if kind == "png" else np.int16)
    assert_close(images(packed), images(dataset), rtol=0, atol=0)
    assert packed.load("train").digest() == dataset.load("train").digest()


def test_files_of_another_form_are_no_samples(tmp_path):
    fill(tmp_path, 2)
    deep = image_form("uint16", 1, None)
    found = given_images(tmp_path, "samples", (1, 10, 15), deep)
    assert len(found.images) == 2
    with pytest.raises(ValueError, match=r"0\.png \(has dtype uint16; expected int16"):
        given_images(tmp_path, "samples", (1, 10, 15), image_form("int16", 1, None)).images[torch.tensor([0])]


def test_inputs_of_an_edit_are_read_in_their_depth(tmp_path):
    numbers = fill(tmp_path, 1)
    form = image_form("uint16", 1, None)
    assert isinstance(form, HighDepthImage)
    (found,) = read_input(str(tmp_path), [(1, 10, 15)], False, None, form)
    np.testing.assert_array_equal(form.numbers(found.pixels)[0], numbers[0])
    with pytest.raises(UsageError, match=r"is 15 x 10 gray, but must be 6 x 4 gray.*crop and resize"):
        read_input(str(tmp_path), [(1, 4, 6)], False, None, form)
    (found,) = read_input(str(tmp_path), [(1, 4, 6)], True, None, form)
    assert_close(form.quantize(found.pixels), found.pixels, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_a_folder_goes_through_every_command_and_comes_back_in_its_depth(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name in ("x/a", "x/b"):
        Path(name).mkdir(parents=True)
        for number in range(6) if kind == "dicom" else ():
            scan = dicom(RNG.integers(0, 2000, (10, 15), dtype=np.int16), RescaleIntercept=-1000)
            Path(name, f"{number}.dcm").write_bytes(scan)
        if kind == "png":
            fill(Path(name))
    data = ["dataset=folder", "dataset.path=x", "dataset.resolution=[10,15]", "dataset.channels=1",
            "dataset.in_memory=true", "dataset.val_fraction=0.3"]  # fmt: skip
    data += [] if kind == "png" else ["dataset.range=[-1000,1000]"]
    model = ["model=unet_tiny", "model.channels=32", "model.channel_mult=[1]", "model.num_res_blocks=1",
             "model.attention_resolutions=[]", "max_steps=2", "batch_size=4"]  # fmt: skip
    short = ["run=r", "sampler=ddim", "steps=2", "device=cpu"]
    measured = [
        "metric=fid",
        "features=classifier",
        "features.steps=2",
        "features.batch_size=4",
        "cache_dir=c",
    ]
    suffix = ".png" if kind == "png" else ".dcm"
    assert run(["train", *data, *model, "name=r", "logger=csv", "trainer=cpu"]) == 0
    assert run(["sample", *short, "num_samples=3", "output=s"]) == 0
    assert (
        run(["edit", *short, "edit=inpaint", "restoration=replacement", f"input=x/a/0{suffix}", "output=e"])
        == 0
    )
    assert run(["eval", *short, "num_samples=6", *measured, "force=true"]) == 0
    assert run(["eval", "samples=s", *data, *measured, "device=cpu", "force=true"]) == 0
    before, *made = (
        Path(name).read_bytes() for name in (f"x/a/0{suffix}", f"s/000000{suffix}", f"e/0{suffix}")
    )
    if kind == "png":
        assert [depth_of(each) for each in made] == ["uint16"] * 2
        known = read_numbers(before)[0], read_numbers(made[1])[0]
    else:
        scans = [read_scan(each) for each in made]
        assert {(scan.pixels.dtype.name, scan.bits, scan.intercept) for scan in scans} == {
            ("int16", 16, -1000)
        }
        known = read_scan(before).pixels, scans[1].pixels
    np.testing.assert_array_equal(known[0][:2], known[1][:2])  # above what was painted anew


@pytest.mark.parametrize(
    ("numbers", "given", "said"),
    [
        (np.linspace(3000, 4095, 64, dtype=np.uint16), [0, 1], "dataset.range=[0,1]: clips 100% of the values of the "
         "first image, 3000 to 4095; give dataset.range=[low,high]"),
        (np.linspace(0, 4095, 64, dtype=np.uint16), None, "dataset.range=[0,65535]: only 6.2% of it is used by the "
         "values of the first image, 0 to 4095"),
        (np.linspace(-1, 1, 64, dtype=np.float32), [-1, 1], ""),
        (np.linspace(-32768, 32767, 64).astype(np.int16), None, ""),
        (np.linspace(0, 9000, 64, dtype=np.uint16), None, ""),
        (np.linspace(0, 9, 64, dtype=np.uint8), [0, 255], "dataset.range=[0,255]: only 3.5% of it is used"),
        (np.linspace(0, 9, 64, dtype=np.uint8), [0, 9], ""),
        (np.linspace(0, 32, 64, dtype=np.uint8), None, ""),
        (np.zeros(64, np.uint8), None, "dataset.range=null: bytes have the range [0,255], and only 0.0% of it is used "
         "by the values of the first image, 0 to 0; give dataset.range=[low,high] of all images"),
    ],
)  # fmt: skip
def test_a_range_that_images_do_not_have_is_remarked_on(tmp_path, numbers, given, said):
    image = numbers.reshape(8, 8)
    np.save(tmp_path / "a.npy", image[None])
    np.savez_compressed(tmp_path / "a.npz", images=image[None])
    (tmp_path / "files").mkdir()
    tifffile.imwrite(tmp_path / "files" / "a.tif", image)
    options = {"range": given, "flip": False, "val_fraction": 0.0, "in_memory": None}
    stacked = [Array("", path=f"{tmp_path}/a.{suffix}", **options) for suffix in ("npy", "npz")]
    for dataset in (folder(tmp_path / "files", range=given), *stacked):
        remarks = dataset.remarks()
        assert len(remarks) == bool(said)
        assert all(remark.startswith(said) for remark in remarks)


def test_the_values_of_some_images_count_together(tmp_path):
    """A label or a night is dark by itself; all of a data set are not."""
    dark = np.zeros((20, 8, 8, 3), np.uint8)
    dark[::2] = RNG.integers(0, 2, (10, 8, 8, 3))
    for number, pixels in enumerate(dark):
        saved(tmp_path / "dark" / f"{number:02d}.png", pixels)
    np.savez_compressed(tmp_path / "dark.npz", images=dark.astype(np.uint8))
    np.save(tmp_path / "turned.npy", np.asfortranarray(dark))
    line = (
        "bytes have the range [0,255], and only 0.4% of it is used by the values of 8 images examined, 0 to 1"
    )
    for path in (tmp_path / "dark.npz", tmp_path / "turned.npy", tmp_path / "dark"):
        options = {"range": None, "flip": False, "val_fraction": 0.0, "in_memory": None}
        array = path.is_file()
        dataset = Array("", path=str(path), **options) if array else folder(path, channels=3)
        (found,) = dataset.remarks()
        assert found.startswith(f"dataset.range=null: {line}")
        (given,) = given_images(path, "samples").remarks
        assert given == f"samples={path}: {line}; rescale them if this is not intended"
    saved(tmp_path / "dark/19.png", np.full((8, 8, 3), 200, np.uint8))
    assert folder(tmp_path / "dark", channels=3, range=[0, 1]).remarks() == []


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((24, 24, 3), "[24,24,3] is read as 24 gray images of height 24 and width 3;"),
        ((16, 16, 40), "[16,16,40] is read as 16 gray images of height 16 and width 40;"),
        ((28, 20, 300), "[28,20,300] is read as 28 gray images of height 20 and width 300;"),
        ((32, 32, 3, 40), "[32,32,3,40] is read as 32 images of 32 channels of height 3 and width 40;"),
        ((3, 32, 32, 40), "[3,32,32,40] is read as 3 images of 32 channels of height 32 and width 40;"),
        ((5, 16, 16), ""), ((16, 16, 16), ""), ((5, 16, 24, 3), ""), ((3, 3, 16, 24), ""), ((9, 16, 20, 7), ""),
    ],
)  # fmt: skip
def test_an_array_of_unlikely_axes_is_described_as_it_is_read(tmp_path, shape, said):
    np.save(tmp_path / "x.npy", RNG.integers(0, 256, shape, dtype=np.uint8))
    dataset = Array("", path=f"{tmp_path}/x.npy", range=None, flip=False, val_fraction=0.0, in_memory=None)
    found = dataset.remarks()
    assert len(found) == bool(said)
    assert all(line.startswith(f"dataset.path={tmp_path}/x.npy: the array {said}") for line in found)
    assert [
        line.replace("samples=", "dataset.path=")
        for line in given_images(tmp_path / "x.npy", "samples").remarks
    ] == found


def test_a_training_begins_with_the_remark(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((20, 8, 8), 3000, np.uint16))
    words = [
        "dataset=array",
        f"dataset.path={tmp_path}/a.npy",
        "dataset.range=[0,1]",
        "max_steps=1",
        "batch_size=4",
    ]
    network = ["model=dit_tiny", "model.hidden_size=16", "model.num_heads=1", "model.depth=1"]
    rest = ["trainer=cpu", "logger=csv", "name=r", f"output_dir={tmp_path}", "preview_steps=1"]
    assert run(["train", *words, *network, *rest]) == 0
    assert (
        "diffuse: dataset.range=[0,1]: clips 100% of the values of 8 images examined"
        in capsys.readouterr().err
    )
