"""A wrapper of the denoiser."""

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoise, Denoiser, Prediction, per_image
from diffusion_cli.diffusion.guidance import Guidance, Guides
from pydantic import PositiveFloat
from torch import Tensor


class Example(Guidance):
    """Clips the predicted images to a range.

    A guidance returns a denoiser around a denoiser. `guides` loads the denoisers of other runs, if it needs one.

    Args:
        guides: loader of other runs; the program passes it.
        limit: largest absolute value of a predicted image; data are in [-1, 1]
    """

    def __init__(self, guides: Guides | None = None, *, limit: PositiveFloat = 1.0) -> None:
        self.limit = limit

    def __call__(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        """Return the guided denoiser for images with condition y, or None."""

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            prediction = denoiser(x_t, t, y)
            x0 = prediction.x0.clamp(-self.limit, self.limit)
            alpha, sigma = (per_image(level, x_t) for level in denoiser.schedule(t))
            return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)

        return guided
