"""The likelihood and the bound against closed forms and independent code."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.data import Dataset, GaussianMixture
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.likelihood import flow_likelihood
from diffusion_cli.diffusion.parameterizations import X0, Flow, Parameterization
from diffusion_cli.diffusion.probability_flow import angle, velocity
from diffusion_cli.diffusion.schedules import VE, Cosine, EDMSchedule, Linear, Rectified, Schedule
from diffusion_cli.metrics import EvaluatedModel, FlowLikelihood, Inversion, VariationalBound
from diffusion_cli.runs.load import LoadedDenoiser
from helpers import checkpoint_info

F64 = torch.float64
BITS = 4 * math.log(2)  # nats of a bit a dimension, of four


@dataclass
class Tight:
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000


PROCESSES = ["linear", "cosine", "sigmoid", "vp", "subvp", "ve", "edm", "rectified", "zero_snr"]


@pytest.mark.parametrize("tag", [*PROCESSES, "edm from 0.5"])
def test_bits_per_dim_equal_the_exact_density(schedules, exact, mixture, reference, tag):
    """Within 1e-4, less what a Gaussian prior costs: the exact density of where the flow ends, against N(0, prior)."""
    schedule = EDMSchedule(sigma_min=0.5) if tag == "edm from 0.5" else schedules[tag]
    x = reference("noise")["x0_data"]
    found = flow_likelihood(schedule, exact(schedule), x, None, Tight())
    ends = torch.tensor([schedule.t_min, 1.0], dtype=F64)
    alpha, sigma = schedule(ends)
    truth = mixture.log_prob(x, alpha[0], sigma[0])
    prior = torch.distributions.Normal(0, schedule.prior_std(ends[1]))
    gap = prior.log_prob(found.latents).flatten(1).sum(1) - mixture.log_prob(
        found.latents, alpha[1], sigma[1]
    )
    assert ((found.log_p - gap - truth) / BITS).abs().max() < 1e-4
    if tag in ("cosine", "sigmoid", "rectified", "zero_snr"):
        assert ((found.log_p - truth) / BITS).abs().max() < 1e-4


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_within_three_standard_errors(schedules, exact, mixture, reference, probe):
    schedule, x = schedules["cosine"], reference("noise")["x0_data"][:1]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 2000, 1, 2, 2, dtype=F64, generator=generator)
    probes = normal if probe == "gaussian" else normal.sign()
    many = flow_likelihood(schedule, exact(schedule), x.expand(2000, -1, -1, -1), probes, Tight())
    alpha, sigma = schedule(torch.tensor(schedule.t_min, dtype=F64))
    error = many.log_p.mean() - mixture.log_prob(x, alpha, sigma)
    assert abs(error) < 3 * many.log_p.std() / math.sqrt(2000)
    assert many.log_p.std() > 0.01


@pytest.mark.parametrize("tag", ["vp", "subvp", "ve"])
def test_equals_score_sde(reference, schedules, exact, agree, tag):
    arrays, schedule, x = reference("sde_likelihood"), schedules[tag], reference("noise")["x0_data"]
    whole = flow_likelihood(schedule, exact(schedule), x, None, Tight())
    agree(
        f"sde_likelihood/{tag}_logp_ode_exact",
        whole.log_p / BITS,
        arrays[f"{tag}_logp_ode_exact"] / BITS,
        2e-4,
    )
    agree(
        f"sde_likelihood/{tag}_bpd_hadamard_f64",
        7 - whole.log_p / BITS,
        arrays[f"{tag}_bpd_hadamard_f64"],
        2e-4,
    )
    one = flow_likelihood(schedule, exact(schedule), x, arrays["rademacher"][None], Tight())
    agree(f"sde_likelihood/{tag}_bpd_rad_f64", 7 - one.log_p / BITS, arrays[f"{tag}_bpd_rad_f64"], 2e-4)


def test_hadamard_probes_give_the_exact_trace(reference, schedules, exact):
    schedule, x = schedules["vp"], reference("noise")["x0_data"]
    probes = reference("sde_likelihood")["hadamard"].view(4, 1, 1, 2, 2).expand(-1, 4, -1, -1, -1)
    by_probes = flow_likelihood(schedule, exact(schedule), x, probes, Tight(1e-8, 1e-8))
    by_pixels = flow_likelihood(schedule, exact(schedule), x, None, Tight(1e-8, 1e-8))
    torch.testing.assert_close(by_probes.log_p, by_pixels.log_p, rtol=0, atol=1e-6)


def test_velocity_is_the_slope_of_the_flow(schedules, exact, mixture):
    """dz/dphi in the process's own time is alpha' x_0 + sigma' eps of the unscaled path."""
    schedule = schedules["subvp"]
    t = torch.tensor(0.4, dtype=F64)
    x = torch.randn(2, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    (alpha, sigma), (d_alpha, d_sigma) = schedule(t), schedule.derivatives(t)
    radius = torch.sqrt(alpha**2 + sigma**2)
    prediction = exact(schedule)(x, t)
    dx = d_alpha * prediction.x0 + d_sigma * prediction.eps
    d_radius = (alpha * d_alpha + sigma * d_sigma) / radius
    d_phi = (alpha * d_sigma - sigma * d_alpha) / radius**2
    expected = (dx / radius - x * d_radius / radius**2) / d_phi
    mine = velocity(schedule, exact(schedule), F64)(angle(schedule, t), x / radius)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_a_solver_without_enough_steps_says_so(schedules, exact, reference):
    with pytest.raises(ValueError, match=r"max_steps=2: .*rtol=1e-05 and atol=1e-05.*raise them, and"):
        flow_likelihood(
            schedules["vp"], exact(schedules["vp"]), reference("noise")["x0_data"], None, Tight(max_steps=2)
        )


# --- The metrics, on models that are known ------------------------------------------------------------

SHAPE = (1, 2, 2)
SEED = 5


class Some(Dataset):
    """Images that are given."""

    name, shape, class_names, flip = "some", SHAPE, None, False

    def __init__(self, images: Tensor) -> None:
        super().__init__("")
        self.images = images

    def load(self, split):
        return MemoryImages(self.images, None)


class Gaussian(nn.Module):
    """The flow `eps - x_0` of pixels that are normal with a standard deviation, on straight paths."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std))

    def forward(self, x, c_noise, y):
        sigma = (c_noise / 999).view(-1, 1, 1, 1)
        alpha, variance = 1 - sigma, self.std.detach() ** 2
        return (sigma - alpha * variance) * x / (alpha**2 * variance + sigma**2)


class Gray(nn.Module):
    """A network that takes every image for the value 0."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, y):
        return 0 * x


def subject(
    folder, network: nn.Module, schedule: Schedule, output: Parameterization, images: Tensor
) -> EvaluatedModel:
    """A model as `diffuse eval` measures it, on images with a smaller last batch."""
    model = LoadedDenoiser(
        checkpoint_info(SHAPE), step=0, digest="0" * 64,
        denoiser=Denoiser(network, schedule, output), space=Pixels(SHAPE),
    )  # fmt: skip
    return EvaluatedModel(model, Some(images), folder, torch.device("cpu"), SEED, 3, False, "fp32")


def noise_of(count: int, draws: int) -> Tensor:
    """The draws of each image's own generator, [draws, count, *SHAPE]."""
    generators = [torch.Generator().manual_seed(SEED + row) for row in range(count)]
    return torch.stack(
        [torch.stack([torch.randn(SHAPE, generator=each) for each in generators]) for _ in range(draws)]
    ).double()


def assert_mean(found, bits: Tensor) -> None:
    """The value is the mean over images, with its standard error."""
    assert found.value == pytest.approx(bits.mean().item(), rel=1e-4)
    error = bits.std().item() / math.sqrt(len(bits))
    assert found.details["standard_error"] == pytest.approx(error, rel=1e-3)
    assert found.details["images"] == len(bits)


BYTES = torch.tensor([0, 17, 90, 128, 131, 255, 200, 64, 30, 3, 250, 77, 5, 99, 180, 140], dtype=torch.uint8)


@pytest.mark.parametrize("probe", ["exact", "rademacher", "gaussian"])
@pytest.mark.parametrize("kind", ["bytes", "real numbers"])
def test_the_flow_of_normal_pixels_has_their_bits_per_dim(tmp_path, kind, probe):
    """A linear flow, on which a probe e counts the exact trace e^T e / D times: once, if it is made of -1 and 1."""
    std, schedule = 0.6, Rectified()
    images = BYTES.view(4, *SHAPE) if kind == "bytes" else BYTES.view(4, *SHAPE).float() / 128 - 1
    hutchinson, other = ("exact", "rademacher") if probe == "exact" else ("hutchinson", probe)
    metric = FlowLikelihood(
        trace=hutchinson, probe=other, num_probes=2, rtol=1e-5, atol=1e-5, max_steps=1000, split="val"
    )
    found = metric.measure(subject(tmp_path, Gaussian(std), schedule, Flow(), images))
    noise = noise_of(4, 3)
    x, offset = images.double(), 0.0
    if kind == "bytes":  # uniform in the bin of each byte: [0, 256) is [-1, 1)
        x, offset = (x + torch.special.ndtr(noise[0])) / 128 - 1, 7.0
    share = torch.ones(4, dtype=F64)
    if probe == "gaussian":
        probes = noise[1:] if kind == "bytes" else noise[:2]
        share = probes.square().mean((0, 2, 3, 4))
    alpha, sigma = schedule(torch.tensor(schedule.t_min, dtype=F64))
    radius, spread = torch.sqrt(alpha**2 + sigma**2), torch.sqrt(alpha**2 * std**2 + sigma**2)
    end = x / spread  # standard normal, as the flow is z / (std of z)
    log_p = -(end.square() + math.log(2 * math.pi)).flatten(1).mean(1) / 2
    log_p = log_p - share * torch.log(spread / radius) - radius.log()
    assert_mean(found, -log_p / math.log(2) + offset)


def test_the_bound_of_a_model_of_one_gray_has_its_closed_form(tmp_path):
    """Its KL terms are those of normal distributions with means that differ by c_0 x_0."""
    T = 10
    schedule = Linear(num_timesteps=T, beta_end=2e-3)
    images = (100 + BYTES // 5).view(4, *SHAPE)
    metric = VariationalBound(variance="small", cdf="exact", split="val")
    found = metric.measure(subject(tmp_path, Gray(), schedule, X0(), images))
    assert found is not None
    x = images.double() / 127.5 - 1
    alpha_bar = schedule(torch.arange(T + 1, dtype=F64) / T)[0].square()
    now, before = alpha_bar[1:], alpha_bar[:-1]
    beta = 1 - now / before
    variance, c_0 = beta * (1 - before) / (1 - now), before.sqrt() * beta / (1 - now)
    square = x.square().flatten(1).mean(1)
    middle = c_0[1:] ** 2 / (2 * variance[1:]) * square[:, None] / math.log(2)
    prior = (now[-1] * square + (1 - now[-1]) - 1 - torch.log(1 - now[-1])) / 2 / math.log(2)
    normal = torch.distributions.Normal(0, variance[1].sqrt())
    decoder = -torch.log2(normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)).flatten(1).mean(1)
    assert_mean(found, prior + middle.sum(1) + decoder)
    parts = {"prior": prior, "decoder": decoder, "middle": middle.sum(1)}
    parts |= {f"middle_{i}": part for i, part in enumerate(middle.T)}  # from the data to the noise
    for name, values in parts.items():
        assert found.details[name] == pytest.approx(values.mean().item(), rel=1e-4), name


class Perfect(nn.Module):
    """The mean image of a mixture given a noised one."""

    def __init__(self, mixture: GaussianMixture, schedule: Cosine) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, y):
        alpha, sigma = self.schedule((c_noise.double() + 1) / self.schedule.num_timesteps)
        return self.mixture.denoise(x, alpha, sigma).float()


