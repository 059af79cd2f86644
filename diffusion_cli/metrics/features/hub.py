"""Networks of Hugging Face transformers: their weights and the preprocessing of images."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.system.pretrained import PublishedWeights


def weights_of(name: str, place: str) -> PublishedWeights:
    """Return the weights of the features `name` from a folder or a name on the hub."""
    return PublishedWeights("features", name, place, "use another metric or features=classifier")


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
