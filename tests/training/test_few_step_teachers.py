"""Networks of the targets of few-step objectives, and strategies that do not keep them whole."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffusion_cli.commands.train_callbacks import validation_batches
from diffusion_cli.commands.train_setup import set_up
from diffusion_cli.commands.train_tasks import DenoisingTask
from diffusion_cli.data import Batch, spread
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import (
    Consistency,
    FewStep,
    ProgressiveDistillation,
    TrajectoryDistillation,
)
from diffusion_cli.diffusion.parameterizations import V
from diffusion_cli.diffusion.schedules import VP
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet
from diffusion_cli.training.ema import EMA, ExponentialAverage
from diffusion_cli.training.module import DenoisingModule
from diffusion_cli.training.teacher import few_step_callbacks
from helpers import TINY, checkpoint_info
from helpers.recipes import train_config


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


def test_a_trial_after_a_step_has_paths_of_its_own():
    """The search for parts that fit into memory tries other numbers of images."""
    network = UNet((1, 4, 4), None, channels=8, norm_groups=4, head_channels=8)
    model, objective = Denoiser(network, VP(), V()), TrajectoryDistillation(steps=2)
    few_step_callbacks(objective, model, EMA(network, ExponentialAverage(0.9, warm_up=False)), sharded=False)
    module = DenoisingModule(
        model, objective, Uniform(), Pixels((1, 4, 4)), None,  # pyright: ignore
        seed=0, info=checkpoint_info((1, 4, 4)),
    )  # fmt: skip
    place = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    module.trainer = SimpleNamespace(**place)  # pyright: ignore[reportAttributeAccessIssue]
    module.training_step(Batch(0, torch.zeros(4, 1, 4, 4), None, torch.arange(4)), 0)
    for count in (2, 5):
        assert module.trial(torch.zeros(count, 1, 4, 4)).isfinite()


def test_a_validation_solves_the_paths_of_some_images_that_are_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(TrajectoryDistillation, "most_val_images", 40)
    config = train_config(*TINY[1:], f"output_dir={tmp_path}")
    setup = set_up(config, tmp_path, None)
    assert isinstance(setup.task, DenoisingTask)
    few = replace(setup, task=setup.task._replace(objective=TrajectoryDistillation()))
    whole, some = (
        torch.cat([each.index for each in validation_batches(config, part)(0)]) for part in (setup, few)
    )
    assert whole.tolist() == [*range(len(setup.val_images))]
    assert some.tolist() == spread(len(setup.val_images), 40).tolist()
