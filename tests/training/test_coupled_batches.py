"""The noise of a training step and of validation with `coupling=ot`."""

from types import SimpleNamespace

import torch

from diffusion_cli.conditions import Condition
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.coupling import Coupling, optimal_noise
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.networks import UNet
from diffusion_cli.training.module import DenoisingModule
from helpers import checkpoint_info

COUNT = 20


class NoiseRecorder(Simple):
    """An objective that keeps the noise it gets."""

    eps: torch.Tensor

    def __call__(self, model, x0, y, t, eps):
        self.eps = eps
        return super().__call__(model, x0, y, t, eps)


def module_of(num_classes: int | None, objective: Simple, coupling: Coupling = "ot") -> DenoisingModule:
    network = UNet(
        (1, 4, 4), num_classes, channels=8, norm_groups=4, head_channels=8,
        class_conditional=num_classes is not None,
    )  # fmt: skip
    return DenoisingModule(
        Denoiser(network, Cosine(), Eps()), objective, Uniform(), Pixels((1, 4, 4)), None,  # pyright: ignore
        seed=0, info=checkpoint_info(), coupling=coupling,
    )  # fmt: skip


def images() -> torch.Tensor:
    return torch.randn(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def noise(num_classes: int | None, condition: Condition | None) -> torch.Tensor:
    """The noise of a step on the same images, with a network of as many classes."""
    objective = NoiseRecorder(label_dropout=0.0)
    module = module_of(num_classes, objective)
    place = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    module.trainer = SimpleNamespace(**place)  # pyright: ignore[reportAttributeAccessIssue]
    module.training_step(Batch(0, images(), condition, torch.arange(COUNT)), 0)
    return objective.eps


def test_only_conditions_that_the_network_reads_keep_noise_apart():
    labels = Condition({"label": torch.arange(COUNT) % 10})
    plain = noise(None, None)
    assert torch.equal(noise(None, labels), plain)
    assert not torch.equal(noise(10, labels), plain)


def test_validation_has_coupled_noise_too():
    labels = Condition({"label": torch.arange(COUNT) % 2})

    def val_noise(num_classes: int | None, coupling: Coupling) -> torch.Tensor:
        module = module_of(num_classes, Simple(label_dropout=0.0), coupling)
        batch = Batch(0, images(), labels, torch.arange(COUNT))
        ((_, _, eps, _),) = module.at_levels([batch])
        return eps

    plain = val_noise(10, "none")
    assert torch.equal(val_noise(10, "ot"), optimal_noise(images(), plain, labels))
    assert torch.equal(val_noise(None, "ot"), optimal_noise(images(), plain, None))
    distances = [
        (images() - eps).square().sum() for eps in (val_noise(None, "ot"), val_noise(10, "ot"), plain)
    ]
    assert distances[0] < distances[1] < distances[2]
