"""New DICOM series of synthetic slices, with the geometry and the patient of the series that they are derived from."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.dicom import LITTLE_ENDIAN, identifier
from diffusion_cli.formats.dicom_reader import limits, whole_header

if TYPE_CHECKING:
    from pydicom import Dataset

PATIENT_AND_STUDY = (
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
    "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName",
)  # fmt: skip
GEOMETRY = (
    "FrameOfReferenceUID", "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "SliceLocation", "PatientPosition", "Laterality",
    "BodyPartExamined", "InstanceNumber",
)  # fmt: skip
PIXELS = (
    "SOPClassUID", "Modality", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType", "Units",
    "WindowCenter", "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod", "BurnedInAnnotation", "RecognizableVisualFeatures",
)  # fmt: skip
ACQUISITION = (
    "KVP", "AcquisitionNumber", "ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType",
    "RepetitionTime", "EchoTime", "EchoTrainLength", "InversionTime", "TriggerTime", "SeriesType", "CountsSource",
    "NumberOfSlices", "CorrectedImage", "DecayCorrection", "CollimatorType", "FrameReferenceTime", "ImageIndex",
    "ActualFrameDuration", "AcquisitionDate", "AcquisitionTime", "DecayFactor",
)  # fmt: skip
"""Elements that the definitions of CT, MR and PET images require (DICOM PS3.3, A.3, A.4 and A.21)."""
REQUIRED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
COPIED = (*PATIENT_AND_STUDY, *GEOMETRY, *PIXELS, *ACQUISITION)
FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
"""Sequences in which enhanced images have their geometry and rescaling."""
SYNTHETIC_DATA = 0x0008001C  # older versions of pydicom have no name for it
LONGEST_NAME = 64  # characters of a SeriesDescription
SOURCE_OF_PROCESSING = ("121322", "DCM", "Source image for image processing operation")
"""Purpose of a reference: its code, scheme and meaning (PS3.16, CID 7202)."""


def derivable(files: Sequence[bytes]) -> "list[Dataset]":
    """Return the elements of slices that a series derived from them needs.

    None if the slices lack identifiers, or have their rescaling or geometry in tables or functional groups.

    Raises:
        FormatError: as `read_header`.
    """
    kept = []
    for data in files:
        header = whole_header(data)
        other = any(name in header for name in ("ModalityLUTSequence", *FUNCTIONAL_GROUPS))
        if other or not all(header.get(name) for name in REQUIRED):
            return []
        kept.append(_of(header, (*COPIED, *REQUIRED, "SeriesDescription", "ImageType")))
    return kept


def _of(header: "Dataset", names: Sequence[str]) -> "Dataset":
    """Return the elements of a header with some names; those that it has."""
    from pydicom import Dataset

    found = Dataset()
    for name in names:
        if name in header:
            found.add(header[name])
    return found


def stored_numbers(header: "Dataset", values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the numbers that the file of a header stores for values [H, W], and how many values were clipped."""
    signed, size = int(header.get("PixelRepresentation") or 0), int(header.BitsAllocated)
    dtype = f"{'' if signed else 'u'}int{size}"
    lowest, highest = limits(dtype, int(header.BitsStored))
    slope, intercept = _rescaling(header)
    numbers = np.rint((values - intercept) / slope)
    clipped = int(((numbers < lowest) | (numbers > highest)).sum())
    return numbers.clip(lowest, highest).astype(dtype), clipped


def values_of(header: "Dataset", numbers: np.ndarray) -> np.ndarray:
    """Return the values of the numbers of `stored_numbers`, float64 [H, W]."""
    slope, intercept = _rescaling(header)
    return numbers * slope + intercept


def _rescaling(header: "Dataset") -> tuple[float, float]:
    slope = header.get("RescaleSlope")
    return 1.0 if slope is None else float(slope), float(header.get("RescaleIntercept") or 0)


def derived_series(
    headers: "Sequence[Dataset]", numbers: Sequence[np.ndarray], description: str
) -> list[bytes]:
    """Return the files of a new series with other pixels, marked as synthetic and as derived from the given one.

    Series and instances get new UIDs, hashes of the content. Patient, study, frame of reference, position, rescaling
    and required elements are those of the source; other elements, among them private ones, are not copied.

    Args:
        headers: headers of the source, from the first slice to the last.
        numbers: stored numbers of each slice, [H, W].
        description: how the pixels were made, such as "edit=inpaint".

    Raises:
        FormatError: a header cannot be written.
    """
    content = [_pixels(header, each) for header, each in zip(headers, numbers, strict=True)]
    source = str(headers[0].SeriesInstanceUID)
    series = identifier(b"derived", source.encode(), description.encode(), *content)
    files = []
    for number, (header, pixels) in enumerate(zip(headers, content, strict=True)):
        image = _derived(header, pixels)
        image.SeriesInstanceUID = series
        # With the number, because poorly anonymised slices share one UID.
        image.SOPInstanceUID = identifier(
            series.encode(), str(header.SOPInstanceUID).encode(), str(number).encode()
        )
        image.add_new(SYNTHETIC_DATA, "CS", "YES")
        name = str(header.get("SeriesDescription") or "")
        image.SeriesDescription = f"SYNTHETIC, diffuse: {name}"[:LONGEST_NAME].strip(": ")
        made = f"Synthetic: {description} of a diffusion model, not acquired"
        image.DerivationDescription = f"{made}; derived from series {source}"
        buffer = BytesIO()
        try:
            image.save_as(buffer, enforce_file_format=True)
        except Exception as error:  # pydicom raises errors of many types for malformed elements
            raise FormatError(f"has elements that cannot be written ({error})") from error
        files.append(buffer.getvalue())
    return files


def _pixels(header: "Dataset", numbers: np.ndarray) -> bytes:
    """Return numbers with white highest as the bytes of the file."""
    if header.PhotometricInterpretation == "MONOCHROME1":
        lowest, highest = limits(numbers.dtype.name, int(header.BitsStored))
        numbers = (lowest + highest - numbers.astype(np.int64)).astype(numbers.dtype)
    return np.ascontiguousarray(numbers.astype(numbers.dtype.newbyteorder("<"))).tobytes()


def _derived(header: "Dataset", pixels: bytes) -> "Dataset":
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    image = _of(header, COPIED)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = UID(LITTLE_ENDIAN)
    kind = header.get("ImageType")
    image.ImageType = ["DERIVED", "SECONDARY", *([] if kind is None or isinstance(kind, str) else kind[2:])]
    image.SeriesNumber, image.Manufacturer = None, "diffuse"
    image.SourceImageSequence = [_reference(header, SOURCE_OF_PROCESSING)]
    series = Dataset()
    series.SeriesInstanceUID = header.SeriesInstanceUID
    series.ReferencedInstanceSequence = [_reference(header)]
    image.ReferencedSeriesSequence = [series]
    wide = int(header.BitsAllocated) > 8
    image.add_new("PixelData", "OW" if wide else "OB", pixels + b"\0" * (len(pixels) % 2))
    return image


def _reference(header: "Dataset", purpose: tuple[str, str, str] | None = None) -> "Dataset":
    """Return a reference to the instance of a header, with its purpose if given."""
    from pydicom import Dataset

    reference = Dataset()
    reference.ReferencedSOPClassUID = header.SOPClassUID
    reference.ReferencedSOPInstanceUID = header.SOPInstanceUID
    if purpose is not None:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = purpose
        reference.PurposeOfReferenceCodeSequence = [code]
    return reference
