"""Parameterizations, objectives, the posterior's bound and the times of training."""

import math
from collections.abc import Callable

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion import parameterizations as maps
from diffusion_cli.diffusion import schedules as processes
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction, clip_x0, noised
from diffusion_cli.diffusion.likelihood import bound_terms, prior_term
from diffusion_cli.diffusion.objectives import VLB, EDMObjective, Hybrid, Likelihood, MinSNR, Simple, Target
from diffusion_cli.diffusion.parameterizations import X0, Eps, Flow, Parameterization, Score, V
from diffusion_cli.diffusion.posterior import Variance, bound_term, discretised_log_likelihood
from diffusion_cli.diffusion.schedules import VP, Cosine, Linear
from diffusion_cli.diffusion.time_sampling import (
    LogitNormal,
    LogNormal,
    LossSecondMoment,
    Stratified,
    Uniform,
)

F64 = torch.float64
MAPS: dict[str, Parameterization] = {
    "eps": Eps(),
    "x0": X0(),
    "v": V(),
    "score": Score(),
    "flow": Flow(),
    "edm": maps.EDMPreconditioning(sigma_data=0.5),
}
SCHEDULES = ["linear", "cosine", "sigmoid", "zero_snr", "vp", "subvp", "ve", "edm", "rectified"]
NO_SIGNAL = ("zero_snr", "rectified")


class Told(nn.Module):
    """A network with an output that is a given function of its input and c_noise."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise, y):
        return self.answer(x, c_noise)


def times(schedule, count=7):
    return schedule.time(torch.linspace(0, 1 - 1e-9, count, dtype=F64))


def column(value):
    return value.view(-1, 1, 1, 1)


# --- Parameterizations --------------------


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


# --- Weightings --------------------


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


# --- The bound --------------------


def perfect(mixture, schedule, gain=1.0) -> Callable[[Tensor, Tensor], Prediction]:
    """The reference's model: the perfect eps, and variance values that are a fixed function of x_t."""

    def denoise(x, t):
        alpha, sigma = (column(level) for level in schedule(t))
        x0 = mixture.denoise(x, alpha.flatten(), sigma.flatten())
        eps = gain * (x - alpha * x0) / sigma
        return Prediction((x - sigma * eps) / alpha, eps, sigma, torch.tanh(3 * torch.flip(x, [-1])))

    return denoise


def process(tag, T):
    if tag == "linear":
        return Linear(num_timesteps=T)
    return Cosine(num_timesteps=T)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("kind", ["FIXED_SMALL_clip", "FIXED_SMALL_noclip", "FIXED_LARGE_clip",
                                  "LEARNED_RANGE_clip", "LEARNED_RANGE_noclip"])  # fmt: skip
def test_bound_equals_guided_diffusion(reference, mixture, agree, tag, kind):
    arrays, noise, schedule = reference("vlb"), reference("noise"), process(tag, 100)
    denoise = perfect(mixture, schedule)
    if "noclip" not in kind:
        denoise = clip_x0(denoise, schedule)
    variances: dict[str, Variance] = {"S": "small", "L": "large", "R": "learned"}
    variance = variances[kind.split("_")[1][0]]
    draws = iter(noise["noise"])
    x0 = noise["x0_data"]
    terms = [term for (term,) in bound_terms(schedule, denoise, x0, lambda: next(draws), [variance])]
    name = f"{tag}_{kind}_f64"
    agree(f"vlb/{name}_vb", torch.stack(terms, 1), arrays[f"{name}_vb"], 1e-10)
    agree(f"vlb/{name}_prior_bpd", prior_term(schedule, x0), arrays[f"{name}_prior_bpd"], 1e-10)
    total = torch.stack(terms, 1).sum(1) + prior_term(schedule, x0)
    agree(f"vlb/{name}_total_bpd", total, arrays[f"{name}_total_bpd"], 1e-10)


def test_decoder_equals_guided_diffusion_or_the_exact_normal(reference, agree):
    arrays = reference("vlb")
    given = [arrays[f"dgll_{key}"] for key in ("x", "mean", "logscale")]
    agree("vlb/dgll", discretised_log_likelihood(*given), arrays["dgll"], 1e-10)
    exact = discretised_log_likelihood(*given, exact_cdf=True)
    below = given[0] <= given[1]  # above, theirs subtracts numbers near 1 and loses digits
    agree("vlb/dgll_exactcdf lower", exact[below], arrays["dgll_exactcdf"][below], 1e-10)
    agree("vlb/dgll_exactcdf upper", exact[~below], arrays["dgll_exactcdf"][~below], 1e-7)


def test_decoder_is_a_distribution_over_the_values():
    values = torch.arange(256, dtype=F64) / 127.5 - 1
    for mean, log_std in ((0.1, -2.0), (-0.97, -1.0), (0.0, 0.5)):
        log_p = discretised_log_likelihood(values, torch.tensor(mean), torch.tensor(log_std), exact_cdf=True)
        torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=F64), rtol=1e-8, atol=0)


