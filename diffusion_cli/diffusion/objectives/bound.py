"""The variational bound of discrete processes as an objective."""

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, noised
from diffusion_cli.diffusion.objectives.base import Dropout, Objective, require_uniform
from diffusion_cli.diffusion.posterior import bound_term
from diffusion_cli.diffusion.schedules import Discrete
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError, option_name


class VLB(Objective[Denoiser]):
    """T times a term of the variational bound, in bits per dimension: L_vlb (Nichol and Dhariwal 2021, Eq. 4).

    Its mean over uniform times is the bound without the constant prior term.

    Args:
        variance: variance of the reverse process.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.
    """

    compares_to_zero = False

    def __init__(
        self,
        *,
        variance: Literal["learned", "small", "large"] = "small",
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        self.variance: Literal["learned", "small", "large"] = variance
        self.label_dropout, self.single_dropout = label_dropout, single_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        _check_bound(self, model, times)
        if model.learns_variance != (self.variance == "learned"):
            raise UsageError(
                "objective.variance",
                self.variance,
                f"needs model.learn_variance={str(self.variance == 'learned').lower()}",
                "change one of them",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        assert isinstance(schedule, Discrete)
        x_t = noised(schedule, x0, t, eps)
        return schedule.num_timesteps * bound_term(schedule, model(x_t, t, y), x0, x_t, t, self.variance)


class Hybrid(Objective[Denoiser]):
    """`L_simple + vlb_weight L_vlb`, where the bound trains only the variance (Nichol and Dhariwal 2021, Eq. 16).

    Args:
        vlb_weight: weight of the bound.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.
    """

    def __init__(
        self,
        *,
        vlb_weight: PositiveFloat = 0.001,
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        self.vlb_weight, self.label_dropout, self.single_dropout = vlb_weight, label_dropout, single_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        _check_bound(self, model, times)
        if not model.learns_variance:
            raise UsageError(
                "objective",
                "hybrid",
                "trains the variance head",
                "set model.learn_variance=true, or use simple",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        assert isinstance(schedule, Discrete)
        x_t = noised(schedule, x0, t, eps)
        prediction = model(x_t, t, y)
        simple = (prediction.eps - eps).square().flatten(1).mean(1)
        frozen = prediction.detach()._replace(variance=prediction.variance)
        bound = bound_term(schedule, frozen, x0, x_t, t, "learned")
        return simple + self.vlb_weight * schedule.num_timesteps * bound


def _check_bound(objective: Objective, denoiser: Denoiser, times: Times) -> None:
    if not isinstance(denoiser.schedule, Discrete):
        raise UsageError(
            "objective",
            option_name(type(objective).__name__),
            f"the bound is a sum over timesteps, but the {denoiser.schedule.name} schedule is continuous",
            "use linear, scaled_linear, cosine or sigmoid",
        )
    require_uniform(
        times, "the bound is a mean over uniform timesteps", "use uniform, stratified or loss_second_moment"
    )
