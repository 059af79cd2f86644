"""Denoisers of images that are larger than those of the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, Prediction
from diffusion_cli.networks.tiles import Tiles


def tiled(tiles: Tiles, denoisers: Sequence[Denoise], most: int) -> Denoise:
    """Return a denoiser of whole images, which averages the predictions of their tiles at every call.

    Predictions are averaged rather than results: neighbouring tiles then agree in what they sample. The average is
    linear, so x_0 and eps remain consistent, and every sampler and guidance works with it.

    Args:
        tiles: the tiles.
        denoisers: denoisers of the tiles of `Tiles.cut`, one for each `most` consecutive tiles.
        most: largest number of tiles in a network call.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        parts = tiles.cut(x_t).split(most)
        found = [part(x, t) for part, x in zip(denoisers, parts, strict=True)]
        x0 = tiles.join(torch.cat([each.x0 for each in found]))
        eps = tiles.join(torch.cat([each.eps for each in found]))
        heads = [each.variance for each in found if each.variance is not None]
        return Prediction(x0, eps, found[0].sigma, tiles.join(torch.cat(heads)) if heads else None)

    return denoise
