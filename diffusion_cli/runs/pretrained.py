"""Load pretrained autoencoders in the folder format of diffusers."""

from pathlib import Path
from typing import NamedTuple

import torch

from diffusion_cli.config import build
from diffusion_cli.convert import diffusers_autoencoder
from diffusion_cli.convert.base import Network
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.runs.weights import check_fit
from diffusion_cli.system.tensors import read_tensors
from diffusion_cli.system.untrusted import read_json, reason

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("vae", "vqvae")
"""Subfolders of a pipeline that have an autoencoder."""


class Pretrained(NamedTuple):
    """An autoencoder with its weights, and the options to build it."""

    network: ImageAutoencoder
    description: Network


def from_diffusers(folder: Path, key: str) -> Pretrained:
    """Load an autoencoder from a folder of diffusers, in evaluation mode on the CPU.

    The folder, or its subfolder in a pipeline (see `PARTS`), contains config.json and
    diffusion_pytorch_model.safetensors. Scaling factors of the latents are ignored.

    Raises UsageError, about the option `key`, for another network, for missing or damaged files, and for pickled
    weights, which could run code.
    """
    try:
        parts = (folder / name for name in PARTS)
        folder = next((part for part in parts if (part / "config.json").is_file()), folder)
        description = _read_config(folder / "config.json")
        arguments = (description.node, description.shape, None)
        state = diffusers_autoencoder.weights(description, read_tensors(folder / WEIGHTS))
        # Check the size on the meta device first, because an untrusted config.json can ask for any size.
        with torch.device("meta"):
            check_fit(folder / WEIGHTS, build(*arguments), state)
    except (OSError, ValueError) as error:
        raise UsageError(
            key,
            folder,
            f"contains no readable autoencoder ({reason(error)})",
            "give a folder that AutoencoderKL or VQModel of diffusers saved, with safe_serialization=True",
        ) from error
    network = build(*arguments)
    network.load_state_dict(state)
    return Pretrained(network.eval().requires_grad_(False), description)


def _read_config(path: Path) -> Network:
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} is not a JSON object")
    try:
        return diffusers_autoencoder.read(value)
    except FormatError as error:
        raise FormatError(f"{path.name}: {reason(error)}") from error
