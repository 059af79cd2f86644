"""Objectives of few-step models: exact consistency functions and steps, their targets, and what they refuse."""

import pytest
import torch
from torch import nn

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, noised
from diffusion_cli.diffusion.guidance import ClassifierFree
from diffusion_cli.diffusion.objectives import Consistency, ProgressiveDistillation
from diffusion_cli.diffusion.objectives.few_step import same_random_numbers
from diffusion_cli.diffusion.parameterizations import X0, Eps, Score, V
from diffusion_cli.diffusion.schedules import VE, VP, Cosine, EDMSchedule, Linear
from diffusion_cli.diffusion.time_sampling import LogNormal, Stratified, Uniform
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet
from diffusion_cli.samplers import DDIM, integrate
from helpers.few_steps import F64, PROCESSES, Exact, batch, consistent, expected, no_noise, times


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_function_is_consistent_along_the_teachers_path(process):
    """With a perfect teacher the loss is the error of one DDIM step: it falls with the square of the gap."""
    x0, eps = batch()
    t = times(PROCESSES[process][0])
    losses = []
    for q in (16.0, 64.0):
        objective = Consistency(q=q, stages=1, k=0.0, weighting="uniform", guidance_scale=1.0)
        objective.teacher = Exact(process, expected)
        losses.append(objective(Exact(process, consistent), x0, None, t, eps).mean())
    assert losses[1] < losses[0] / 12
    assert losses[1] < 2e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_the_first_target_can_be_the_image(process):
    """Where the gap is the whole time, r = 0: the loss is the distance to x_0, whatever the network predicts there."""
    schedule = PROCESSES[process][0]
    x0, eps = batch()
    t = times(schedule)
    objective = Consistency(q=1.5, b=0.0, stages=1, weighting="uniform")
    assert torch.equal(objective.earlier(schedule, t), torch.zeros_like(t))
    model = Exact(process, expected)
    distance = (model(noised(schedule, x0, t, eps), t).x0 - x0).square().flatten(1).mean(1).sqrt()
    bounded = schedule.log_snr(t) > -10  # the loss leaves out higher noise
    torch.testing.assert_close(objective(model, x0, None, t, eps)[bounded], distance[bounded])


def test_the_gap_shrinks_at_each_stage_and_validation_has_the_last():
    schedule = EDMSchedule()
    t = schedule.time_of(torch.tensor([0.0, -2.0, -6.0], dtype=F64))
    tau = torch.exp(-schedule.log_snr(t) / 2)
    objective = Consistency(q=4.0, k=8.0, b=1.0, stages=3, stage_steps=10)
    for step, exponent in {0: 1, 9: 1, 10: 2, 20: 3, 1000: 3, None: 3}.items():
        objective.step = step
        ratio = 1 - (1 + 8 * torch.sigmoid(-tau)) / 4.0**exponent
        r = objective.earlier(schedule, t)
        found = torch.where(r > 0, torch.exp(-schedule.log_snr(r) / 2), 0.0)
        torch.testing.assert_close(found, (tau * ratio).clamp(min=0))


def test_weights_are_those_of_the_papers():
    schedule = EDMSchedule()
    tau = torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    t, r = schedule.time_of(-2 * tau.log()), schedule.time_of(-2 * (tau / 2).log())
    edm = Consistency(weighting="edm", sigma_data=0.5).weight(schedule, t, r)
    torch.testing.assert_close(edm, (tau**2 + 0.25) / (tau * 0.5) ** 2)
    torch.testing.assert_close(Consistency(weighting="inverse_gap").weight(schedule, t, r), 2 / tau)
    torch.testing.assert_close(
        Consistency(weighting="uniform").weight(schedule, t, r), torch.ones(3, dtype=F64)
    )


def test_pseudo_huber_is_a_square_near_zero_and_a_norm_far_away():
    x0, eps = batch()
    t = torch.full((64,), 0.5, dtype=F64)
    plain, model = Consistency(q=1.5, b=0.0, stages=1, weighting="uniform"), Exact("vp", expected)
    norm = plain(model, x0, None, t, eps)
    flat = Consistency(q=1.5, b=0.0, stages=1, weighting="uniform", huber_c=100.0)(model, x0, None, t, eps)
    torch.testing.assert_close(flat, norm**2 / 200, rtol=1e-4, atol=0)
    sharp = Consistency(q=1.5, b=0.0, stages=1, weighting="uniform", huber_c=1e-4)(model, x0, None, t, eps)
    torch.testing.assert_close(sharp, norm, rtol=1e-3, atol=1e-3)


