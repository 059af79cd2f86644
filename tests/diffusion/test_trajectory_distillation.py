"""Trajectory distillation: its targets, and the paths that the optimizer steps of a batch share."""

import pytest
import torch
from torch import nn

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.guidance import ClassifierFree
from diffusion_cli.diffusion.objectives import TrajectoryDistillation
from diffusion_cli.diffusion.parameterizations import Eps, V
from diffusion_cli.diffusion.schedules import VP, Cosine
from diffusion_cli.diffusion.time_sampling import LogNormal, Stratified, Uniform
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet
from diffusion_cli.samplers import UniPC, integrate
from helpers.few_steps import F64, MEAN, PROCESSES, STD, Exact, batch, consistent, expected, no_noise, times


def distillation(teacher: Denoiser, **settings) -> TrajectoryDistillation:
    """The objective with a teacher and the solver of training."""
    objective = TrajectoryDistillation(**settings)
    sampler = UniPC(teacher.schedule)
    objective.teacher = teacher
    objective.solver = lambda denoise, x, t: integrate(sampler, denoise, x, t, no_noise)
    return objective


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_function_is_the_end_of_the_teachers_paths(process):
    """With a perfect teacher, the loss of the exact consistency function is the error of the solver."""
    x0, eps = batch()
    t = times(PROCESSES[process][0])
    teacher, student = Exact(process, expected), Exact(process, consistent)
    rough, fine = (
        distillation(teacher, steps=steps, huber_c=0.0)(student, x0, None, t, eps).mean() for steps in (6, 60)
    )
    assert fine < rough / 10
    assert fine < 5e-3
    assert distillation(teacher, steps=60, huber_c=0.0)(teacher, x0, None, t, eps).mean() > 20 * fine


def test_the_images_of_the_data_have_no_effect():
    x0, eps = batch()
    t = times(VP())
    objective = distillation(Exact("vp", expected))
    student = Exact("vp", expected)
    losses = [objective(student, images, None, t, eps) for images in (x0, torch.zeros_like(x0))]
    assert torch.equal(*losses)


def test_each_time_takes_the_state_of_its_share_of_the_path():
    """The first tenth of the times gets the noise itself, the next the state after one step, and so on."""
    seen = []

    class Watched(Exact):
        def forward(self, x_t, t, y=None):
            seen.append((x_t, t))
            return super().forward(x_t, t, y)

    _, eps = batch(10)
    teacher, student = Exact("vp", expected), Watched("vp", expected)
    objective = distillation(teacher, steps=10)
    objective(student, eps, None, (torch.arange(10, dtype=F64) + 0.5) / 10, eps)
    x_t, t = seen[0]
    grid = objective.grid(VP(), 0.0)
    torch.testing.assert_close(t, grid[:-1].flip(0))
    assert torch.equal(x_t[9], VP()(grid[0])[1] * eps[9])
    states = [*integrate(UniPC(VP()), teacher, VP()(grid[0])[1] * eps, grid, no_noise)]
    torch.testing.assert_close(x_t[4], states[4][4])


@pytest.mark.parametrize("process", PROCESSES)
def test_paths_begin_at_the_noisiest_time_and_differ_from_batch_to_batch(process):
    schedule = PROCESSES[process][0]
    objective = TrajectoryDistillation(steps=8)
    grids = torch.stack([objective.grid(schedule, shift) for shift in (-0.5, 0.0, 0.49)])
    assert (grids.diff(dim=1) < 0).all()
    assert torch.equal(grids[:, 0], schedule.with_signal(torch.ones(3, dtype=F64)))
    assert (grids[:, -2] > schedule.t_min).all()
    assert (grids[:, 1:-1].diff(dim=0) > 0).all()


