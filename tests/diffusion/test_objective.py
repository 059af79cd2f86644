"""The posterior's bound and the objectives."""

from collections.abc import Callable

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction, clip_x0, noised
from diffusion_cli.diffusion.likelihood import bound_terms, prior_term
from diffusion_cli.diffusion.objectives import VLB, Hybrid, Simple
from diffusion_cli.diffusion.parameterizations import Eps, V
from diffusion_cli.diffusion.posterior import Variance, bound_term, discretised_log_likelihood
from diffusion_cli.diffusion.time_sampling import LogNormal, LossSecondMoment, Uniform
from helpers.objectives import SCHEDULES, Told, column, process, times

F64 = torch.float64


def perfect(mixture, schedule, gain=1.0) -> Callable[[Tensor, Tensor], Prediction]:
    """The reference's model: the perfect eps, and variance values that are a fixed function of x_t."""

    def denoise(x, t):
        alpha, sigma = (column(level) for level in schedule(t))
        x0 = mixture.denoise(x, alpha.flatten(), sigma.flatten())
        eps = gain * (x - alpha * x0) / sigma
        return Prediction((x - sigma * eps) / alpha, eps, sigma, torch.tanh(3 * torch.flip(x, [-1])))

    return denoise


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


TARGETS_ARE_PREDICTIONS = ("consistency", "progressive_distillation", "trajectory_distillation")
"""Objectives without a least loss at the truth; their laws are in files of their own."""
DENOISING = [
    file
    for file in sorted(CONF.glob("objective/*.yaml"))
    if file.stem not in ("autoencoder", "cross_entropy", *TARGETS_ARE_PREDICTIONS)
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
