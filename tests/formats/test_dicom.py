"""Scans in DICOM files."""

import io
import sys

import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import JPEG2000, MPEG2MPML, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian
from torch.testing import assert_close

from diffusion_cli.formats import Dicom
from diffusion_cli.formats.dicom import dicom_form
from diffusion_cli.formats.dicom_reader import read_scan
from helpers.formats import dicom, written


def test_what_is_written_holds_nothing_of_a_patient_and_says_that_it_is_synthetic(tmp_path):
    data = dicom(np.zeros((4, 5), np.int16), RescaleSlope=2, RescaleIntercept=-7)
    assert b"Doe^Jane" in data
    form = dicom_form(data, None)
    image = pydicom.dcmread(io.BytesIO(written(form, form.decode(data), tmp_path / "x.dcm")))
    assert "Jane" not in str(image)
    assert (image.PatientName, image.ConversionType, image.ImageType) == (
        "SYNTHETIC",
        "SYN",
        ["DERIVED", "SECONDARY"],
    )
    assert (image.RescaleSlope, image.RescaleIntercept, image.BitsStored) == (2, -7, 16)
    other = pydicom.dcmread(io.BytesIO(written(form, form.decode(data) + 0.5, tmp_path / "y.dcm")))
    assert image.SOPInstanceUID != other.SOPInstanceUID
    assert image.SeriesInstanceUID == other.SeriesInstanceUID


def test_scans_are_compared_by_their_rescaled_values():
    first = dicom(np.full((4, 5), 1000, np.int16), RescaleSlope=1, RescaleIntercept=-1000)
    second = dicom(np.full((4, 5), 4000, np.uint16), RescaleSlope=0.5, RescaleIntercept=-2000)
    form = dicom_form(first, [-1000, 1000])
    assert (form.decode(first) == 0).all()
    assert (form.decode(second) == 0).all()
    with pytest.raises(ValueError, match=r"16 bits in uint16, but the first file 16 in int16.*range="):
        dicom_form(first, None).decode(second)


def test_values_beyond_what_the_first_scan_may_hold_are_not_cut_without_a_word():
    """As of PET, where each slice has a slope of its own."""
    first, second = (
        dicom(np.full((4, 5), 4000, np.uint16), BitsStored=12, HighBit=11, RescaleSlope=slope)
        for slope in (1, 2)
    )
    with pytest.raises(ValueError, match=r"0 to 8190, but the first file 0 to 4095; set .*dataset\.range="):
        dicom_form(first, None).decode(second)
    assert_close(2 * dicom_form(second, None).decode(first), dicom_form(second, None).decode(second) - 1)
    assert_close(dicom_form(first, [0, 8000]).decode(second), torch.ones(1, 4, 5))


@pytest.mark.parametrize("slope", [2 / 3, 1.23456789012345678e-5])
def test_a_scan_of_a_slope_of_many_digits_fits_itself(tmp_path, slope):
    ends = [0.0], [slope * 4095]
    form = Dicom("uint16", 12, slope, 0.0, *ends)
    numbers = np.arange(4096, dtype=np.uint16).reshape(1, 64, 64)
    data = written(form, form.from_numbers(numbers), tmp_path / "x.dcm")
    np.testing.assert_array_equal(form.numbers(form.decode(data)), numbers)


def test_the_window_is_that_of_the_standard():
    data = dicom(np.zeros((4, 5), np.int16), WindowCenter=[40, 300], WindowWidth=[400, 1500])
    form = dicom_form(data, "window")
    assert (form.low, form.high) == ([-160], [239])
    again = pydicom.dcmread(io.BytesIO(data))
    del again.WindowCenter
    out = io.BytesIO()
    again.save_as(out, enforce_file_format=True)
    with pytest.raises(ValueError, match=r"dataset\.range=window: the first file has no window"):
        dicom_form(out.getvalue(), "window")


def test_where_white_is_low_it_is_turned_round():
    numbers = np.arange(20, dtype=np.uint16).reshape(4, 5)
    scan = read_scan(dicom(numbers, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(scan.pixels, 4095 - numbers)


def test_what_lies_above_the_stored_bits_does_not_count():
    numbers = np.arange(-10, 10, dtype=np.int16).reshape(4, 5)
    scan = read_scan(dicom((numbers & 0x0FFF) | 0x5000, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(scan.pixels, numbers)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"syntax": JPEG2000}, "has a frame that is damaged, or not of 4 x 5 x 1"),
        ({"syntax": JPEG2000, "Rows": 60_000, "Columns": 60_000}, "inflates to 7200000000 bytes; at most"),
        ({"syntax": MPEG2MPML}, "MPEG2 Main Profile / Main Level"),
        ({"syntax": DeflatedExplicitVRLittleEndian}, "is compressed as a whole"),
        ({"NumberOfFrames": 2, "Rows": 2}, r"has 2 frames; set dataset\.resolution=\[depth,height,width\]"),
        ({"NumberOfFrames": 3}, "too few for 3 frames of 5 x 4"),
        (
            {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
            "is RGB, not grayscale; colours are read as images with dataset.channels=3",
        ),
        ({"Rows": 60_000, "Columns": 60_000}, "too few for 1 frames of 60000 x 60000"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31, "Rows": 2}, "has 32 bits in int32; up to 16"),
        ({"HighBit": 14}, "highest bit"),
        ({"BitsStored": 40}, "40 of 16 bits"),
        ({"RescaleSlope": 0}, "slope 0"),
    ],
)
def test_scans_that_are_not_read_are_refused_in_a_line(elements, message):
    with pytest.raises(ValueError, match=message):
        read_scan(dicom(np.zeros((4, 5), np.int16), **elements))


def test_big_endian_scans_are_read():
    numbers = np.arange(20, dtype=np.int16).reshape(4, 5)
    data = dicom(numbers, syntax=ExplicitVRBigEndian, PixelData=numbers.astype(">i2").tobytes())
    np.testing.assert_array_equal(read_scan(data).pixels, numbers)


def test_without_pydicom_the_remedy_is_named(monkeypatch):
    data = dicom(np.zeros((4, 5), np.int16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"pip install 'diffuse-cli\[medical\]'"):
        read_scan(data)