def test_both_predictions_have_the_same_dropout_masks():
    """At a gap of almost zero the predictions differ by their masks alone."""
    torch.manual_seed(0)
    network = UNet((1, 8, 8), None, channels=8, norm_groups=4, head_channels=8, dropout=0.5)
    for weight in network.parameters():  # blocks are the identity at first, without any dropout
        nn.init.normal_(weight, std=0.1)
    model = Denoiser(network, VP(), V())
    x0, eps = torch.randn(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.3, 0.9, 8, dtype=F64)
    loss = Consistency(q=1e6, stages=1, weighting="uniform")(model, x0, None, t, eps)
    assert loss.max() < 1e-4
    with torch.no_grad():  # other masks make a difference that the bound would show
        one, other = (model(x0, t).x0 for _ in range(2))
    assert (one - other).square().mean().sqrt() > 0.01


def test_targets_have_no_gradient():
    model = Exact("vp", lambda x_t, alpha, sigma: weight * x_t)
    weight = nn.Parameter(torch.tensor(0.7, dtype=F64))
    x0, eps = batch()
    t = torch.full((64,), 0.5, dtype=F64)
    objective = Consistency(q=4.0, k=0.0, stages=1, weighting="uniform")
    r = objective.earlier(VP(), t)
    loss = objective(model, x0, None, t, eps).sum()
    (found,) = torch.autograd.grad(loss, weight)
    x_t, target = noised(VP(), x0, t, eps), 0.7 * noised(VP(), x0, r, eps)
    distance = (weight * x_t - target).square().flatten(1).mean(1).sqrt().sum()
    torch.testing.assert_close(found, torch.autograd.grad(distance, weight)[0])


def test_the_average_gives_the_target_if_it_is_asked_for():
    x0, eps = batch()
    t = torch.full((64,), 0.5, dtype=F64)
    objective = Consistency(q=4.0, k=0.0, stages=1, weighting="uniform", target="ema")
    assert objective.uses_average
    model, objective.average = Exact("vp", expected), Exact("vp", consistent)
    r = objective.earlier(VP(), t)
    target = objective.average(noised(VP(), x0, r, eps), r).x0
    predicted = model(noised(VP(), x0, t, eps), t).x0
    distance = (predicted - target).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(objective(model, x0, None, t, eps), distance)


@pytest.mark.parametrize("process", ["cosine", "vp", "edm", "rectified"])
@pytest.mark.parametrize(("step", "steps"), [(0, 4), (5, 2), (10, 1), (None, 1)])
def test_a_student_without_error_takes_two_steps_of_its_teacher_at_once(process, step, steps):
    """The loss is zero for the student whose DDIM step is the teacher's two, on every step of every stage's grid."""
    schedule = PROCESSES[process][0]
    teacher = Exact(process, expected)
    grid = schedule.grid(2 * steps, "trailing")
    objective = ProgressiveDistillation(steps=4, stage_steps=5)
    objective.step, objective.teacher = step, teacher

    def two_steps(x_t, alpha, sigma):
        """The x_0 with which one DDIM step gives where two of the teacher lead, row by row."""
        found = []
        for row, a, s in zip(x_t, alpha, sigma, strict=True):
            starts = grid[:-1:2]
            k = int((schedule(starts)[1] - s.flatten()[0]).abs().argmin())
            *_, end = integrate(DDIM(schedule), teacher, row[None], grid[2 * k : 2 * k + 3], no_noise)
            alpha_s, sigma_s = schedule(grid[2 * k + 2])
            found.append((end[0] - sigma_s / s * row) / (alpha_s - sigma_s / s * a))
        return torch.stack(found)

    x0, eps = batch()
    t = times(schedule)
    loss = objective(Exact(process, two_steps), x0, None, t, eps)
    assert loss.max() < 1e-8
    assert objective(teacher, x0, None, t, eps).max() > 1e-4


