"""The files of a folder that count as images, those that are skipped, and those that a run started with."""

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import Folder, Points, given_images, with_rules
from diffusion_cli.data.file_names import RULES, file_names, own_images
from diffusion_cli.data.listing import passed_over
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Uint8Image, image_form
from diffusion_cli.formats.files import FIRST_SUFFIXES, SUFFIXES
from diffusion_cli.formats.pixel_readers import depth_of, read_numbers
from diffusion_cli.system.untrusted import IMAGE_FORMATS
from helpers.data import zipped

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
OURS = {"settings": {"labels": None}, "versions": {"diffuse": "0.1"}}


def save(path: Path, pixels: np.ndarray = GRAY, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def folder(path: Path, *rules: Any, **changes) -> Folder:
    arguments = {
        "masks": None, "resolution": 8, "channels": 1, "range": None, "depth": "auto", "labels": "auto",
        "background": "white", "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder("", *rules, path=str(path), **(arguments | changes))


# Formats


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_every_suffix_are_read(tmp_path, suffix):
    kind = next(kind for kind, suffixes in IMAGE_FORMATS.items() if suffix in suffixes)
    exact = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}
    options = {"format": kind} | exact.get(kind, {}) | ({"quality": 100} if kind == "JPEG" else {})
    if suffix == ".pbm":
        Image.fromarray(GRAY).convert("1").save(save(tmp_path / "pbm" / f"x{suffix}", format=kind))
    else:
        save(tmp_path / suffix[1:] / f"X{suffix.upper()}", GRAY, **options)
    found = folder(tmp_path / suffix[1:]).load("train")[torch.tensor([0])][0, 0].numpy()
    if suffix == ".pbm":
        assert set(np.unique(found)) == {0, 255}
    else:
        np.testing.assert_allclose(found, GRAY, atol=3 if kind == "JPEG" else 0)
    if kind not in ("JPEG", "WEBP"):
        assert given_images(tmp_path / suffix[1:], "samples", (1, 8, 8)).images[torch.tensor([0])].shape


def test_deep_files_are_refused_where_pillow_would_scale_them(tmp_path):
    deep = b"P5 # scanned\n8 8\n4095\n" + GRAY.astype(">u2").tobytes()
    scan = save(tmp_path / "x.jp2", GRAY.astype(np.uint16) * 257).read_bytes()
    for data, largest in ((deep, 4095), (scan, 65535), (b"P5 8 8 7 " + bytes(64), 7)):
        assert depth_of(data) == ("uint8" if largest == 7 else "uint16")
        with pytest.raises(
            ValueError, match=f"has a maximum value of {largest} instead of 255; save it as PNG or TIFF"
        ):
            read_numbers(data)
    dataset = folder(tmp_path, depth=8).load("train")
    np.testing.assert_array_equal(dataset[torch.tensor([0])][0, 0], GRAY)
    with pytest.raises(ValueError, match=r"x\.jp2 \(has a maximum value of 65535"):
        folder(tmp_path).load("train")


def test_a_gif_holds_colours_and_not_the_order_of_its_palette(tmp_path):
    data = save(tmp_path / "gray.gif", np.array([[0, 9], [200, 9]], np.uint8)).read_bytes()
    assert read_numbers(data).tolist() == [[[0, 9], [200, 9]]]
    colour = save(tmp_path / "colour.gif", np.full((2, 2, 3), [9, 0, 200], np.uint8)).read_bytes()
    assert read_numbers(colour)[:, 0, 0].tolist() == [9, 0, 200]


# Files passed over


def test_files_that_may_be_images_are_counted_by_suffix(tmp_path):
    save(tmp_path / "x.png")
    for name in ("a/1.HEIC", "2.heic", "3.tga", "IM0001", "4.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    evident = (
        "labels.txt",
        "README",
        "LICENSE",
        "x.json",
        ".DS_Store",
        "Thumbs.db",
        ".b/x.tga",
        "__MACOSX/x.tga",
    )
    for name in evident:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    counts = ".heic 2, without a suffix 1, .npy 1, .tga 1"
    found = f"dataset.path={tmp_path}: 5 files are skipped: {counts}; convert images among them to .png"
    assert folder(tmp_path).remarks() == [found]
    assert given_images(tmp_path, "samples").remarks == (found.replace("dataset.path", "samples"),)
    assert not folder(save(tmp_path / "only/x.png").parent).remarks()
    many = [f"x.{number}" for number in range(20)]
    assert passed_over("k", many, (".png",))[0].endswith("...; convert images among them to .png")


def test_masks_and_inputs_are_counted_too(tmp_path, capsys):
    for place in ("images", "masks"):
        save(tmp_path / place / "x.png")
        (tmp_path / place / f"{place}.avif").touch()
    first, second = folder(tmp_path / "images", masks=str(tmp_path / "masks")).remarks()
    assert first.startswith(f"dataset.path={tmp_path}/images: 1 file is skipped: .avif 1;")
    assert second.startswith(f"dataset.masks={tmp_path}/masks: 1 file is skipped: .avif 1;")
    read_input(str(tmp_path / "images"), [(1, 8, 8)], False, None, Uint8Image())
    assert "diffuse: input=" in capsys.readouterr().err


# What this program wrote


def outputs(root: Path) -> None:
    """A run's folder with previews, samples, edits and an edit's series, and an image of its own beside it."""
    save(root / "mine/grid.png")
    for name in (
        "previews/step_00000001.png",
        "samples/s/grid.png",
        "samples/s/strip.png",
        "edits/e/grid.png",
    ):
        save(root / "run" / name, np.zeros((30, 90), np.uint8))
    for name in ("samples/s/000000.png", "samples/s/1000000.png", "edits/e/a.b.png", "edits/e/x/000.png"):
        save(root / "run" / name)
    for name in (
        "edits/e/before/a.b.0.png",
        "edits/e/x/strip.png",
        "edits/e/unfinished.png",
        "edits/e/x.gif",
    ):
        save(root / "run" / name)
    save(root / "run/samples/s/denoising.gif")
    (root / "run/checkpoints").mkdir()
    (root / "run/checkpoints/last.ckpt").touch()
    about = {"s": OURS, "e": {**OURS, "settings": {"edit": {}}, "results": {"a.b": {}, "x": {}}}}
    for place, manifest in (("samples/s", about["s"]), ("edits/e", about["e"])):
        (root / "run" / place / "manifest.json").write_text(json.dumps(manifest))


RESULTS = ["edits/e/a.b.png", "edits/e/x/000.png", "samples/s/000000.png", "samples/s/1000000.png"]


@pytest.mark.parametrize("zipped", [False, True])
def test_pictures_that_this_program_drew_are_no_images(tmp_path, zipped):
    outputs(tmp_path / "data")
    path = tmp_path / "data"
    if zipped:
        path = tmp_path / "x.zip"
        with ZipFile(path, "w") as archive:
            for file in (tmp_path / "data").rglob("*.*"):
                archive.write(file, file.relative_to(tmp_path / "data").as_posix())
    found = ["mine/grid.png", *(f"run/{name}" for name in RESULTS)]
    assert folder(path).files == found
    assert len(given_images(path, "samples").images) == len(found)


def test_a_folder_of_results_gives_them_to_every_command(tmp_path):
    outputs(tmp_path)
    samples, edits = tmp_path / "run/samples/s", tmp_path / "run/edits/e"
    for path, names in ((samples, ["000000", "1000000"]), (edits, ["a.b"]), (edits / "x", ["000"])):
        found = read_input(str(path), [(1, 8, 8)], False, None, Uint8Image())
        assert [item.name for item in found] == names
    assert folder(edits / "x").files == ["000.png"]
    assert folder(edits / "before").files == ["a.b.0.png"]
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty/grid.png")
    (tmp_path / "empty/manifest.json").write_text(json.dumps(OURS))
    with pytest.raises(ValueError, match="is an output folder of diffuse without samples or results"):
        folder(tmp_path / "empty")
    with pytest.raises(UsageError, match="is an output folder"):
        read_input(str(tmp_path / "empty"), [(1, 8, 8)], False, None, Uint8Image())


FOREIGN = ["{", "{}", '{"settings": {}, "versions": 3}', "[]"]
FOREIGN += [
    f'{{"settings": {{"edit": {{}}}}, "versions": {{}}, "results": {value}}}' for value in ("5", "null", "[]")
]


@pytest.mark.parametrize("text", FOREIGN)
def test_manifests_of_other_programs_leave_out_nothing(tmp_path, text):
    save(tmp_path / "series/grid.png")
    for place in (tmp_path, tmp_path / "series"):
        (place / "manifest.json").write_text(text)
        assert folder(tmp_path).files == ["series/grid.png"]
        assert folder(tmp_path / "series").files == ["grid.png"]


# Runs that started with the first rules


def test_the_first_rules_read_what_they_read(tmp_path):
    outputs(tmp_path)
    save(tmp_path / "x.bmp")
    first = folder(tmp_path, 1)
    assert len(first.files) == 12
    assert all(name.endswith(FIRST_SUFFIXES) for name in first.files)
    assert any(".bmp 1" in line for line in first.remarks())
    assert with_rules({"_target_": "diffusion_cli.data.Folder"}, 1)["rules"] == 1
    assert "rules" not in with_rules({"_target_": "diffusion_cli.data.Digits"}, 1)


def test_a_run_goes_on_with_the_files_that_it_was_begun_on(tmp_path, capsys):
    for number in range(3):
        save(tmp_path / f"data/{number}.png")
    words = [
        "train", "name=a", f"output_dir={tmp_path}/o", "dataset=folder", f"dataset.path={tmp_path}/data", "logger=csv",
        "dataset.resolution=8", "dataset.channels=1", "dataset.val_fraction=0", "model=unet_tiny", "model.channels=8",
        "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null", "batch_size=2", "preview_every=1000",
        "lr_schedule=constant", "trainer=cpu",
    ]  # fmt: skip
    assert run([*words, "max_steps=1"]) == 0
    last = tmp_path / "o/a/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["diffuse"].pop("data_rules") == RULES
    save(tmp_path / "data/x.bmp")
    assert run([*words, "max_steps=2"]) == 2
    assert "num_images=4: the run in" in capsys.readouterr().err
    torch.save(checkpoint, last)  # as the version before wrote it
    assert run([*words, "max_steps=2"]) == 0
    assert torch.load(last, weights_only=True)["diffuse"]["data_rules"] == 1


def test_pictures_beside_samples_of_another_form_are_not_counted(tmp_path):
    points = np.zeros((9, 3), np.float32)
    for place in ("ours", "theirs"):
        (tmp_path / place).mkdir()
        np.save(tmp_path / place / "000000.npy", points)
        save(tmp_path / place / "grid.png")
    (tmp_path / "ours/manifest.json").write_text(json.dumps(OURS))
    arguments = {"num_points": 9, "radius": 1.0, "labels": "none", "size": 1, "val_fraction": 0.0}
    assert Points("", path=f"{tmp_path}/ours", **arguments).remarks() == []
    (line,) = Points("", path=f"{tmp_path}/theirs", **arguments).remarks()
    assert line.endswith(": 1 file is skipped: .png 1; convert images among them to .npy")


def test_a_form_of_numbers_reads_the_same_suffixes():
    assert image_form("uint16", 1, None).suffixes == Uint8Image().suffixes == SUFFIXES


@pytest.mark.parametrize("pack", [False, True])
def test_volumes_without_their_keys_are_named_and_dicom_needs_no_suffix(tmp_path, pack):

    def refused(folder):
        path = zipped(folder, tmp_path / f"{folder.name}.zip") if pack else folder
        with pytest.raises(UsageError, match=r"has no images; ") as error:
            own_images(path, file_names(path), "dataset.path", SUFFIXES)
        return str(error.value)

    for place in ("scans", "slices"):
        (tmp_path / place).mkdir()
    for number in range(3):
        (tmp_path / "scans" / f"{number}.nii.gz").write_bytes(b"")
        (tmp_path / "slices" / f"IM000{number}").write_bytes(bytes(128) + b"DICM")
    assert refused(tmp_path / "scans").endswith(
        "it has 3 volumes in .nii.gz files: "
        "set dataset.resolution=[depth,height,width] dataset.channels=1 dataset.range=[low,high]"
    )
    slices = zipped(tmp_path / "slices", tmp_path / "s.zip") if pack else tmp_path / "slices"
    found = own_images(slices, file_names(slices), "dataset.path", (*SUFFIXES, ".dcm"))
    assert found == [f"IM000{number}" for number in range(3)]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    assert "expected files with .png" in refused(tmp_path / "notes")
