"""The distributions of training times."""

import math

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion import schedules as processes
from diffusion_cli.diffusion.time_sampling import (
    LogitNormal,
    LogNormal,
    LossSecondMoment,
    Stratified,
    Uniform,
)
from helpers.objectives import SCHEDULES, process

F64 = torch.float64


def test_stratified_times_are_uniform_with_less_noise(schedules):
    schedule = schedules["vp"]
    generator = torch.Generator().manual_seed(0)
    means = {"plain": [], "stratified": []}
    for _ in range(400):
        u = torch.rand(64, generator=generator)
        means["plain"].append(Uniform()(schedule, u).t.mean())
        means["stratified"].append(Stratified()(schedule, u).t.mean())
    assert abs(torch.stack(means["stratified"]).mean() - 0.5) < 1e-3
    assert torch.stack(means["stratified"]).std() < torch.stack(means["plain"]).std() / 30


def test_stratified_times_lie_anywhere_in_their_own_interval(schedules):
    u = torch.tensor([0.0, 0.25, 0.75, 0.5], dtype=F64)
    draw = Stratified()(schedules["rectified"], u)
    quantile = torch.tensor([0.0, 1.25, 2.75, 3.5], dtype=F64) / 4
    torch.testing.assert_close(draw.quantile, quantile)
    torch.testing.assert_close(draw.t, 1e-5 + (1 - 1e-5) * quantile)
    assert torch.equal(draw.weight, torch.ones_like(u))


def test_log_normal_times_equal_edm(reference, agree):
    arrays, schedule = reference("losses"), processes.EDMSchedule(sigma_min=1e-4, sigma_max=1e3)
    u = torch.special.ndtr(arrays["edm_loss_z"])
    draw = LogNormal(mean=-1.2, std=1.2)(schedule, u)
    agree("losses/edm_loss_sigma", schedule(draw.t)[1], arrays["edm_loss_sigma"], 1e-9, relative=True)
    assert torch.equal(draw.t.argsort(), draw.quantile.argsort())


def test_log_normal_times_serve_every_process(schedules):
    u = torch.rand(20_000, dtype=F64, generator=torch.Generator().manual_seed(0))
    for tag in SCHEDULES:
        t = LogNormal(mean=0.5, std=0.8)(schedules[tag], u).t
        assert t.min() >= schedules[tag].t_min
        ratio = -schedules[tag].log_snr(t) / 2
        assert abs(ratio.mean() - 0.5) < 0.02
        assert abs(ratio.std() - 0.8) < 0.02


def test_logit_normal_times_have_their_distribution(schedules):
    u = torch.rand(20_000, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = LogitNormal(mean=0.3, std=1.1)(schedules["rectified"], u).t
    logit = torch.logit(t)
    assert abs(logit.mean() - 0.3) < 0.03
    assert abs(logit.std() - 1.1) < 0.03


def test_importance_sampling_is_unbiased_and_goes_where_the_loss_is(schedules):
    schedule = schedules["linear"]
    times = LossSecondMoment(bins=50, memory=10, uniform_share=0.001)
    loss = lambda t: 1 + 99 * (t > 0.9)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    first = times(schedule, torch.rand(1000, generator=generator))
    assert torch.equal(first.weight, torch.ones(1000))
    for _ in range(20):
        draw = times(schedule, torch.rand(1000, generator=generator))
        times.observe(draw.bins, loss(draw.t))
    draw = times(schedule, torch.rand(100_000, generator=generator))
    # In proportion to the loss: 10 percent of the times have 100/10.9 of the mean.
    assert abs((draw.t > 0.9).double().mean() - 10 / 10.9) < 0.01
    assert abs((draw.weight * loss(draw.t)).mean() - 10.9) < 0.05
    assert (draw.weight * loss(draw.t)).std() < 1
    assert abs(torch.quantile(draw.quantile.double(), 0.5) - 0.5) < 0.01
    again = LossSecondMoment(bins=50, memory=10, uniform_share=0.001)
    again.load_state_dict(times.state_dict())
    assert torch.equal(again.probabilities(), times.probabilities())


def test_bins_remember_their_last_losses():
    times = LossSecondMoment(bins=2, memory=3, uniform_share=0.001)
    times.observe(torch.tensor([0, 0, 1, 0, 0]), torch.tensor([1.0, 2.0, 9.0, 3.0, 4.0]))
    assert sorted(times.history[0].tolist()) == [2.0, 3.0, 4.0]
    times.observe(torch.tensor([1, 1]), torch.tensor([9.0, 9.0]))
    p = times.probabilities()
    ratio = math.sqrt((4 + 9 + 16) / 3) / 9
    torch.testing.assert_close(p[0] / p[1], torch.tensor(ratio, dtype=F64), rtol=1e-2, atol=0)


def test_a_share_of_the_times_stays_uniform():
    times = LossSecondMoment(bins=4, memory=2, uniform_share=0.2)
    uniform = torch.full((4,), 0.25, dtype=F64)
    times.observe(torch.tensor([1, 1, 2, 3, 3]), torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]))
    torch.testing.assert_close(times.probabilities(), uniform)  # until all bins are full
    times.observe(torch.tensor([0, 0, 2]), torch.tensor([0.0, 0.0, 2.0]))
    learned = torch.tensor([0.0, 0.25, 0.5, 0.25], dtype=F64)
    torch.testing.assert_close(times.probabilities(), 0.8 * learned + 0.2 * uniform)


@pytest.mark.parametrize(
    ("tag", "bins"), [("process 4000", 4000), ("linear", 1000), ("edm", 100), ("vp", 64)]
)
def test_every_bin_fills_and_sampling_by_importance_begins(schedules, tag, bins):
    schedule = process("cosine", 4000) if tag == "process 4000" else schedules[tag]
    times = LossSecondMoment(bins=bins, memory=2, uniform_share=0.001)
    # Each bin is met before importance sampling can begin, which is when all have seen two.
    for u in ((torch.arange(bins, dtype=F64) + 0.5) / bins,) * 2:
        for part in u.split(1000):
            draw = times(schedule, part)
            times.observe(draw.bins, 1 + draw.quantile)
    assert (times.count == 2).all()
    assert times.probabilities()[-1] > 1.5 * times.probabilities()[0]


def test_more_bins_than_timesteps_are_refused():
    times = LossSecondMoment(bins=101, memory=2, uniform_share=0.001)
    with pytest.raises(ValueError, match=r"time_sampling.bins=101: .*use 100"):
        times.check(process("cosine", 100))


@pytest.mark.parametrize("file", sorted(CONF.glob("time_sampling/*.yaml")), ids=lambda file: file.stem)
def test_every_distribution_stays_within_every_process(schedules, file):
    times = build(yaml.safe_load(file.read_text()))
    for tag in SCHEDULES:
        u = torch.cat([torch.zeros(1), torch.rand(200), torch.tensor([1 - 2**-24])])
        if file.stem == "loss_second_moment":
            times = LossSecondMoment(bins=50, memory=2, uniform_share=0.1)
        t, weight, quantile, _ = times(schedules[tag], u)
        assert t.dtype == F64
        assert t.min() >= schedules[tag].t_min
        assert t.max() <= 1
        assert weight.min() > 0
        assert 0 <= quantile.min() <= quantile.max() <= 1
