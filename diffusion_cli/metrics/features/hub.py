"""Networks of Hugging Face transformers: their weights from a folder or the hub, and images as they take them."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import UsageError


def load(name: str, architecture: str, weights: str) -> Any:
    """The network `architecture` of transformers with weights from safetensors files, never from pickled ones.

    `weights` is a folder with config.json and model.safetensors, or a name on the hub: a copy that was fetched
    before is taken, and else it is fetched. `name` is that of the features, for errors.

    Raises UsageError if transformers or the weights are missing, or the weights are damaged or of another network.
    """
    transformers = imported(name)
    transformers.logging.set_verbosity_error()  # what it warns of, weights left untrained, is refused below
    try:
        network, told = pretrained(
            getattr(transformers, architecture), weights, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise missing(weights, "config.json and model.safetensors", error) from error
    except Exception as error:  # a damaged file fails in many ways
        raise unfit(weights, architecture, str(error).partition("\n")[0]) from error
    if told["missing_keys"]:
        raise unfit(weights, architecture, f"it has no {min(told['missing_keys'])}")
    return network.requires_grad_(False).eval()


def imported(name: str) -> Any:
    """The module transformers, which is an extra."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "features", name, "needs transformers", "install it with: pip install 'diffuse-cli[transformers]'"
        ) from error


def pretrained(kind: Any, weights: str, **options: Any) -> Any:
    """What a folder holds of a class of transformers, or the copy fetched of a name on the hub, or the hub."""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    try:
        return kind.from_pretrained(weights, local_files_only=True, **options)
    except OSError:
        return kind.from_pretrained(weights, **options)


def missing(weights: str, files: str, error: Exception) -> UsageError:
    """The error that a folder or the hub has not what is needed."""
    return UsageError(
        "features.weights",
        weights,
        str(error).partition("\n")[0].rstrip("."),
        f"give a name on the hub while there is a network, or a folder with {files} (pickled weights are not read)",
    )


def unfit(weights: str, architecture: str, reason: str) -> UsageError:
    """The error that weights are not those of the network."""
    return UsageError(
        "features.weights",
        weights,
        f"does not hold the weights of a {architecture} ({reason})",
        "give others",
    )


def prepared(
    images: Tensor,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    crop: bool,
) -> Tensor:
    """uint8 images [B, C, H, W], C 1 or 3, as float32 [B, 3, size, size] of the given mean and deviation.

    With `crop` the short side is resized to `size` and the centre is cut out, as CLIP does; without, both sides are
    resized. PIL resizes each image by itself, as published numbers were made: torch's bicubic filter keeps what
    overshoots between its two passes, PIL's cuts it off, and sharp edges come out up to 20 gray values apart.
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
