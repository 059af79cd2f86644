"""Results of edits of volumes have the geometry of their files: NIfTI, and new DICOM series."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import UID

from diffusion_cli.commands.edit_volumes import InputVolume
from diffusion_cli.data import placement
from diffusion_cli.data.resampling import Placement, Spacing, resampled
from diffusion_cli.formats import Volume
from diffusion_cli.formats.dicom_derived import derivable
from diffusion_cli.formats.volume import Held, read_volume
from helpers.formats import dicom

nib = pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")
RNG = np.random.default_rng(0)
SIZES = (6, 8, 10)
VALUES = RNG.integers(-900, 900, SIZES).astype(np.int16)
ROW = np.array([0.9, 0.3, -0.2]) / np.linalg.norm([0.9, 0.3, -0.2])
COLUMN = np.cross([0.1, -0.2, 1.0], ROW) / np.linalg.norm(np.cross([0.1, -0.2, 1.0], ROW))
NORMAL = np.cross(ROW, COLUMN)
"""Axes of oblique slices."""
CT = "1.2.840.10008.5.1.4.1.1.2"


def affine(axes: str) -> np.ndarray:
    """An oblique affine [4, 4] of voxels of 0.7 x 1.3 x 2.5 mm, with axes in some order and direction."""
    made = np.eye(4)
    made[:3, :3] = np.linalg.qr(RNG.normal(size=(3, 3)) * 0.2 + np.eye(3))[0]
    made[:3, :3] *= np.sign(np.diag(made[:3, :3])) * [0.7, 1.3, 2.5]
    made[:3, 3] = -21.5, 130.25, 17
    given = nib.Nifti1Image(VALUES.T, made)
    wanted = nib.orientations.axcodes2ornt(tuple(axes))
    return given.as_reoriented(nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], wanted)).affine


def nifti(values: np.ndarray, matrix: np.ndarray) -> bytes:
    return nib.Nifti1Image(values, matrix).to_bytes()


def series(values: np.ndarray = VALUES, **elements: Any) -> list[bytes]:
    """Oblique slices 2.5 mm apart with columns 0.7 mm and rows 1.3 mm apart, in no order."""
    own = {
        "ImageOrientationPatient": [*ROW, *COLUMN], "PixelSpacing": [1.3, 0.7], "SliceThickness": 3,
        "RescaleSlope": 0.5, "RescaleIntercept": -3, "SeriesInstanceUID": "1.2.3", "SOPClassUID": CT,
        "FrameOfReferenceUID": "1.2.9", "StudyInstanceUID": "1.2.1", "PatientID": "p7", "StudyDescription": "Head",
        "SeriesDescription": "Axial", "Modality": "CT", "KVP": 120, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "DeviceSerialNumber": "42",
    }  # fmt: skip
    files = []
    for number, each in enumerate(values):
        place = np.array([-41.5, 12.5, 7.25]) + 2.5 * number * NORMAL
        own |= {"ImagePositionPatient": place.round(6).tolist(), "SOPInstanceUID": f"1.2.3.{number + 1}"}
        image = pydicom.dcmread(io.BytesIO(dicom(each, **(own | elements))))
        image.private_block(0x0011, "ACME", create=True).add_new(1, "LO", "secret")
        buffer = io.BytesIO()
        image.save_as(buffer)
        files.append(buffer.getvalue())
    return [files[place] for place in (3, 0, 5, 1, 4, 2)][: len(files)] if len(files) == 6 else files


def form(**changes: Any) -> Volume:
    fields = {"low": -1000.0, "high": 1000.0, "dtype": "int16", "slope": 1.0, "inter": 0.0, "file": ".nii.gz"}
    return Volume(**(fields | {"affine": np.eye(4)[:3].tolist()} | changes))  # pyright: ignore[reportArgumentType]


def given(files: list[bytes], place: Placement | None = None) -> tuple[Held, InputVolume]:
    held = read_volume(*files)
    volume = InputVolume.of(lambda: files, held, place)
    assert volume is not None
    return held, volume


def model_sample(held: Held) -> torch.Tensor:
    """What an edit that changes nothing gives."""
    return form().quantize(form().scaled(torch.from_numpy(held.values)))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL", "IRP"])
def test_an_edit_without_a_change_gives_the_nifti_back(tmp_path, axes):
    matrix = affine(axes)
    data = VALUES.T if axes in ("RAS", "LPS") else VALUES
    held, volume = given([nifti(data, matrix)])
    result = volume.result(form(), model_sample(held), None, "edit=img2img")
    result.save(tmp_path, "a")
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, matrix, atol=1e-4)
    np.testing.assert_array_equal(image.get_fdata(), data)
    assert (result.clipped, result.errors) == (0, None)
    assert torch.equal(volume.read([tmp_path / "a.nii.gz"], form()), model_sample(held))


@pytest.mark.parametrize(
    ("spacing", "model"),
    [
        (None, [8, 12, 12]),
        ((2.5, 1.3, 0.7), [8, 12, 12]),
        ((1.25, 1.3, 0.9), [24, 20, 20]),
        ((4.0, 2.0, 1.0), [8, 12, 12]),
    ],
)
def test_resampled_results_come_back_in_the_voxels_of_the_file(tmp_path, spacing, model):
    """A ramp comes back exactly where the filters are inside the field; voxels outside the field are kept."""
    sizes, matrix = (16, 24, 28), affine("LPS")
    d, h, w = np.indices(sizes)
    data = (20.0 * d - 9 * h + 5 * w).T.astype(np.float32)
    held = read_volume(nifti(data, matrix))
    place = placement(held, model, spacing and Spacing(spacing, -1000.0))
    _, volume = given([nifti(data, matrix)], place)
    real = form(dtype="float32")
    sample = real.scaled(torch.from_numpy(resampled(held.values, place, -1000.0)))
    volume.result(real, sample, None, "edit=img2img").save(tmp_path, "a")
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, matrix, atol=1e-4)
    assert image.shape == data.shape
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(image.get_fdata()[inner], data[inner], atol=1e-3)
    corner = image.get_fdata()[0, 0, 0], data[0, 0, 0]
    assert corner[0] == corner[1]


def test_voxels_that_no_painted_voxel_touches_are_those_of_the_file(tmp_path):
    held, volume = given(
        [nifti(VALUES.T * 3, affine("LPS"))], place := Placement.central(SIZES, (4, 4, 4), (1.5, 2, 2))
    )
    known = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    known[:, 1:3, 1:3, 1:3] = False
    result = volume.result(form(), torch.full((1, 4, 4, 4), 0.5), known, "edit=inpaint")
    changed = result.values != held.values
    touched = resampled(~known.numpy() + 0.0, place.inverse(SIZES), 0.0) > 0
    assert changed.any()
    assert not changed[~touched].any()
    assert (result.values[touched] == 500).all()
    assert result.errors is None


def read_series(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]


@pytest.mark.parametrize("elements", [
    {}, {"RescaleSlope": 2.0, "BitsStored": 12, "HighBit": 11}, {"PhotometricInterpretation": "MONOCHROME1"},
])  # fmt: skip
def test_an_edit_without_a_change_gives_the_values_and_the_geometry_of_a_series_back(tmp_path, elements):
    files = series(**elements)
    held, volume = given(files)
    assert np.abs(held.values).max() > 400
    wide = form(low=-40000.0, high=40000.0)
    result = volume.result(wide, wide.scaled(torch.from_numpy(held.values)), None, "edit=img2img")
    result.save(tmp_path, "scan")
    made = read_series(tmp_path / "scan")
    again = read_volume(*[file.read_bytes() for file in sorted((tmp_path / "scan").iterdir())][::-1])
    np.testing.assert_array_equal(again.values, held.values)
    np.testing.assert_allclose(again.header.affine, held.header.affine, atol=1e-4)
    sources = {str(one.SOPInstanceUID): one for one in (pydicom.dcmread(io.BytesIO(data)) for data in files)}
    for image in made:
        source = sources[image.SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert image.ImagePositionPatient == source.ImagePositionPatient
        np.testing.assert_array_equal(image.pixel_array, source.pixel_array)
        assert image.PhotometricInterpretation == source.PhotometricInterpretation


def test_a_new_series_says_that_it_is_synthetic_and_of_whom(tmp_path):
    files = series()
    held, volume = given(files)
    for name, shift in (("a", 0), ("b", 8)):
        moved = form().scaled(torch.from_numpy(held.values + shift))
        volume.result(form(), moved, None, "edit=inpaint").save(tmp_path, name)
    first, second = read_series(tmp_path / "a"), read_series(tmp_path / "b")
    one = first[0]
    assert [*one.ImageType] == ["DERIVED", "SECONDARY", "AXIAL"]
    assert (one.PatientID, one.PatientName, one.StudyInstanceUID) == ("p7", "Doe^Jane", "1.2.1")
    assert (one.FrameOfReferenceUID, one.Modality, one.KVP) == ("1.2.9", "CT", 120)
    assert one.SeriesDescription == "SYNTHETIC, diffuse: Axial"
    assert "Synthetic: edit=inpaint of a diffusion model" in one.DerivationDescription
    assert "1.2.3" in one.DerivationDescription
    assert one.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3"
    series_uids = {str(image.SeriesInstanceUID) for image in (*first, *second)}
    instances = [str(image.SOPInstanceUID) for image in (*first, *second)]
    assert len(series_uids) == 2
    assert len({*instances, *(f"1.2.3.{number}" for number in range(1, 7))}) == 18
    assert all(UID(uid).is_valid for uid in (*series_uids, *instances))
    assert all(image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID for image in first)
    assert not [element for image in first for element in image.iterall() if element.tag.is_private]
    assert "DeviceSerialNumber" not in one
    assert {image[0x0008001C].value for image in first} == {"YES"}  # Synthetic Data
    # The same result again has the same bytes.
    volume.result(form(), form().scaled(torch.from_numpy(held.values)), None, "edit=inpaint").save(
        tmp_path, "c"
    )
    files_of = [sorted((tmp_path / name).iterdir()) for name in "ac"]
    assert [file.read_bytes() for file in files_of[0]] == [file.read_bytes() for file in files_of[1]]


def test_values_that_the_numbers_cannot_store_are_counted():
    held, volume = given(series(np.abs(VALUES).astype(np.uint16), BitsStored=12, HighBit=11))
    wide = form(low=-4000.0, high=4000.0)
    sample = wide.scaled(torch.from_numpy(held.values))
    sample[0, 0, 0, :3], sample[0, 1, 1, 1] = -0.9, 0.9  # -3600 and 3600, of -3 to 2044.5
    result = volume.result(wide, sample, None, "edit=img2img")
    assert result.clipped == 4
    assert (result.values.min(), result.values.max()) == (-3, 2044.5)
    # NIfTI of bytes, which keep known values, but not the others.
    held, volume = given([nifti(np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10, np.eye(4))])
    known = torch.ones(1, 4, 3, 2, dtype=torch.bool)
    known[0, 0, 0, :] = False
    narrow = form(slope=100.0)
    result = volume.result(narrow, torch.full((1, 4, 3, 2), -0.5), known, "edit=inpaint")
    assert (result.form.dtype, result.clipped) == ("uint8", 2)
    assert np.array_equal(result.values[:, 1:], held.values[:, 1:])


def test_files_from_which_no_series_can_be_derived_become_nifti(tmp_path):
    frames = dicom(VALUES)
    assert InputVolume.of(lambda: [frames], read_volume(frames), None) is None  # without positions
    held, volume = given(series(SeriesInstanceUID=""))
    assert volume.headers == ()
    volume.result(form(), model_sample(held), None, "edit=img2img").save(tmp_path, "a")
    again = read_volume((tmp_path / "a.nii.gz").read_bytes())
    np.testing.assert_allclose(again.header.affine, held.header.affine, atol=1e-4)


@pytest.mark.parametrize("name", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_no_series_is_derived_from_functional_groups(name):
    assert len(derivable(series())) == 6
    elements: dict[str, Any] = {name: [pydicom.Dataset()]}
    assert derivable(series(**elements)) == []


def test_statements_about_privacy_are_those_of_the_source(tmp_path):
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "113100", "DCM", "Basic profile"
    stated: dict[str, Any] = {
        "BurnedInAnnotation": "YES",
        "RecognizableVisualFeatures": "NO",
        "PatientIdentityRemoved": "YES",
    }
    held, volume = given(series(DeidentificationMethodCodeSequence=[code], **stated))
    assert "DeviceSerialNumber" not in volume.headers[0]  # only what is copied stays in memory
    volume.result(form(), model_sample(held), None, "edit=img2img").save(tmp_path, "a")
    for image in read_series(tmp_path / "a"):
        assert {name: image[name].value for name in stated} == stated
        assert image.DeidentificationMethodCodeSequence[0].CodeValue == "113100"


def test_slices_with_one_uid_become_slices_with_different_ones(tmp_path):
    files = []
    for data in series():
        image = pydicom.dcmread(io.BytesIO(data))
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.1")
        buffer = io.BytesIO()
        image.save_as(buffer)
        files.append(buffer.getvalue())
    held, volume = given(files)
    volume.result(form(), model_sample(held), None, "edit=img2img").save(tmp_path, "a")
    assert len({image.SOPInstanceUID for image in read_series(tmp_path / "a")}) == 6


def test_another_header_is_another_input():
    same, other = given(series())[1], given(series(PatientName="Anonymous"))[1]
    assert same.sha256 == given(series())[1].sha256
    assert same.sha256 != other.sha256


def test_a_series_with_a_missing_slice_is_made_again(tmp_path):
    held, volume = given(series())
    volume.result(form(), model_sample(held), None, "edit=img2img").save(tmp_path, "a")
    files = volume.written(tmp_path, "a", ".nii.gz")
    assert len(files) == 6
    assert torch.equal(volume.read(files, form()), model_sample(held))
    files[3].unlink()
    assert volume.written(tmp_path, "a", ".nii.gz") == []
