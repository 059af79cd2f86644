"""Uncertainty weighting: the learned variance of the loss at each noise level."""

import pytest
import torch

from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import EDM2Objective, EDMObjective
from diffusion_cli.diffusion.parameterizations import EDMPreconditioning
from diffusion_cli.diffusion.schedules import Cosine, EDMSchedule, Rectified
from diffusion_cli.diffusion.time_sampling import LogNormal
from diffusion_cli.training.module import DenoisingModule
from diffusion_cli.training.optimizers import Muon
from helpers.objectives import Told, times

F64 = torch.float64


def with_u(objective: EDM2Objective, scale: float) -> EDM2Objective:
    """The objective, with random weights of the log variance of this standard deviation."""
    torch.nn.init.normal_(objective.log_variance.readout, std=scale)
    return objective


@pytest.mark.parametrize("schedule", [EDMSchedule(), Cosine(zero_terminal_snr=True), Rectified()])
def test_the_optimum_is_the_log_of_the_mean_loss_at_each_noise_level(schedule):
    """For losses with known means, also at noise levels without any signal."""
    objective, t = EDM2Objective(), times(schedule, 7)
    spread = torch.linspace(0.5, 1.5, 11, dtype=F64)
    mean = torch.tensor([0.01, 0.05, 0.3, 0.9, 1.0, 0.7, 0.2], dtype=F64)
    losses, levels = (mean[:, None] * spread).flatten(), t.repeat_interleave(11)
    optimizer = torch.optim.LBFGS(objective.log_variance.parameters(), max_iter=300, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        total = objective.minimized(losses, schedule, levels).mean()
        total.backward()
        return total

    optimizer.step(closure)
    zero = torch.zeros(7, dtype=F64)
    u = objective.minimized(zero, schedule, t)
    torch.testing.assert_close(u, mean.log(), rtol=0, atol=0.02, check_dtype=False)
    assert closure().item() == pytest.approx((1 + mean.log()).mean().item(), abs=1e-3)
    gradient = objective.log_variance.readout.grad
    assert gradient is not None
    assert gradient.abs().max() < 1e-3


def test_without_uncertainty_the_loss_is_that_of_edm():
    schedule = EDMSchedule()
    denoiser = Denoiser(Told(lambda x, c: 0.3 * x), schedule, EDMPreconditioning())
    x0, eps = torch.rand(2, 7, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) - 0.5
    t = times(schedule)
    edm = EDMObjective()(denoiser, x0, None, t, eps)
    objective = EDM2Objective()
    torch.testing.assert_close(objective.minimized(edm, schedule, t), edm, rtol=0, atol=0)
    with_u(objective, 3.0)
    torch.testing.assert_close(objective(denoiser, x0, None, t, eps), edm, rtol=0, atol=0)
    assert (objective.minimized(edm, schedule, t) - edm).abs().min() > 1e-3


def test_validation_leaves_the_learned_variance_out():
    batch = Batch(0, torch.rand(8, 1, 4, 4) - 0.5, None, torch.arange(8))

    def losses(objective):
        model = Denoiser(Told(lambda x, c: 0.3 * x), EDMSchedule(), EDMPreconditioning())
        module = DenoisingModule(model, objective, LogNormal(), Pixels((1, 4, 4)), None, seed=0, info=None)  # pyright: ignore
        return torch.cat([*module.val_losses(model, [batch])])

    assert torch.equal(losses(with_u(EDM2Objective(), 3.0)), losses(EDMObjective()))


def test_modules_train_and_store_the_learned_variance_beside_the_model():
    network = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    model = Denoiser(network, EDMSchedule(), EDMPreconditioning())
    objective = EDM2Objective()
    module = DenoisingModule(model, objective, LogNormal(), Pixels((1, 4, 4)), None, seed=0, info=None)  # pyright: ignore
    assert {name for name in module.state_dict() if not name.startswith("model.")} == {
        "learned.readout", "learned.features.frequencies", "learned.features.phases",
    }  # fmt: skip
    assert [*model.state_dict()] == [f"network.{name}" for name in network.state_dict()]
    matrices, others = (group["params"] for group in Muon.parameter_groups(module))
    assert [id(weight) for weight in matrices] == [id(network[1].weight)]
    assert any(weight is objective.log_variance.readout for weight in others)


def test_networks_have_the_same_first_weights_with_every_objective():
    torch.manual_seed(0)
    EDM2Objective()
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
