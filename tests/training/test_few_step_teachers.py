"""Networks of the targets of few-step objectives, and strategies that do not keep them whole."""

import pytest

from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.objectives import Consistency, FewStep, ProgressiveDistillation
from diffusion_cli.diffusion.parameterizations import V
from diffusion_cli.diffusion.schedules import VP
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet
from diffusion_cli.training.ema import EMA, ExponentialAverage
from diffusion_cli.training.teacher import few_step_callbacks


def callbacks(objective: FewStep, *, sharded: bool = False, offload: bool = False) -> int:
    """The number of callbacks of an objective."""
    network = UNet((1, 4, 4), None, channels=8, norm_groups=4, head_channels=8)
    ema = EMA(network, ExponentialAverage(0.9, warm_up=False), offload)
    return len(few_step_callbacks(objective, Denoiser(network, VP(), V()), ema, sharded=sharded))


def test_objectives_with_other_networks_are_refused_where_weights_are_sharded_or_elsewhere():
    average = Consistency(target="ema")
    for objective in (ProgressiveDistillation(), Consistency(guidance_scale=1.0), average):
        with pytest.raises(UsageError, match=r"trainer.strategy=fsdp: .* need whole weights in each process"):
            callbacks(objective, sharded=True)
    with pytest.raises(
        UsageError, match=r"trainer.offload_ema=true: objective.target=ema needs the averaged"
    ):
        callbacks(average, offload=True)
    assert callbacks(ProgressiveDistillation(), offload=True) == 1
    assert callbacks(Consistency(), sharded=True, offload=True) == callbacks(average) == 0