def test_the_best_bound_is_the_lower_one_and_near_the_exact_bits(tmp_path, mixture):
    """A perfect model with the small variance pays for all that the posterior's variance leaves out."""
    schedule = Cosine(num_timesteps=50)
    x = mixture.load("val")[torch.arange(64)].clamp(-1, 1).double()
    values = ((x + 1) * 127.5).round()
    model = subject(tmp_path, Perfect(mixture, schedule), schedule, X0(), values.to(torch.uint8))
    found = {}
    for variance in ("small", "large", "best"):
        metric = VariationalBound(variance=variance, cdf="exact", split="val")
        found[variance] = metric.measure(replace(model, batch_size=64))
    pixel = (values / 127.5 - 1).flatten(1)[:, None]
    below = torch.where(pixel > -0.999, pixel - 1 / 255, -math.inf)
    above = torch.where(pixel < 0.999, pixel + 1 / 255, math.inf)
    normal = torch.distributions.Normal(mixture.means, mixture.stds[:, None].expand_as(mixture.means))
    each = (normal.cdf(above) - normal.cdf(below)).log().sum(-1) + mixture.weights.log()
    exact = -float(each.logsumexp(-1).mean()) / BITS
    assert found["small"].value > exact + 0.5
    assert exact < found["large"].value < exact + 0.35
    best = found["best"]
    assert best.value == pytest.approx(found["large"].value)
    assert best.details["bits_small"] == pytest.approx(found["small"].value)
    assert best.details["bits_large"] == pytest.approx(found["large"].value)
    for name, value in found["large"].details.items():
        assert best.details[name] == pytest.approx(value), name
    assert "uses the large variance" in best.notes[0]


