"""Detection of lossy compression in image files, which changes pixels."""

from diffusion_cli.formats.dicom_reader import is_dicom, is_lossy
from diffusion_cli.formats.files import has_gray_palette, is_gray, parsed

LOSSY_DICOM = "DICOM with lossy compression"
CODESTREAM, CODING_STYLE = b"\xff\x4f\xff\x51", b"\xff\x52"  # markers of JPEG 2000
TRANSFORM, IRREVERSIBLE = (
    13,
    b"\x00",
)  # offset of the wavelet field from the coding style marker, and its lossy value
FRAME, FRAME_HEADER = b"ANMF", 16  # chunk of an animated WebP, and the size of its header


def lossy_format(data: bytes) -> str | None:
    """Return the name of the lossy format of an image file; None if it is lossless or unreadable.

    Lossy are JPEG, WebP and TIFF with lossy compression, JPEG 2000 with the irreversible wavelet, DICOM with a mark of
    lossy compression, and colour GIF of more than 256 pixels, because it has at most 256 colours.
    """
    try:
        return _lossy_format(data)
    except ValueError:
        return None


def _lossy_format(data: bytes) -> str | None:
    if is_dicom(data):
        return LOSSY_DICOM if is_lossy(data) else None
    image = parsed(data)
    match image.format:
        case "JPEG" | "MPO":  # MPO is JPEG with further images
            return "JPEG"
        case "WEBP" if _is_lossy_webp(data):
            return "lossy WebP"
        case "TIFF" if "jpeg" in str(image.info.get("compression")):
            return "TIFF with JPEG compression"
        case "JPEG2000" if _is_lossy_jpeg_2000(data):
            return "lossy JPEG 2000"
        case "GIF" if not is_gray(image) and not has_gray_palette(image) and image.width * image.height > 256:
            return "GIF of at most 256 colours"
        case _:
            return None


def _is_lossy_webp(data: bytes) -> bool:
    """Return whether the first image of a WebP file is in a lossy chunk."""
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        place += 8 + (FRAME_HEADER if kind == FRAME else size + size % 2)
    return False


def _is_lossy_jpeg_2000(data: bytes) -> bool:
    place = data.find(CODING_STYLE, data.find(CODESTREAM)) + TRANSFORM
    return data[place : place + 1] == IRREVERSIBLE
