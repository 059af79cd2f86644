"""Volumes in DICOM files: series of slices, files with several frames, and folders of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import Folder, series
from diffusion_cli.errors import FormatError
from diffusion_cli.formats import Volume, dicom_reader
from diffusion_cli.formats.dicom_reader import read_header
from diffusion_cli.formats.volume import read_volume
from helpers.data import zipped
from helpers.formats import dicom
from helpers.formats import folder as images

nib = pytest.importorskip("nibabel")
RNG = np.random.default_rng(0)
VALUES = RNG.integers(-1000, 3000, (6, 8, 10)).astype(np.int16)  # [D, H, W]
AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]


def slices(
    values: np.ndarray = VALUES, orientation=AXIAL, step=(0, 0, 3.0), uid: str = "1.2.3", **elements
) -> list[bytes]:
    """A series of slices 3 mm apart, with rows 2 mm and columns 1.5 mm apart."""
    place = {"SeriesInstanceUID": uid, "ImageOrientationPatient": orientation, "PixelSpacing": [2, 1.5]}
    numbers = {"RescaleSlope": 2, "RescaleIntercept": -7}
    positions = [np.array([-40, 12.5, 7]) + number * np.array(step) for number in range(len(values))]
    return [
        dicom(each, **{**place, **numbers, "ImagePositionPatient": position.tolist(), **elements})
        for each, position in zip(values, positions, strict=True)
    ]


def volumes(path: Path, **changes) -> Folder:
    return images(path, **({"resolution": [6, 8, 10], "range": [-3000, 9000]} | changes))


def write(path: Path, files: list[bytes], suffix: str = ".dcm") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(files):
        (path / f"IM{number}{suffix}").write_bytes(data)
    return path


def test_slices_in_any_order_are_the_volume_of_the_same_nifti():
    files = slices()
    held = read_volume(*[files[place] for place in (3, 0, 5, 1, 4, 2)])
    # In NIfTI x runs to the right and y to the front; in DICOM to the left and to the back.
    affine = np.diag([-1.5, -2, 3, 1])
    affine[:3, 3] = 40, -12.5, 7
    image = nib.Nifti1Image(VALUES.T, affine)
    image.header.set_slope_inter(2, -7)
    same = read_volume(image.to_bytes())
    np.testing.assert_array_equal(held.values, same.values)
    np.testing.assert_allclose(held.header.affine, same.header.affine, atol=1e-6)
    assert held.spacing == same.spacing == [1.5, 2, 3]
    assert held.header._replace(affine=[]) == ("int16", 2, -7, [], ".nii.gz")


def test_slices_of_another_plane_are_turned_to_the_same_axes():
    """The same voxels in sagittal slices, with rows from the front and columns from above."""
    sagittal = VALUES.transpose(2, 0, 1)[:, ::-1]  # [W, D from above, H]
    files = slices(sagittal, SAGITTAL, (3.0, 0, 0))
    np.testing.assert_array_equal(read_volume(*files).values, read_volume(*slices()).values)


def test_a_tilted_gantry_is_kept_in_the_affine():
    held = read_volume(*slices(step=(0, 0.5, 3.0)))
    assert held.spacing == pytest.approx([1.5, 2, np.hypot(0.5, 3)])
    np.testing.assert_allclose(np.array(held.header.affine)[:, 2], [0, -0.5, 3], atol=1e-6)


def test_slices_with_slopes_of_their_own_keep_their_values():
    files = [*slices(VALUES[:3]), *slices(VALUES, RescaleSlope=0.5)[3:]]
    held = read_volume(*files)
    np.testing.assert_array_equal(held.values[0, 4], read_volume(*slices(RescaleSlope=0.5)).values[0, 4])
    assert held.header._replace(affine=[]) == ("float32", 1, 0, [], ".nii.gz")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (slices()[:2] + slices()[3:], r"has gaps of 3 to 6 mm between its 5 slices; complete or resample it"),
        (slices() + slices()[:1], "has two slices at one position"),
        (slices() + slices(VALUES[:1, :4], step=(0, 0, -1)), "has slices of 10 x 4 and 10 x 8"),
        (slices()[:3] + slices(orientation=SAGITTAL)[3:], "has slices of different orientation or pixel spacing"),
        (slices(PixelSpacing=None), "has slices without position, orientation or pixel spacing"),
        (slices(PixelSpacing=[0, 1]), "file 1 of 6: has a position, orientation or pixel spacing that is malformed"),
        (slices(orientation=[1, 0, 0, 1, 0, 0]), "."),
        (slices()[:1], "has one slice, without SliceThickness"),
        ([*slices()[:2], b"no"], "file 3 of 3: is not a DICOM file"),
    ],
)  # fmt: skip
def test_files_that_form_no_volume_are_refused_in_a_line(files, message):
    with pytest.raises(ValueError, match=message):
        read_volume(*files)


def test_one_slice_has_its_thickness():
    held = read_volume(*slices(VALUES[:1], SliceThickness=5))
    assert held.spacing == [1.5, 2, 5]


def group(name: str, **elements: Any) -> pydicom.Dataset:
    """A functional group with one item."""
    item, outer = pydicom.Dataset(), pydicom.Dataset()
    for key, value in elements.items():
        setattr(item, key, value)
    setattr(outer, name, [item])
    return outer


def test_frames_of_one_file_are_a_volume():
    shared = group("PlaneOrientationSequence", ImageOrientationPatient=AXIAL)
    shared.update(group("PixelMeasuresSequence", PixelSpacing=[2, 1.5]))
    shared.update(group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-7))
    each = [
        group("PlanePositionSequence", ImagePositionPatient=[-40, 12.5, 7 + 3.0 * number])
        for number in range(6)
    ]
    data = dicom(VALUES, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=each)
    held, same = read_volume(data), read_volume(*slices())
    np.testing.assert_array_equal(held.values, same.values)
    assert held.header == same.header
    with pytest.raises(ValueError, match="has 6 frames, and describes 5"):
        read_volume(
            dicom(VALUES, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=each[1:])
        )


def test_frames_without_positions_are_a_volume_without_spacing():
    held = read_volume(dicom(VALUES))
    np.testing.assert_array_equal(held.values[0], VALUES)
    assert (held.spacing, held.header.file) == (None, ".npy")


# --- Folders -----------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_each_series_of_a_folder_is_a_volume(tmp_path, pack, suffix):
    for name, shift in (("a/one", 0), ("b/two", 1), ("b/three", 2)):
        write(tmp_path / "scans" / name, slices(VALUES + shift, uid=f"1.{shift}"), suffix)
    (tmp_path / "scans" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "scans" / "notes.txt").write_text("x")
    path = zipped(tmp_path / "scans", tmp_path / "scans.zip") if pack else tmp_path / "scans"
    data = volumes(path, labels="auto")
    assert data.files == ["a/one", "b/three", "b/two"]
    assert (data.class_names, data.remarks()) == (("a", "b"), [])
    found = data.load("train")[torch.arange(3)]
    expected = torch.from_numpy(read_volume(*slices()).values)
    assert isinstance(data.form, Volume)
    assert torch.equal(found[0], data.form.scaled(expected))
    assert torch.equal(found[1], data.form.scaled(expected + 4))
    stream = data.stream("train")
    assert torch.equal(stream[torch.tensor([2])], found[2:])
    assert stream.fingerprint() == data.load("train").fingerprint()
    assert len(set(stream.sources(torch.arange(3)))) == 3


def test_two_series_of_one_folder_are_two_volumes(tmp_path):
    mixed = [*slices(uid="1.2"), *slices(VALUES + 1, uid="1.3")]
    data = volumes(write(tmp_path / "x", mixed))
    assert data.files == ["1.2", "1.3"]
    write(tmp_path / "y" / "z", mixed)
    (tmp_path / "y" / "film.dcm").write_bytes(dicom(VALUES, SeriesInstanceUID="1.3"))
    assert volumes(tmp_path / "y").files == ["film.dcm", "z/1.2", "z/1.3"]


def test_localizers_are_skipped_and_a_broken_series_among_others_is_named_with_a_file(tmp_path):
    overview = slices(VALUES[:1], uid="1.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write(tmp_path / "x", [*overview, *slices(uid="1.2"), *slices(uid="1.3")[:4]])
    (tmp_path / "x" / "IM9.dcm").unlink()
    data = volumes(tmp_path)
    assert data.files == ["x/1.2", "x/1.3"]
    assert f"dataset.path={tmp_path}: 1 localizer is skipped, such as x/IM0.dcm" in data.remarks()
    with pytest.raises(ValueError, match=r"remove x/1\.3 with x/IM10\.dcm \(has gaps"):
        data.load("train")


def test_labels_of_series_are_by_their_folder(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, slices())
    (tmp_path / "labels.csv").write_text("file,label\none,ill\ntwo,well\n")
    data = volumes(tmp_path, labels="csv")
    assert (data.class_names, data.labels is not None and data.labels.tolist()) == (("ill", "well"), [0, 1])


def test_broken_series_are_named(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / name, slices())
    (tmp_path / "b" / "IM3.dcm").unlink()
    (tmp_path / "c" / "IM5.dcm").write_bytes(slices()[5][:-50])
    data = volumes(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot use 2 of the volumes; .* b \(has gaps of 3 to 6 mm.*; c \(file 6"
    ):
        data.load("train")


def test_a_broken_series_beside_others_is_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the list is written to the current folder
    write(tmp_path / "scans", [data for number in range(3) for data in slices(uid=f"1.{number}")])
    for name in ("IM3.dcm", "IM15.dcm"):  # of the first and the last series
        (tmp_path / "scans" / name).unlink()
    assert volumes(tmp_path / "scans", unreadable="skip").files == ["1.1"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_header_is_read_no_further_than_it_reaches(tmp_path, monkeypatch, kind):
    long = {"ImageComments": "x" * 9000}
    files = [*slices(np.zeros((2, 200, 200), np.int16), uid="1.1"), *slices(VALUES[:2], uid="1.2", **long)]
    place = write(tmp_path / "scans", files)
    place = zipped(place, tmp_path / "scans.zip") if kind == "zip" else place
    sizes = []
    monkeypatch.setattr(
        dicom_reader, "read_header", lambda data: sizes.append(len(data)) or read_header(data)
    )
    monkeypatch.setattr(dicom_reader, "USUAL_HEADER", 4000)
    names = [f"IM{number}.dcm" for number in range(4)]
    assert series.series(place, names).volumes == {"1.1": names[:2], "1.2": names[2:]}
    assert sorted(sizes)[:4] == [4000] * 4
    assert len(sizes) == 6
    assert min(sorted(sizes)[4:]) > 9000


def needs_pydicom(data: bytes):
    raise FormatError("needs pydicom")


def test_headers_of_a_folder_are_read_once_until_a_file_changes(tmp_path, monkeypatch):
    place = write(tmp_path / "scans", [*slices(VALUES[:2], uid="1.1"), *slices(VALUES[:2], uid="1.2")])
    names = [f"IM{number}.dcm" for number in range(4)]
    sizes = []
    monkeypatch.setattr(
        dicom_reader, "read_header", lambda data: sizes.append(len(data)) or read_header(data)
    )
    first = series.series(place, names, tmp_path / "data")
    assert first == series.series(place, names) == series.series(place, names, tmp_path / "data")
    assert len(sizes) == 8
    (place / "IM1.dcm").write_bytes(slices(VALUES[:1], uid="1.2.3")[0])
    (place / "IM2.dcm").unlink()
    changed = series.series(place, names, tmp_path / "data")
    assert changed == series.series(place, names)
    assert len(sizes) == 8 + 1 + 3
    monkeypatch.setattr(dicom_reader, "read_header", needs_pydicom)
    (place / "IM0.dcm").touch()
    assert series.series(place, names, tmp_path / "data") != changed
    monkeypatch.setattr(dicom_reader, "read_header", read_header)
    assert series.series(place, names, tmp_path / "data") == changed
    (listed,) = (tmp_path / "data" / series.LISTS).iterdir()
    listed.write_text("damaged")
    assert series.series(place, names, tmp_path / "data") == changed


def test_a_spacing_other_than_that_of_the_first_series_is_refused(tmp_path):
    write(tmp_path / "a", slices())
    write(tmp_path / "b", slices(step=(0, 0, 4)))
    with pytest.raises(
        ValueError, match=r"b \(has a voxel spacing of 1\.5 x 2 x 4, and the first file of 1\.5 x 2"
    ):
        volumes(tmp_path).load("train")


def test_values_beyond_the_range_are_remarked_on(tmp_path):
    write(tmp_path / "a", slices())
    (remark,) = volumes(tmp_path, range=[0, 1000]).remarks()
    assert remark.startswith("dataset.range=[0,1000]: clips 89%")
    (remark,) = images(write(tmp_path / "b", slices()[:1]), range=[0, 1000]).remarks()
    assert remark.startswith("dataset.range=[0,1000]: clips ")


def test_a_folder_of_a_series_is_an_input(tmp_path):
    write(tmp_path / "scan", slices())
    data = volumes(tmp_path / "scan")
    (found,) = read_input(str(tmp_path / "scan"), [data.shape], False, None, data.form)
    assert found.name == "scan"
    assert torch.equal(found.pixels, data.load("train")[torch.tensor([0])][0])
    assert found.form == data.form


@pytest.mark.slow
def test_series_are_trained_on_sampled_and_edited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        write(tmp_path / "scans" / f"p{number}", slices(VALUES[:, :, :8] + number, uid=f"1.{number}"))
    words = [
        "dataset=folder",
        "dataset.path=scans",
        "dataset.resolution=[6,8,8]",
        "dataset.range=[-3000,9000]",
    ]
    words += ["dataset.channels=1", "dataset.val_fraction=0.3", "model=unet3d_tiny", "model.channels=8"]
    words += [
        "model.channel_mult=[1,2]",
        "model.head_channels=8",
        "max_steps=2",
        "batch_size=2",
        "trainer=cpu",
    ]
    assert run(["train", *words, "output_dir=.", "name=run", "precision=fp32"]) == 0
    short = ["run=run", "steps=2", "sampler=ddim"]
    assert run(["sample", *short, "num_samples=1", "output=out"]) == 0
    image = nib.load("out/000000.nii.gz")
    assert image.header.get_zooms() == (1.5, 2.0, 3.0)
    edit = ["edit", *short, "edit=inpaint", "restoration=replacement", "input=scans/p1", "output=edits"]
    assert run(edit) == 0
    edited = read_volume(*[file.read_bytes() for file in Path("edits/p1").iterdir()])
    given = read_volume(*slices(VALUES[:, :, :8] + 1))
    np.testing.assert_allclose(edited.header.affine, given.header.affine, atol=1e-5)
    assert (edited.values == given.values).mean() > 0.5  # those around the box in the middle
    assert json.loads(Path("edits/manifest.json").read_text())["results"]
    assert run([*edit[:-2], "input=edits", "output=again"]) == 0
    assert len([*Path("again/p1").glob("*.dcm")]) == 6