def test_stages_halve_the_steps_and_each_begins_with_a_new_teacher():
    objective = ProgressiveDistillation(steps=8, stage_steps=10)
    assert [step for step in range(60) if objective.renews_teacher(step)] == [0, 10, 20, 30]
    assert [objective.steps >> objective.stage(step) for step in (0, 10, 29, 30, 999, None)] == [
        8,
        4,
        2,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(("step", "scale"), [(0, 3.0), (5, 1.0)])
def test_guidance_is_that_of_the_first_teacher(step, scale):
    schedule, y = VP(), Condition.of(torch.tensor([0, 1, 1, 0]))
    torch.manual_seed(0)
    networks = [
        UNet((1, 8, 8), 2, channels=8, norm_groups=4, head_channels=8, class_conditional=True) for _ in "ab"
    ]
    for network in networks:
        for weight in network.parameters():
            nn.init.normal_(weight, std=0.1)
    teacher, student = (Denoiser(network.double(), schedule, V()) for network in networks)
    x0, eps = torch.randn(2, 4, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    objective = ProgressiveDistillation(steps=4, stage_steps=5, guidance_scale=3.0)
    objective.teacher, objective.step = teacher, step
    start, middle, end = schedule.grid(2 * (4 if step == 0 else 2), "trailing")[:3]
    with torch.no_grad():
        loss = objective(student, x0, y, start.expand(4), eps)
        x_t = noised(schedule, x0, start, eps)
        guided = ClassifierFree(scale=scale)(teacher, y)
        *_, x = integrate(DDIM(schedule), guided, x_t, torch.stack([start, middle, end]), no_noise)
        (alpha_t, sigma_t), (alpha, sigma) = schedule(start), schedule(end)
        target = (x - sigma / sigma_t * x_t) / (alpha - sigma / sigma_t * alpha_t)
        expected_loss = (student(x_t, start, y).x0 - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected_loss)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    "objective", [Consistency(), Consistency(guidance_scale=1.0), ProgressiveDistillation()]
)
def test_the_loss_is_finite_at_every_time(process, objective):
    schedule = PROCESSES[process][0]
    ends = torch.tensor([schedule.t_min, 1.0], dtype=F64)
    t = torch.cat([ends, times(schedule, 62)])
    x0, eps = batch()
    objective.teacher = Exact(process, expected) if objective.has_teacher else None
    assert objective(Exact(process, consistent), x0, None, t, eps).isfinite().all()


@pytest.mark.parametrize("objective", [Consistency(), ProgressiveDistillation()])
def test_a_variance_head_is_refused(objective):
    network = UNet((1, 8, 8), None, channels=8, norm_groups=4, head_channels=8, learn_variance=True)
    with pytest.raises(UsageError, match=r"model.learn_variance=true: this objective does not train"):
        objective.check(Denoiser(network, Linear(), V()), Uniform())


def test_what_cannot_be_consistent_or_distilled_is_refused():
    def model(parameterization, schedule):
        return Denoiser(nn.Identity(), schedule, parameterization)

    for schedule, parameterization in PROCESSES.values():
        Consistency().check(model(parameterization, schedule), Uniform())
        ProgressiveDistillation().check(model(parameterization, schedule), Uniform())
    with pytest.raises(UsageError, match=r"parameterization=x0: the prediction of a clean image is not"):
        Consistency().check(model(X0(), VP()), Uniform())
    # A student keeps the parameterization of its teacher.
    remedies = {Consistency(): "use", ProgressiveDistillation(): "distil a run with"}
    for objective, remedy in remedies.items():
        with pytest.raises(
            UsageError, match=f"parameterization=eps: multiplies .* by 160 .* {remedy} parameterization=v"
        ):
            objective.check(model(Eps(), Cosine()), Uniform())
        with pytest.raises(
            UsageError, match=f"parameterization=score: multiplies .* {remedy} parameterization=edm"
        ):
            objective.check(model(Score(), VE()), Uniform())
        scale = rf"v: has another scale where .* is 6.4e\+03 .*; {remedy} parameterization=edm"
        with pytest.raises(UsageError, match=scale):
            objective.check(model(V(), EDMSchedule()), Uniform())
    with pytest.raises(
        UsageError, match=r"time_sampling=log_normal: the step of the grid is drawn uniformly"
    ):
        ProgressiveDistillation().check(model(V(), VP()), LogNormal(mean=0.0, std=1.0))
    short = Cosine(num_timesteps=8)
    ProgressiveDistillation(steps=4).check(model(V(), short), Stratified())
    with pytest.raises(UsageError, match=r"objective.steps=8: the first teacher has 16 steps, more than"):
        ProgressiveDistillation(steps=8).check(model(V(), short), Uniform())
    with pytest.raises(UsageError, match=r"objective.q=4.0: the power q\^stages with stages=26 is above 1e6"):
        Consistency(stages=26, weighting="inverse_gap")
    with pytest.raises(UsageError, match=r"objective.steps=6: is no power of two; use for example 8"):
        ProgressiveDistillation(steps=6)


def test_the_generator_of_an_apple_gpu_is_restored_too(monkeypatch):
    state = {"mps": torch.tensor([1])}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device="mps": state["mps"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new, device="mps": state.update(mps=new))
    with same_random_numbers(torch.device("mps")):
        state["mps"], first = torch.tensor([2]), torch.rand(1)
    assert state["mps"] == 1
    assert torch.equal(torch.rand(1), first)
