"""Random windows of training images, for networks that see a window at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import IMAGE, POSITION
from diffusion_cli.networks.tiles import position

BEYOND = 0.25
"""Share of a window by which random windows exceed the image before they are moved into it.

Samples consist of few windows, many of them at the border, which uniform windows would hardly ever touch.
"""


def random_windows(
    x0: Tensor, condition: Condition | None, window: Sequence[int], u: Tensor
) -> tuple[Tensor, Condition]:
    """Return a window of each image, and its condition with the position and the window of its condition image.

    Args:
        x0: images [B, C, *sizes].
        condition: condition of the images.
        window: sizes of a window; axes that are shorter are seen whole.
        u: uniform random numbers [B, ndim] in [0, 1), on the CPU.
    """
    sizes, condition = x0.shape[2:], Condition.of(condition)
    tile = [min(size, part) for size, part in zip(sizes, window, strict=True)]
    room = torch.tensor([size - part for size, part in zip(sizes, tile, strict=True)])
    beyond = BEYOND * torch.tensor(tile) * (room > 0)
    corners = (
        ((room + 2 * beyond) * u - beyond).round().long().clamp(min=torch.zeros_like(room), max=room).tolist()
    )

    def cut(images: Tensor) -> Tensor:
        places = [
            tuple(slice(start, start + part) for start, part in zip(corner, tile, strict=True))
            for corner in corners
        ]
        return torch.stack([image[(..., *place)] for image, place in zip(images, places, strict=True)])

    values = {POSITION: torch.stack([position(sizes, corner, tile) for corner in corners]).to(x0)}
    if (image := condition.get(IMAGE)) is not None:
        values[IMAGE] = cut(image)
    return cut(x0), condition.replaced(values)
