"""Measurements of whole images that `edit=restore` inverts; each is built with the shape of the model's images."""

from diffusion_cli.editing.measurements.blur import GaussianFilter, MotionFilter
from diffusion_cli.editing.measurements.clipping import Clipping
from diffusion_cli.editing.measurements.ct import CT
from diffusion_cli.editing.measurements.mri import MRI, RadialMRI

__all__ = ["CT", "MRI", "Clipping", "GaussianFilter", "MotionFilter", "RadialMRI"]
