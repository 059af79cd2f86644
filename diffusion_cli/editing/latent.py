"""Measurements of images as measurements of latents."""

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, adaptive_max_pool3d

from diffusion_cli.conditions.operators import Mask, Measurement
from diffusion_cli.diffusion.latents import Pixels, Space


def known_of(space: Space, operator: Measurement, y: Tensor) -> tuple[Measurement, Tensor]:
    """Convert a measurement y of images to a measurement of states.

    In pixel space it is unchanged. In latent space, a latent is known under a mask if all its pixels are; unknown
    pixels are gray for the encoder. Other measurements are applied to the decoded image.
    """
    if isinstance(space, Pixels):
        return operator, y
    if not isinstance(operator, Mask):
        return Decoded(space, operator), y
    states = space.encode(operator.pseudo_inverse(y))
    largest = adaptive_max_pool2d if states.ndim == 4 else adaptive_max_pool3d
    known = Mask(largest((~operator.known).float(), states.shape[2:]) == 0)
    return known, known(states)


class Decoded(Measurement):
    """A measurement of the decoded image, which is not linear in the latents."""

    def __init__(self, space: Space, operator: Measurement) -> None:
        super().__init__(space.shape)
        self.space, self.operator = space, operator

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(self.space.decode(x))

    def picture(self, y: Tensor) -> Tensor:
        return self.operator.picture(y)
