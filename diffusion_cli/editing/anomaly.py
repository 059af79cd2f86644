"""Unsupervised detection of anomalies by a model of normal images."""

from copy import copy
from typing import Self

from pydantic import PositiveFloat
from torch import Tensor

from diffusion_cli.diffusion.denoiser import noised
from diffusion_cli.editing.base import EditProcess, EditResult, Shape
from diffusion_cli.editing.measurements.blur import GaussianFilter
from diffusion_cli.editing.transform import PartialNoising, Strength, decode, encode
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import start_grid_at


class Anomaly(PartialNoising):
    """Reconstruction of an image by a model of normal images, and the map of their differences.

    Noises an image x to the time `strength`, and samples x' from there. The map is the mean of `|x - x'|` over the
    channels. The model has not seen anomalies, so x' lacks them. With `invert`, the state is that of DDIM inversion
    without condition and guidance, and x' has the condition and the guidance of the results.

    Args:
        shape: shape of the model's images.
        strength: time of the noised image, in [0.001, 1].
        invert: whether to encode by DDIM inversion instead of noise.
        blur: standard deviation in pixels of the Gaussian filter of the map; None: no filter.
        truth: path of masks of the true anomalies, which `masked` takes; None: unknown.

    Source: Wyatt et al. 2022, Sec. 3; with `invert`, Wolleb et al. 2022, Alg. 1.
    """

    before_names = ("given",)
    unrecorded = ("truth",)

    def __init__(
        self,
        shape: Shape,
        *,
        strength: Strength = 0.5,
        invert: bool = False,
        blur: PositiveFloat | None = None,
        truth: str | None = None,
    ) -> None:
        super().__init__(shape, strength=strength)
        self.inverts = self.deterministic = invert
        self.starts_from_noise = not invert
        self.passes = 2 if invert else 1
        self.blur = None if blur is None else GaussianFilter((1, *shape[1:]), sigma=blur)
        self.mask_path = truth
        self.truth: Tensor | None = None
        """Regions of the true anomalies, bool [N, 1, *sizes], one per input."""

    def masked(self, painted: Tensor) -> Self:
        for problem, wrong in (("no anomaly", not painted.any()), ("an anomaly everywhere", painted.all())):
            if wrong:
                remedy = (
                    "mark anomalies in white (128 to 255), or by values other than 0 in volumes and signals"
                )
                raise UsageError("edit.truth", self.mask_path, f"its masks have {problem}", remedy)
        edit = copy(self)
        edit.truth = painted
        return edit

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        if self.inverts:
            x = encode(process, process.unguided(None), images, times)
        else:
            x = noised(process.sampler.schedule, process.space.encode(images), times[0], process.draw())
        back = decode(process, x, times, process.draw).clamp(-1, 1)
        maps = (images - back).abs().mean(1, keepdim=True)
        maps = maps if self.blur is None else self.blur(maps)
        return EditResult(back[:, None], [images], maps=maps[:, 0])
