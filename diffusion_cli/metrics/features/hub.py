"""Networks of Hugging Face transformers: loading of weights and preprocessing of images."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import UsageError


def load(name: str, architecture: str, weights: str) -> Any:
    """Load a network of transformers with weights from safetensors files, never from pickles.

    Args:
        name: name of the features, for errors.
        architecture: class of transformers.
        weights: folder with config.json and model.safetensors, or a name on the hub, downloaded once.

    Raises:
        UsageError: transformers or the weights are missing, or the weights are damaged or of another network.
    """
    transformers = imported(name)
    transformers.logging.set_verbosity_error()  # missing weights are an error below, so its warning is not needed
    try:
        network, told = pretrained(
            getattr(transformers, architecture), weights, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise missing(weights, "config.json and model.safetensors", error) from error
    except Exception as error:  # damaged files raise errors of many types
        raise unfit(weights, architecture, str(error).partition("\n")[0]) from error
    if told["missing_keys"]:
        raise unfit(weights, architecture, f"it has no {min(told['missing_keys'])}")
    return network.requires_grad_(False).eval()


def imported(name: str) -> Any:
    """Import transformers, an optional dependency."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "features", name, "needs transformers", "install it: pip install 'diffuse-cli[transformers]'"
        ) from error


def pretrained(kind: Any, weights: str, **options: Any) -> Any:
    """Load a class of transformers from a folder, from the local cache of the hub, or from the hub."""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    try:
        return kind.from_pretrained(weights, local_files_only=True, **options)
    except OSError:
        return kind.from_pretrained(weights, **options)


def missing(weights: str, files: str, error: Exception) -> UsageError:
    """Return the error that needed files are missing."""
    return UsageError(
        "features.weights",
        weights,
        str(error).partition("\n")[0].rstrip("."),
        f"give a folder with {files} (not pickled), or a name on the hub if there is a network",
    )


def unfit(weights: str, architecture: str, reason: str) -> UsageError:
    """Return the error that weights do not fit the network."""
    return UsageError(
        "features.weights",
        weights,
        f"does not have the weights of a {architecture} ({reason})",
        "give other weights",
    )


def prepared(
    images: Tensor,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    crop: bool,
) -> Tensor:
    """Convert uint8 images [B, C, H, W], C 1 or 3, to normalized float32 [B, 3, size, size].

    With `crop`, resizes the short side to `size` and crops the centre, as CLIP does; otherwise resizes both sides.
    PIL is used as for published values: it clips overshoots between its two passes and torch does not, which changes
    sharp edges by up to 20 gray values.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    tall, wide = (size * height // short, size * width // short) if crop else (size, size)
    top, left = (tall - size) // 2, (wide - size) // 2
    arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(array).resize((wide, tall), Image.Resampling.BICUBIC) for array in arrays]
    square = np.stack([np.asarray(image)[top : top + size, left : left + size] for image in resized])
    pixels = torch.from_numpy(square).to(images.device)
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    return (scaled - scaled.new_tensor(mean)[:, None, None]) / scaled.new_tensor(std)[:, None, None]
