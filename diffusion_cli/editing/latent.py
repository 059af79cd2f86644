"""Measurements of images as measurements of latents."""

from torch import Tensor
from torch.nn.functional import max_pool2d

from diffusion_cli.conditions.operators import LinearOperator, Mask
from diffusion_cli.diffusion.latents import Pixels, Space


def known_of(space: Space, operator: LinearOperator, y: Tensor) -> tuple[LinearOperator, Tensor]:
    """Convert a measurement y of images to a measurement of states.

    In pixel space it is unchanged. In latent space, a latent is known under a mask if all its pixels are; unknown
    pixels are gray for the encoder. Other measurements are applied to the decoded image.
    """
    if isinstance(space, Pixels):
        return operator, y
    if not isinstance(operator, Mask):
        return Decoded(space, operator), y
    states = space.encode(operator.pseudo_inverse(y))
    sides = tuple(whole // part for whole, part in zip(y.shape[2:], states.shape[2:], strict=True))
    known = Mask(max_pool2d((~operator.known).float(), sides) == 0)
    return known, known(states)


class Decoded(LinearOperator):
    """A measurement of the decoded image: nonlinear, without an inverse."""

    def __init__(self, space: Space, operator: LinearOperator) -> None:
        self.space, self.operator = space, operator

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(self.space.decode(x))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError("a measurement of decoded images has no inverse")
