"""Trained models in the formats of other programs: one class and one YAML file a format."""

from diffusion_cli.export.base import Exportable, ExportFormat
from diffusion_cli.export.diffusers import Diffusers, diffusers_pipeline
from diffusion_cli.export.programs import Onnx, Torch
from diffusion_cli.export.safetensors import Safetensors

__all__ = ["Diffusers", "ExportFormat", "Exportable", "Onnx", "Safetensors", "Torch", "diffusers_pipeline"]
