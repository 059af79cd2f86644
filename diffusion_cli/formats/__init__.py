"""Storage formats of samples: their files, values and previews."""

from diffusion_cli.formats.base import (
    Completed,
    Original,
    SampleFormat,
    Shape,
    SurfacePoints,
    ValueFormat,
    form_of,
)
from diffusion_cli.formats.dicom import Dicom
from diffusion_cli.formats.high_depth import HighDepthImage, has_own_numbers, image_form
from diffusion_cli.formats.point_cloud import PointCloud
from diffusion_cli.formats.ranged import Range, RangedImage
from diffusion_cli.formats.signal import Signal
from diffusion_cli.formats.signed_distance import SignedDistance
from diffusion_cli.formats.uint8 import Uint8Image, to_bytes
from diffusion_cli.formats.volume import Volume

__all__ = [
    "Completed",
    "Dicom",
    "HighDepthImage",
    "Original",
    "PointCloud",
    "Range",
    "RangedImage",
    "SampleFormat",
    "Shape",
    "Signal",
    "SignedDistance",
    "SurfacePoints",
    "Uint8Image",
    "ValueFormat",
    "Volume",
    "form_of",
    "has_own_numbers",
    "image_form",
    "to_bytes",
]
