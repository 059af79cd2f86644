"""Parameterizations and weightings against diffusers and EDM."""

import pytest
import torch
from torch import nn

from diffusion_cli.diffusion import parameterizations as maps
from diffusion_cli.diffusion import schedules as processes
from diffusion_cli.diffusion.denoiser import Denoiser, noised
from diffusion_cli.diffusion.objectives import EDMObjective, Likelihood, MinSNR, Simple, Target
from diffusion_cli.diffusion.parameterizations import X0, Eps, Flow, Parameterization, Score, V
from diffusion_cli.diffusion.schedules import VP, Linear
from helpers.objectives import SCHEDULES, Told, column, times

F64 = torch.float64
MAPS: dict[str, Parameterization] = {
    "eps": Eps(),
    "x0": X0(),
    "v": V(),
    "score": Score(),
    "flow": Flow(),
    "edm": maps.EDMPreconditioning(sigma_data=0.5),
}
NO_SIGNAL = ("zero_snr", "rectified")


# --- Parameterizations ------------------------------------------------------------


@pytest.mark.parametrize("tag", SCHEDULES)
@pytest.mark.parametrize("name", MAPS)
def test_the_true_output_gives_back_image_and_noise(schedules, name, tag):
    schedule = schedules[tag]
    if name in ("eps", "score") and tag in NO_SIGNAL:
        with pytest.raises(ValueError, match=f"parameterization={name}: .*alpha is 0 at t = 1.*use v, x0"):
            Denoiser(nn.Identity(), schedule, MAPS[name])
        return
    t = times(schedule)
    x0, eps = torch.randn(2, len(t), 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    x_t = noised(schedule, x0, t, eps)
    c_skip, c_out, c_in, c_noise = MAPS[name](schedule, t)

    def answer(x, told):
        torch.testing.assert_close(x, column(c_in) * x_t)
        torch.testing.assert_close(told, c_noise)
        return (x0 - column(c_skip) * x_t) / column(c_out)

    prediction = Denoiser(Told(answer), schedule, MAPS[name])(x_t, t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-8)
    _, sigma = schedule(t)
    # Where sigma is small the target above has lost what eps needs; its own coefficients have not.
    torch.testing.assert_close(column(sigma) * prediction.eps, column(sigma) * eps, rtol=0, atol=1e-8)
    torch.testing.assert_close(prediction.score, -prediction.eps / column(sigma))


def test_outputs_mean_what_their_papers_say(schedules):
    schedule = schedules["vp"]
    t = times(schedule)
    x0, eps = torch.randn(2, len(t), 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (column(level) for level in schedule(t))
    d_alpha, d_sigma = (column(level) for level in schedule.derivatives(t))
    meaning = {
        "eps": eps, "x0": x0, "score": -eps / sigma, "v": alpha * eps - sigma * x0,
        "flow": d_alpha * x0 + d_sigma * eps,
    }  # fmt: skip
    for name, expected in meaning.items():
        c_skip, c_out, _, _ = (column(value) for value in MAPS[name](schedule, t))
        target = (1 - alpha * c_skip) / c_out * x0 - sigma * c_skip / c_out * eps
        torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)


def test_v_and_eps_targets_equal_diffusers(reference, agree):
    arrays = reference("losses")
    schedule = Linear()
    t = (arrays["t"].double() + 1) / 1000
    x_t, eps = arrays["x_t"], arrays["eps_pred"]
    alpha, sigma = (column(level) for level in schedule(t))
    told = Denoiser(Told(lambda x, c: eps), schedule, Eps())(x_t, t)
    agree("losses/x0_from_eps", told.x0, arrays["x0_from_eps"], 1e-10)
    agree("losses/v_from_eps", alpha * told.eps - sigma * told.x0, arrays["v_from_eps"], 1e-10)
    x0, noise = arrays["x0_target"], arrays["eps_target"]
    agree("losses/v_target", alpha * noise - sigma * x0, arrays["v_target"], 1e-12)
    loss = Simple(label_dropout=0.0)(Denoiser(Told(lambda x, c: eps), schedule, Eps()), x0, None, t, noise)
    agree("losses/mse_eps", loss, arrays["mse_eps"], 1e-12)
    v = Denoiser(Told(lambda x, c: arrays["v_from_eps"]), schedule, V())
    agree(
        "losses/mse_v",
        Target(label_dropout=0.0)(v, x0, None, t, noise),
        arrays["mse_v"],
        1e-10,
    )


def test_edm_map_equals_edm(reference, agree):
    arrays = reference("losses")
    sigma = arrays["edm_sigma"]
    schedule = processes.EDMSchedule(sigma_min=1e-3, sigma_max=1e4)
    t = schedule.time_of(-2 * sigma.log())
    for sigma_data in (0.5, 0.25):
        for key, mine in maps.EDMPreconditioning(sigma_data=sigma_data)(schedule, t)._asdict().items():
            name = f"EDMPrecond_sd{sigma_data}_{key}"
            agree(f"losses/{name}", mine, arrays[name], 1e-12 * arrays[name].abs().max().item())
    vp = VP()
    inside = sigma < vp(torch.ones(1, dtype=F64))[1] / vp(torch.ones(1, dtype=F64))[0]
    t = vp.time_of(-2 * sigma[inside].log())
    alpha, _ = vp(t)
    c_skip, c_out, c_in, c_noise = Eps()(vp, t)
    # Theirs acts on x / alpha, ours on x.
    agree("losses/VPPrecond_c_skip", c_skip * alpha, arrays["VPPrecond_c_skip"][inside], 1e-12)
    agree("losses/VPPrecond_c_out", c_out, arrays["VPPrecond_c_out"][inside], 1e-12, relative=True)
    agree("losses/VPPrecond_c_in", c_in * alpha, arrays["VPPrecond_c_in"][inside], 1e-12, relative=True)
    agree("losses/VPPrecond_c_noise", c_noise, arrays["VPPrecond_c_noise"][inside], 1e-9)


# --- Weightings ------------------------------------------------------------


def test_weights_equal_diffusers_and_edm(reference, agree):
    arrays = reference("losses")
    schedule = Linear()
    t = torch.arange(1, 1001, dtype=F64) / 1000
    agree("losses/snr_all", torch.exp(schedule.log_snr(t)), arrays["snr_all"], 1e-11, relative=True)
    for gamma in (5, 1):
        weight = MinSNR(gamma=gamma, label_dropout=0.0).weight(schedule, t)
        for name in ("eps", "x0", "v"):
            mine = weight * MAPS[name](schedule, t).c_out ** 2
            agree(f"losses/minsnr{gamma}_{name}", mine, arrays[f"minsnr{gamma}_{name}"], 1e-11, relative=True)
    sigma = arrays["edm_loss_sigma"]
    edm = processes.EDMSchedule(sigma_min=1e-3, sigma_max=1e4)
    mine = EDMObjective(sigma_data=0.5, label_dropout=0.0).weight(edm, edm.time_of(-2 * sigma.log()))
    agree("losses/edm_loss_weight", mine, arrays["edm_loss_weight"], 1e-12, relative=True)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "x0"])
