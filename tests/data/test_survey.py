"""Lines about what the headers of image files show: small images, several frames, colour profiles."""

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import Folder, given_images, survey
from diffusion_cli.formats import Uint8Image
from diffusion_cli.formats.files import has_gray_palette, parsed
from diffusion_cli.formats.lossy import lossy_format
from helpers import SRGB, WIDE
from helpers.data import zipped
from helpers.formats import dicom

ENLARGED = "smaller and enlarged (smallest: "


def save(path: Path, size: tuple[int, int] = (8, 8), frames: int = 1, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = Image.linear_gradient("L").resize(size).convert("RGB")
    pictures = [ramp.rotate(90 * number) for number in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(path, **more, **options)
    return path


def remarks(path: Path, *rules: Any, **changes) -> list[str]:
    arguments = {
        "masks": None, "resolution": 8, "channels": 3, "range": None, "depth": "auto", "labels": "none",
        "background": "white", "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder("", *rules, path=str(path), **(arguments | changes)).remarks()


def test_images_smaller_than_they_are_read_are_counted(tmp_path):
    save(tmp_path / "0.png", (30, 24))
    save(tmp_path / "1.jpg", (20, 40))
    save(tmp_path / "2.png", (24, 24))
    assert remarks(tmp_path, resolution=20) == []
    (line,) = remarks(tmp_path, resolution=64)
    known = "20 x 40 pixels); set dataset.resolution to at most 20 to avoid this"
    assert line == f"dataset.resolution=64: 3 images are {ENLARGED}{known}"
    (line,) = remarks(tmp_path, resolution=[24, 24])
    assert line.startswith(f"dataset.resolution=24: 1 image is {ENLARGED}20 x 40")
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "turned/0.jpg", (30, 20), exif=turned)
    assert remarks(tmp_path / "turned", resolution=[30, 20]) == []
    (line,) = remarks(tmp_path / "turned", resolution=[20, 30])
    assert line.startswith("dataset.resolution=[20,30]: 1 image is")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(("shape", "settings"), [((24, 30), {"channels": 1}), ((24, 30, 3), {})])
def test_scans_smaller_than_they_are_read_are_counted(tmp_path, kind, shape, settings):
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    (tmp_path / "x").mkdir()
    data = dicom(np.zeros((24, 30), np.int16))
    if len(shape) == 3:
        data = dicom(np.zeros((24, 90), np.uint8), Columns=30, **colour)
    for number in range(2):
        (tmp_path / "x" / f"{number}.dcm").write_bytes(data)
    path = tmp_path / "x" if kind == "folder" else zipped(tmp_path / "x", tmp_path / "x.zip")
    assert [line for line in remarks(path, resolution=24, **settings) if ENLARGED in line] == []
    (line,) = (line for line in remarks(path, resolution=64, **settings) if ENLARGED in line)
    assert line.endswith(
        f"2 images are {ENLARGED}30 x 24 pixels); set dataset.resolution to at most 24 to avoid this"
    )


def test_of_many_files_some_are_looked_at(tmp_path, monkeypatch):
    for number in range(6):
        save(tmp_path / f"{number}.png", (4, 4))
    with ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in tmp_path.glob("*.png"):
            archive.write(file, file.name)
    monkeypatch.setattr(survey, "MOST", 3)
    for path in (tmp_path / "x.zip", tmp_path):
        assert any("3 of the 3 images examined are smaller" in line for line in remarks(path))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_files_of_several_frames_are_counted_by_every_command(tmp_path, suffix, capsys):
    save(tmp_path / f"moving.{suffix}", frames=3)
    save(tmp_path / f"still.{suffix}")
    line = f"1 image is in files with several frames or pages; only the first is read: moving.{suffix}"
    assert remarks(tmp_path) == [f"dataset.path={tmp_path}: {line}"]
    assert given_images(tmp_path, "samples").remarks == (f"samples={tmp_path}: {line}",)
    read_input(str(tmp_path), [(3, 8, 8)], False, None, Uint8Image())
    assert "diffuse: input: 1 image is in files with several frames" in capsys.readouterr().err


def test_pages_that_are_channels_are_no_frames(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), 200 * page, np.uint16)) for page in range(3)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert not any("frames" in line for line in remarks(tmp_path))


def test_profiles_that_are_converted_or_broken_are_counted(tmp_path):
    save(tmp_path / "srgb.png", icc_profile=SRGB)
    save(tmp_path / "plain.png")
    assert remarks(tmp_path) == []
    save(tmp_path / "wide.png", icc_profile=WIDE)
    save(tmp_path / "broken.png", icc_profile=b"broken" * 40)
    converted, broken = remarks(tmp_path)
    assert converted.startswith(
        f"dataset.path={tmp_path}: 1 image is converted to sRGB from a colour profile: "
    )
    assert broken.endswith(": 1 image is read as sRGB because the colour profile is broken: broken.png")
    assert remarks(tmp_path, 1) == []  # of a run that converts none
    assert not any("profile" in line for line in remarks(tmp_path, range=[0, 255]))


def test_broken_files_are_left_to_where_pixels_are_read(tmp_path):
    save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"none")
    (tmp_path / "2.png").symlink_to("/dev/zero")
    assert remarks(tmp_path) == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about such pages
def test_a_broken_page_after_the_first_is_no_frame(tmp_path):
    data = bytearray(save(tmp_path / "x.tif").read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    for place in (1, 2, 3, first + 1, len(data) - 3, len(data) + 9):
        struct.pack_into("<I", data, first + 2 + 12 * entries, place)
        (tmp_path / "x.tif").write_bytes(data)
        (header,) = survey.headers(tmp_path, ["x.tif"])
        assert not header.frames


def test_a_gif_cut_off_anywhere_ends_in_no_other_error(tmp_path):
    path = save(tmp_path / "x.gif", (20, 20), frames=2)
    data = path.read_bytes()
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        for header in survey.headers(tmp_path, ["x.gif"]):
            assert header.size == (20, 20)
        assert lossy_format(data[:size]) in (None, "GIF of at most 256 colours")
        with suppress(ValueError):
            has_gray_palette(parsed(data[:size]))
