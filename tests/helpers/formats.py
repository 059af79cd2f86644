"""TIFF files, scans and folders of them."""

import io
from pathlib import Path

import numpy as np
import pydicom
import tifffile
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from diffusion_cli.data import Folder
from diffusion_cli.formats import Dicom


def folder(path: Path, **changes) -> Folder:
    arguments = {
        "data_dir": str(path.parent / "data"),  # for lists of files
        "masks": None,
        "resolution": 8, "channels": 1, "range": None, "depth": "auto", "labels": "none", "background": "white",
        "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder(path=str(path), **(arguments | changes))


def images(dataset) -> torch.Tensor:
    split = dataset.load("train")
    return split[torch.arange(len(split))]


def written(form, sample: torch.Tensor, path: Path) -> bytes:
    form.write(sample, path)
    return path.read_bytes()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def dicom(numbers: np.ndarray, **elements) -> bytes:
    """A file as a scanner may have made it, with a patient's name, and other elements."""
    buffer = io.BytesIO()
    wide = Dicom("int16", 16, 1.0, 0.0, [-32768.0], [32767.0])
    wide.write(wide.from_numbers(numbers.reshape(1, -1, numbers.shape[-1]).astype(np.int16)), buffer)  # pyright: ignore
    image = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
    *frames, image.Rows, image.Columns = numbers.shape
    if frames:
        image.NumberOfFrames = frames[0]
    image.PatientName = "Doe^Jane"
    image.PixelRepresentation = int(numbers.dtype.kind == "i")
    image.BitsAllocated = 8 * numbers.itemsize
    image.BitsStored, image.HighBit = image.BitsAllocated, image.BitsAllocated - 1
    image.PixelData = numbers.tobytes()
    syntax = elements.pop("syntax", None)
    if syntax is not None:
        image.file_meta.TransferSyntaxUID = syntax
    for name, value in elements.items():
        setattr(image, name, value)
    if syntax is not None and UID(syntax).is_encapsulated:
        image.PixelData = encapsulate([image.PixelData])
        image["PixelData"].is_undefined_length = True
    fresh = pydicom.Dataset(image)  # which remembers no order of bytes
    fresh.file_meta = image.file_meta
    return dicom_bytes(fresh)


def dicom_bytes(image: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(data: bytes, syntax: str) -> bytes:
    """A DICOM file compressed by pydicom."""
    image = pydicom.dcmread(io.BytesIO(data))
    image.compress(syntax, generate_instance_uid=False)
    return dicom_bytes(image)


def saved(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path
