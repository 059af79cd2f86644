"""Pictures of results."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_cli.checkpoint import whole_file


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay out uint8 images [N, C, H, W] in rows of `columns` (null: square), one pixel apart, as [C, H', W'].

    Small images are enlarged by a whole factor to at least 32 pixels, each pixel a square.
    """
    count = len(images)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, 32 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    blank = images.new_full((rows * columns - count, *images.shape[1:]), 255)
    framed = F.pad(torch.cat([images, blank]), (1, 1, 1, 1), value=255)
    _, channels, height, width = framed.shape
    cells = framed.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return cells.reshape(channels, rows * height, columns * width)


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image [C, H, W] of 1 or 3 channels as PNG, whole or not at all."""
    pixels = image.cpu().permute(1, 2, 0).squeeze(2).contiguous().numpy()
    with whole_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write uint8 images [N, C, H, W] as one PNG."""
    save_png(grid(images.cpu(), columns), path)