def test_a_weighting_is_the_same_whatever_the_network_puts_out(schedules, name):
    """Networks that say the same of an image have the same loss, all parameterizations alike."""
    schedule = schedules["vp"]
    t = schedule.time(torch.linspace(0.01, 0.99, 5, dtype=F64))
    x0, eps, said = torch.randn(3, len(t), 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    x_t = noised(schedule, x0, t, eps)

    def denoiser(kind):
        c_skip, c_out, _, _ = (column(value) for value in MAPS[kind](schedule, t))
        return Denoiser(Told(lambda x, c: (said - c_skip * x_t) / c_out), schedule, MAPS[kind])

    for objective in (
        Simple(label_dropout=0.0),
        MinSNR(gamma=5.0, label_dropout=0.0),
        EDMObjective(sigma_data=0.5, label_dropout=0.0),
        Likelihood(label_dropout=0.0),
    ):
        plain = objective(denoiser("x0"), x0, None, t, eps)
        torch.testing.assert_close(objective(denoiser(name), x0, None, t, eps), plain, rtol=1e-6, atol=0)
        expected = objective.weight(schedule, t) * (said - x0).square().flatten(1).mean(1)
        torch.testing.assert_close(plain, expected, rtol=1e-9, atol=0)


def test_likelihood_weighting_is_g_squared_of_the_score(schedules):
    for tag in ("vp", "subvp", "ve", "edm", "linear"):
        schedule = schedules[tag]
        t = torch.tensor([0.3005, 0.7005], dtype=F64)
        (alpha, sigma), (_, g2) = schedule(t), schedule.sde(t)
        weight = Likelihood(label_dropout=0.0).weight(schedule, t)
        torch.testing.assert_close(weight, g2 * (alpha / sigma**2) ** 2, rtol=1e-10, atol=0)


def test_huber_is_square_for_small_errors_and_straight_for_large(schedules):
    schedule = schedules["cosine"]
    t, zeros = torch.tensor([0.5], dtype=F64), torch.zeros(1, 1, 2, 2, dtype=F64)
    for size, slope in ((1e-4, 1.0), (1e4, 0.1 * 2 / 1e4)):
        denoiser = Denoiser(Told(lambda x, c, size=size: zeros + size), schedule, Eps())
        loss = Simple(huber_delta=0.1, label_dropout=0.0)(denoiser, zeros, None, t, zeros)
        torch.testing.assert_close(loss, torch.tensor([slope * size**2], dtype=F64), rtol=1e-4, atol=0)


def test_targets_keep_their_digits_in_float32(schedules):
    """The loss of a network that is right but for a known error is that error, down to the smallest noise."""
    for tag, name in (("edm", "edm"), ("rectified", "flow"), ("vp", "v"), ("cosine", "eps")):
        schedule = schedules[tag]
        t = schedule.time(torch.tensor([0.0, 0.5, 0.999], dtype=F64))
        x0, eps = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        c_skip, c_out, _, _ = (column(v) for v in MAPS[name](schedule, t))
        alpha, sigma = (column(level) for level in schedule(t))
        truth = (1 - alpha * c_skip) / c_out * x0.double() - sigma * c_skip / c_out * eps.double()
        denoiser = Denoiser(Told(lambda x, c, truth=truth: truth.float() + 0.1), schedule, MAPS[name])
        loss = Target(label_dropout=0.0)(denoiser, x0, None, t, eps)
        torch.testing.assert_close(loss, torch.full_like(loss, 0.01), rtol=1e-4, atol=0)
