"""Image editing with a trained model, any sampler and any guidance."""

from diffusion_cli.conditions.operators import (
    BlockMean,
    LinearMeasurement,
    LinearOperator,
    Luma,
    Mask,
    Measurement,
)
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, LargerShapes, RestorationMethod
from diffusion_cli.editing.methods import DPS, RePaint, Replacement
from diffusion_cli.editing.restore import Colorize, Inpaint, Outpaint, Restoration, SuperResolution
from diffusion_cli.editing.transform import Attribute, Img2Img, Interpolate, Reconstruct
from diffusion_cli.editing.translate import Translate

__all__ = [
    "DPS",
    "Attribute",
    "BlockMean",
    "Colorize",
    "Edit",
    "EditProcess",
    "EditResult",
    "Img2Img",
    "Inpaint",
    "Interpolate",
    "LargerShapes",
    "LinearMeasurement",
    "LinearOperator",
    "Luma",
    "Mask",
    "Measurement",
    "Outpaint",
    "RePaint",
    "Reconstruct",
    "Replacement",
    "Restoration",
    "RestorationMethod",
    "SuperResolution",
    "Translate",
]  # fmt: skip