def test_the_steps_of_a_batch_share_its_paths():
    class Counted(Exact):
        calls = 0

        def forward(self, x_t, t, y=None):
            self.calls += 1
            return super().forward(x_t, t, y)

    teacher, student = Counted("vp", expected), Exact("vp", expected)
    objective = distillation(teacher, steps=4)
    parts = [batch(8, seed)[1] for seed in (0, 1)]
    t = times(VP(), 8)
    losses = []
    for objective.step in range(8):
        for objective.part in (0, 1):
            losses.append(objective(student, parts[0], None, t, parts[objective.part]))
    assert teacher.calls == 2 * 2 * 4  # two batches of two parts
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])  # another part
    assert not torch.equal(losses[0], losses[8])  # other times of the next batch
    objective.step = None
    validation = objective(student, parts[0], None, t, parts[1])
    objective.step, objective.part = 7, 1
    assert torch.equal(losses[-1], objective(student, parts[0], None, t, parts[1]))
    assert not torch.equal(validation, losses[-1])


def test_a_run_that_continues_within_a_batch_has_the_same_targets():
    x0, eps = batch(8)
    t = times(VP(), 8)
    losses = []
    for first in (4, 6):
        objective = distillation(Exact("vp", expected), steps=4)
        for objective.step in range(first, 8):
            losses.append(objective(Exact("vp", expected), x0, None, t, eps))
    assert torch.equal(losses[3], losses[5])


def test_paths_are_those_of_the_guided_teacher():
    torch.manual_seed(0)
    network = UNet((1, 8, 8), 2, channels=8, norm_groups=4, head_channels=8, class_conditional=True)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    teacher, y = Denoiser(network.double(), VP(), V()), Condition.of(torch.tensor([0, 1, 1, 0]))
    eps = torch.randn(4, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    objective = distillation(teacher, steps=4, guidance_scale=3.0, huber_c=0.0)
    t = torch.ones(4, dtype=F64)
    with torch.no_grad():
        loss = objective(teacher, eps, y, t, eps)
        grid = objective.grid(VP(), 0.0)
        noise = VP()(grid[0])[1] * eps
        *_, end = integrate(UniPC(VP()), ClassifierFree(scale=3.0)(teacher, y), noise, grid, no_noise)
        distance = (teacher(noise, grid[0], y).x0 - end).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(loss, distance)


def test_a_trained_student_samples_the_gaussian_in_one_call():
    """A student with a gain for each of the noise levels learns the exact gain of the first: STD / sigma."""

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.2, dtype=F64))

        def forward(self, x, c_noise, y):
            return -(MEAN + self.gain * x)  # v = -x_0 where alpha is almost 0

    network = Gain()
    student = Denoiser(network, Cosine(), V())
    objective = distillation(Exact("cosine", expected), steps=40)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for step in range(100):
        eps = batch(64, step)[1]
        loss = objective(student, eps, None, torch.ones(64, dtype=F64), eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(network.gain.item() - STD) < 0.03


def test_what_has_no_uniform_state_or_unit_gain_is_refused():
    objective = TrajectoryDistillation()
    for schedule, parameterization in PROCESSES.values():
        for of in (Uniform(), Stratified()):
            objective.check(Denoiser(nn.Identity(), schedule, parameterization), of)
    with pytest.raises(
        UsageError, match=r"time_sampling=log_normal: the state of a path is drawn uniformly; use uniform"
    ):
        objective.check(Denoiser(nn.Identity(), VP(), V()), LogNormal(mean=0.0, std=1.0))
    with pytest.raises(
        UsageError,
        match=r"parameterization=eps: multiplies .* by 160 .*; distil a run with parameterization=v",
    ):
        objective.check(Denoiser(nn.Identity(), Cosine(), Eps()), Uniform())
    learned = UNet((1, 8, 8), None, channels=8, norm_groups=4, head_channels=8, learn_variance=True)
    with pytest.raises(UsageError, match=r"learn_variance=true: .* variance head; distil a run without one"):
        objective.check(Denoiser(learned, VP(), V()), Uniform())