class Unsure(Gray):
    """As Gray, with a variance head."""

    learn_variance = True

    def forward(self, x, c_noise, y):
        return torch.cat([0 * x, 0 * x + 0.3], dim=1)


def test_the_best_variance_of_a_model_with_a_variance_head_is_its_own(tmp_path):
    schedule = Cosine(num_timesteps=10)
    found = {}
    for variance in ("best", "learned", "small"):
        metric = VariationalBound(variance=variance, cdf="exact", split="val")
        found[variance] = metric.measure(subject(tmp_path, Unsure(), schedule, X0(), BYTES.view(4, *SHAPE)))
    assert found["best"].value == found["learned"].value != found["small"].value
    assert found["best"].details == found["learned"].details


def test_inversion_of_a_model_of_one_gray_has_its_closed_form(tmp_path):
    """It decodes to that gray, whatever the noise, to which the image leads in a straight line."""
    images = BYTES.view(4, *SHAPE)
    metric = Inversion(steps=3, strength=1.0, spacing="time", split="val")
    schedule = VE(sigma_min=0.5, grid_t_min=0.1)
    found = metric.measure(subject(tmp_path, Gray(), schedule, X0(), images))
    square = (images.double() / 127.5 - 1).square().mean().item()
    assert found.value == pytest.approx(127.5 * math.sqrt(square), rel=1e-5)
    least = 0.5 * 100**0.1  # the noise of the first step: x / least, by which x becomes 2 x
    assert found.details["noise_mean_square"] == pytest.approx(4 * square / least**2, rel=1e-5)
    assert found.details["images"] == 4
