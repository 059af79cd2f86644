"""An edit that keeps a share of the image."""

from typing import Annotated

from diffusion_cli.diffusion.denoiser import noised
from diffusion_cli.editing import EditProcess, EditResult
from diffusion_cli.editing.base import Shape
from diffusion_cli.editing.transform import PartialNoising, Strength, decode
from diffusion_cli.samplers import start_grid_at
from pydantic import Field
from torch import Tensor


class Example(PartialNoising):
    """Noises an image to a time, samples from there, and mixes the result with the image.

    An edit gets images in [-1, 1] and an `EditProcess` with the sampler, its times and the denoiser.

    Args:
        shape: shape of the model's images; the program passes it.
        strength: time from which the image is sampled again, 0.001 to 1
        keep: share of the image in the result, 0 to 1
    """

    starts_from_noise = True
    before_names = ("given", "noised")

    def __init__(
        self, shape: Shape, *, strength: Strength = 0.5, keep: Annotated[float, Field(ge=0, le=1)] = 0.25
    ) -> None:
        super().__init__(shape, strength=strength)
        self.keep = keep

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        """Return the results for images [B, C, H, W], [B, 1, C, H, W], and the images to show before them."""
        times = start_grid_at(process.times, self.strength)
        x = noised(process.sampler.schedule, process.space.encode(images), times[0], process.draw())
        sampled = decode(process, x, times, process.draw)
        mixed = self.keep * images + (1 - self.keep) * sampled
        return EditResult(mixed[:, None], [images, process.space.decode(x)])
