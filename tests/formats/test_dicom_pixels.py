"""Pixels of DICOM files: compression, lookup tables, colours, and files that would take much memory."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from diffusion_cli.data.decoding import form_of_files, image_decoder
from diffusion_cli.formats import Dicom, Uint8Image, dicom_reader
from diffusion_cli.formats.dicom_reader import colour_image, read_frames, read_scan
from diffusion_cli.formats.lossy import lossy_format
from helpers.formats import compressed, dicom, dicom_bytes, folder, images

RNG = np.random.default_rng(0)
NUMBERS = RNG.integers(-1000, 3000, (33, 37)).astype(np.int16)
COLOURS = RNG.integers(0, 256, (33, 37, 3), dtype=np.uint8)


def coloured(pixels: np.ndarray = COLOURS, what: str = "RGB", **elements) -> bytes:
    shape = {
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
    }
    return dicom(pixels.reshape(len(pixels), -1), PhotometricInterpretation=what, **shape, **elements)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("frames", [1, 3])
def test_lossless_compression_changes_no_number(syntax, frames):
    numbers = np.stack([NUMBERS + number for number in range(frames)])
    plain = dicom(numbers if frames > 1 else NUMBERS, RescaleSlope=2, RescaleIntercept=-7)
    found = read_frames(compressed(plain, syntax))
    np.testing.assert_array_equal(found.pixels, numbers)
    assert (found.slope, found.intercept, found.pixels.dtype) == (2, -7, np.int16)


def test_compressed_slices_are_a_dataset_and_resized_like_others(tmp_path):
    for place, pack in (
        ("plain", lambda data: data),
        ("packed", lambda data: compressed(data, JPEGLSLossless)),
    ):
        (tmp_path / place).mkdir()
        for number in range(3):
            (tmp_path / place / f"{number}.dcm").write_bytes(pack(dicom(np.roll(NUMBERS, number))))
    first, second = (
        images(folder(tmp_path / place, range=[-1000, 3000], resolution=6)) for place in ("plain", "packed")
    )
    assert first.tolist() == second.tolist()


def test_a_missing_decoder_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(dicom_reader, "PLUGINS", ())
    with pytest.raises(
        ValueError, match=r"is compressed \(JPEG Lossless\); pip install pylibjpeg-libjpeg to"
    ):
        read_scan(dicom(NUMBERS, syntax=JPEGLosslessSV1))
    with pytest.raises(ValueError, match=r"\(JPEG 2000.*\); pip install 'diffuse-cli\[medical\]' to read it"):
        read_scan(dicom(NUMBERS, syntax=JPEG2000))


def test_a_table_of_values_replaces_slope_and_intercept():
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, -1, 16], "US"
    table.add_new("LUTData", "US", [100, 7, 2000, 65535])
    numbers = np.array([[-5, -1], [0, 9]], np.int16)
    scan = read_scan(dicom(numbers, ModalityLUTSequence=[table]))
    assert scan.values.tolist() == [[[100, 100], [7, 65535]]]
    assert (scan.pixels.dtype, scan.bits, scan.slope, scan.intercept) == (np.uint16, 16, 1, 0)


def test_numbers_of_32_bits_are_read_as_volumes_only():
    numbers = np.array([[[-(2**31), 2**31 - 1]], [[0, 5]]], np.int32)
    np.testing.assert_array_equal(read_frames(dicom(numbers)).pixels, numbers)
    with pytest.raises(ValueError, match="has 32 bits in int32; up to 16 are supported"):
        read_scan(dicom(numbers[0]))


# --- Colour ------------------------------------------------------------


def test_colours_are_read_as_8_bit_images(tmp_path):
    (tmp_path / "a.dcm").write_bytes(coloured())
    dataset = folder(tmp_path, channels=3, resolution=[33, 37])
    assert dataset.form == Uint8Image()
    np.testing.assert_array_equal(images(dataset)[0].permute(1, 2, 0), COLOURS)
    planes = coloured(COLOURS, PixelData=COLOURS.transpose(2, 0, 1).tobytes() + b"\0")
    image = pydicom.dcmread(io.BytesIO(planes))
    image.PlanarConfiguration = 1
    np.testing.assert_array_equal(np.asarray(colour_image(dicom_bytes(image))), COLOURS)
    for syntax in (RLELossless, JPEG2000Lossless):
        np.testing.assert_array_equal(np.asarray(colour_image(compressed(coloured(), syntax))), COLOURS)


def test_luma_and_chroma_become_colours():
    smooth = Image.fromarray(COLOURS).resize((32, 24), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    smooth.save(encoded, "JPEG", quality=95)
    image = pydicom.dcmread(io.BytesIO(coloured(np.asarray(smooth), "YBR_FULL_422")))
    image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    image.PixelData = encapsulate([encoded.getvalue()])
    image["PixelData"].is_undefined_length = True
    image.LossyImageCompression = "01"
    found = np.asarray(colour_image(dicom_bytes(image)))
    np.testing.assert_allclose(found, np.asarray(Image.open(encoded)), atol=1)
    assert lossy_format(dicom_bytes(image)) == "DICOM with lossy compression"
    luma = np.asarray(smooth.convert("YCbCr"))
    found = np.asarray(colour_image(coloured(luma, "YBR_FULL")))
    np.testing.assert_allclose(found, np.asarray(smooth), atol=3)


def test_a_palette_becomes_colours():
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = RNG.integers(0, 256, (6, 3), dtype=np.uint8)
    elements = {}
    for name, column in zip(("Red", "Green", "Blue"), palette.T, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [6, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = (column.astype(np.uint16) * 257).tobytes()
    data = dicom(numbers, PhotometricInterpretation="PALETTE COLOR", **elements)
    np.testing.assert_array_equal(np.asarray(colour_image(data)), palette[numbers])


def test_grayscale_and_colours_are_told_apart():
    gray = dicom(NUMBERS)
    with pytest.raises(
        ValueError, match=r"dataset\.channels=3: the first DICOM image is grayscale; set .*=1"
    ):
        form_of_files(gray, 3, None, "auto", 2)
    with pytest.raises(ValueError, match=r"is RGB, not grayscale; colours are read as images with"):
        form_of_files(coloured(), 1, None, "auto", 2)
    decoder = image_decoder(coloured(), (3, 33, 37), None, "auto", "white", 2)
    with pytest.raises(ValueError, match=r"is a grayscale DICOM image"):
        decoder(gray)
    with pytest.raises(ValueError, match=r"has colours in uint16; only 8 bits"):
        colour_image(coloured(COLOURS.astype(np.uint16)))
    assert isinstance(form_of_files(gray, 1, None, "auto", 2), Dicom)


# --- Hostile files -----------------------------------------------------


def test_frames_must_have_the_declared_size_before_they_are_decoded():
    for syntax in (JPEG2000Lossless, JPEGLSLossless):
        image = pydicom.dcmread(io.BytesIO(compressed(dicom(NUMBERS), syntax)))
        image.Rows = 8
        with pytest.raises(ValueError, match="has a frame that is damaged, or not of 8 x 37 x 1"):
            read_scan(dicom_bytes(image))
    image = pydicom.dcmread(io.BytesIO(compressed(dicom(NUMBERS), JPEG2000Lossless)))
    huge = bytearray(image.PixelData)
    at = huge.index(b"\xff\x4f\xff\x51") + 8
    huge[at : at + 8] = b"\0\0\xff\xff" * 2  # the size of the codestream
    image.PixelData = bytes(huge)
    with pytest.raises(ValueError, match="has a frame that is damaged"):
        read_scan(dicom_bytes(image))


def test_a_run_length_encoding_inflates_within_bounds():
    image = pydicom.dcmread(io.BytesIO(compressed(dicom(NUMBERS), RLELossless)))
    image.Rows = image.Columns = 8192
    with pytest.raises(ValueError, match="has RLE frames of 134217728 bytes; at most 16777216 are supported"):
        read_scan(dicom_bytes(image))


def test_elements_before_the_pixels_are_bounded(monkeypatch):
    monkeypatch.setattr(dicom_reader, "LONGEST_HEADER", 4000)
    assert read_scan(dicom(NUMBERS)).pixels.shape == (33, 37)
    with pytest.raises(ValueError, match="has no integer pixels in its first 4000 bytes"):
        read_scan(dicom(NUMBERS, ImageComments="x" * 5000))
