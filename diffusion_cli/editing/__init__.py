"""Image editing with a trained model, any sampler and any guidance."""

from diffusion_cli.conditions.operators import (
    BlockMean,
    LinearMeasurement,
    LinearOperator,
    Luma,
    Mask,
    Measurement,
)
from diffusion_cli.editing.anomaly import Anomaly
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, LargerShapes, RestorationMethod
from diffusion_cli.editing.measured import Restore
from diffusion_cli.editing.measurements import CT, MRI, Clipping, GaussianFilter, MotionFilter, RadialMRI
from diffusion_cli.editing.methods import DPS, DiffPIR, PiGDM, RePaint, Replacement
from diffusion_cli.editing.restore import Colorize, Inpaint, Outpaint, Restoration, SuperResolution
from diffusion_cli.editing.transform import Attribute, Img2Img, Interpolate, Reconstruct
from diffusion_cli.editing.translate import Translate

__all__ = [
    "CT",
    "DPS",
    "MRI",
    "Anomaly",
    "Attribute",
    "BlockMean",
    "Clipping",
    "Colorize",
    "DiffPIR",
    "Edit",
    "EditProcess",
    "EditResult",
    "GaussianFilter",
    "Img2Img",
    "Inpaint",
    "Interpolate",
    "LargerShapes",
    "LinearMeasurement",
    "LinearOperator",
    "Luma",
    "Mask",
    "Measurement",
    "MotionFilter",
    "Outpaint",
    "PiGDM",
    "RadialMRI",
    "RePaint",
    "Reconstruct",
    "Replacement",
    "Restoration",
    "RestorationMethod",
    "Restore",
    "SuperResolution",
    "Translate",
]  # fmt: skip