def test_losses_equal_guided_diffusion(reference, mixture, agree):
    arrays, noise, schedule = reference("vlb"), reference("noise"), process("cosine", 100)
    t = (torch.tensor([0, 1, 50, 99], dtype=F64) + 1) / 100
    x0, eps = noise["x0_data"], noise["noise"][7]
    denoise = perfect(mixture, schedule, gain=0.9)

    class Network(nn.Module):
        learn_variance = True

        def forward(self, x, c_noise, y):
            _, eps, _, variance = denoise(x, t)
            assert variance is not None
            return torch.cat([eps, variance], 1)

    denoiser = Denoiser(Network(), schedule, Eps())
    agree("vlb/train_RESCALED_KL_loss", VLB(variance="learned", label_dropout=0.0)(denoiser, x0, None, t, eps),
          arrays["train_RESCALED_KL_loss"], 1e-9)  # fmt: skip
    x_t = noised(schedule, x0, t, eps)
    term = bound_term(schedule, denoiser(x_t, t), x0, x_t, t, "learned")
    agree("vlb/train_KL_loss", term, arrays["train_KL_loss"], 1e-10)
    agree("vlb/train_RESCALED_MSE_loss", Hybrid(vlb_weight=0.001, label_dropout=0.0)(denoiser, x0, None, t, eps),
          arrays["train_RESCALED_MSE_loss"], 1e-10)  # fmt: skip
    agree("vlb/train_MSE_loss", Hybrid(vlb_weight=1 / 100, label_dropout=0.0)(denoiser, x0, None, t, eps),
          arrays["train_MSE_loss"], 1e-10)  # fmt: skip


def test_hybrid_bound_trains_the_variance_only(schedules):
    schedule = schedules["cosine"]
    out = torch.randn(2, 2, 4, 4, dtype=F64, requires_grad=True)
    denoiser = Denoiser(Told(lambda x, c: out), schedule, Eps())
    x0, eps = torch.rand(2, 2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) - 0.5
    t = torch.tensor([0.001, 0.7], dtype=F64)
    (heavy,) = torch.autograd.grad(
        Hybrid(vlb_weight=100.0, label_dropout=0.0)(denoiser, x0, None, t, eps).sum(), out
    )
    (light,) = torch.autograd.grad(
        Hybrid(vlb_weight=1e-9, label_dropout=0.0)(denoiser, x0, None, t, eps).sum(), out
    )
    torch.testing.assert_close(heavy[:, :1], light[:, :1])
    assert (heavy[:, 1:] - light[:, 1:]).abs().min() > 0


@pytest.mark.parametrize(
    ("objective", "learn", "tag", "message"),
    [
        (
            Simple(label_dropout=0.0),
            True,
            "cosine",
            "learn_variance=true: this objective does not train",
        ),
        (
            Hybrid(vlb_weight=0.001, label_dropout=0.0),
            False,
            "cosine",
            "objective=hybrid: .*learn_variance=true",
        ),
        (
            VLB(variance="learned", label_dropout=0.0),
            False,
            "cosine",
            "objective.variance=learned: needs .*learn_variance=true",
        ),
        (
            VLB(variance="small", label_dropout=0.0),
            True,
            "cosine",
            "objective.variance=small: needs .*learn_variance=false",
        ),
        (
            VLB(variance="small", label_dropout=0.0),
            False,
            "vp",
            "objective=vlb: the bound is a sum over timesteps, but the VP schedule is continuous; use linear",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(schedules, objective, learn, tag, message):
    network = nn.Identity()
    network.learn_variance = learn
    with pytest.raises(ValueError, match=message):
        objective.check(Denoiser(network, schedules[tag], Eps()), Uniform())


def test_the_bound_wants_the_timesteps(schedules):
    denoiser = Denoiser(nn.Identity(), schedules["cosine"], Eps())
    with pytest.raises(
        ValueError, match="time_sampling=log_normal: the bound is a mean over uniform timesteps"
    ):
        VLB(variance="small", label_dropout=0.0).check(denoiser, LogNormal(mean=0.0, std=1.0))
    VLB(variance="small", label_dropout=0.0).check(
        denoiser, LossSecondMoment(bins=10, memory=2, uniform_share=0.1)
    )


DENOISING = [
    file
    for file in sorted(CONF.glob("objective/*.yaml"))
    if file.stem not in ("autoencoder", "cross_entropy")
]


@pytest.mark.parametrize("file", DENOISING, ids=lambda file: file.stem)
def test_every_objective_is_finite_at_every_time_it_may_see(schedules, file):
    """And least for the truth, but for what the bound cannot lose."""
    objective = build(yaml.safe_load(file.read_text()))
    for tag in ("cosine", "linear") if file.stem in ("vlb", "hybrid") else SCHEDULES:
        schedule = schedules[tag]
        t = torch.cat([times(schedule), torch.ones(1, dtype=F64)])
        x0, eps, error = torch.randn(
            3, len(t), 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)
        )
        alpha, sigma = (column(level) for level in schedule(t))
        v = alpha * eps - sigma * x0
        right, wrong = (
            objective(
                Denoiser(Told(lambda x, c, out=v + e * error: torch.cat([out, 0 * out], 1)), schedule, V()),
                x0, None, t, eps,
            )
            for e in (0.0, 0.1)
        )  # fmt: skip
        assert wrong.isfinite().all()
        counted = schedule(t)[0] > 1e-6  # no signal may weigh nothing
        assert (wrong[counted] > right[counted]).all()


# --- Times --------------------


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
