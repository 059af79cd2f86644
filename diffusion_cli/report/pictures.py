"""Pictures of results."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_cli.checkpoint import whole_file
from diffusion_cli.data import Exact, is_gray, opened
from diffusion_cli.foreign import read, reason


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay out uint8 images [N, C, H, W] in rows of `columns` (null: square), one pixel apart, as [C, H', W'].

    Small images are enlarged by a whole factor to at least 32 pixels, each pixel a square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    return rows(images.split(columns))


def rows(images: Sequence[Tensor]) -> Tensor:
    """Lay out uint8 images in rows of unlike lengths, each [n, C, H, W], as `grid` does."""
    columns = max(map(len, images))
    blanks = [row.new_full((columns - len(row), *row.shape[1:]), 255) for row in images]
    cells = torch.stack([torch.cat(pair) for pair in zip(images, blanks, strict=True)])
    scale = max(1, 32 // cells.shape[-1])
    cells = cells.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    framed = F.pad(cells, (1, 1, 1, 1), value=255)
    lines, columns, channels, height, width = framed.shape
    return framed.permute(2, 0, 3, 1, 4).reshape(channels, lines * height, columns * width)


def read_images(files: Sequence[Path]) -> Tensor:
    """Saved pictures of one size, uint8 [N, C, H, W]; ValueError naming one that is no picture, or of another size."""
    decoder: Exact | None = None
    images = []
    for file in files:
        try:
            data = read(file)
            if decoder is None:
                first = opened(data)
                decoder = Exact(1 if is_gray(first) else 3, first.height, first.width)
            images.append(torch.from_numpy(decoder(data).copy()))
        except ValueError as error:
            raise ValueError(f"{file}: {reason(error)}; move it away to have it made anew") from error
    return torch.stack(images)


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image [C, H, W] of 1 or 3 channels as PNG, whole or not at all."""
    pixels = image.cpu().permute(1, 2, 0).squeeze(2).contiguous().numpy()
    with whole_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write uint8 images [N, C, H, W] as one PNG."""
    save_png(grid(images.cpu(), columns), path)


def save_rows(images: Sequence[Tensor], path: Path) -> None:
    """Write rows of uint8 images, each [n, C, H, W], as one PNG."""
    save_png(rows([row.cpu() for row in images]), path)


def save_gif(images: Tensor, path: Path, milliseconds: int = 120) -> None:
    """Write uint8 images [N, C, H, W] as an animation there and back without end, whole or not at all."""
    frames = [
        Image.fromarray(grid(image[None].cpu()).permute(1, 2, 0).squeeze(2).numpy())
        for image in [*images, *images.flip(0)[1:-1]]
    ]
    with whole_file(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0
        )
