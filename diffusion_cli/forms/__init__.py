"""Forms: in what numbers and in what files the things lie that a model makes, and how they look."""

from diffusion_cli.forms.base import Form, Shape, form_of
from diffusion_cli.forms.dicom import Dicom
from diffusion_cli.forms.picture import Picture, to_bytes
from diffusion_cli.forms.points import PointSet
from diffusion_cli.forms.ranged import Range, Ranged
from diffusion_cli.forms.raster import Raster, has_own_numbers, image_form
from diffusion_cli.forms.volume import Volume

__all__ = [
    "Dicom",
    "Form",
    "Picture",
    "PointSet",
    "Range",
    "Ranged",
    "Raster",
    "Shape",
    "Volume",
    "form_of",
    "has_own_numbers",
    "image_form",
    "to_bytes",
]
