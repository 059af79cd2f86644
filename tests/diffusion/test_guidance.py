"""Guidance: against independent numbers, and against the classes of a mixture that is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.diffusion.denoiser import (
    Denoiser,
    NoisyClassifier,
    Prediction,
    add_score,
    clip_x0,
    noised,
    threshold_x0,
)
from diffusion_cli.diffusion.guidance import AutoGuidance, ClassifierFree, ClassifierGuidance, NoGuidance
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.posterior import posterior
from diffusion_cli.diffusion.schedules import Linear
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.samplers import DDIM, DDPM, integrate

F64 = torch.float64
OFF = {"interval": None, "dynamic_threshold": None, "max_threshold": None}
T = 1000


class Exact(nn.Module):
    """The perfect eps of the mixture as a class-conditional network; class 3 is the null class."""

    num_classes = 3

    def __init__(self, mixture, schedule, gain=1.0):
        super().__init__()
        self.mixture, self.schedule, self.gain = mixture, schedule, gain
        self.batches: list[int] = []

    def levels(self, c_noise):
        return self.schedule((c_noise.double() + 1) / T)

    def forward(self, x, c_noise, y):
        self.batches.append(len(x))
        alpha, sigma = self.levels(c_noise)
        x0 = self.mixture.denoise(x, alpha, sigma)
        if y is not None:
            told = self.mixture.denoise(x, alpha, sigma, y.clamp(max=2))
            x0 = torch.where((y < 3).view(-1, 1, 1, 1), told, x0)
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in (alpha, sigma))
        return self.gain * (x.double() - alpha * x0) / sigma


class Bayes(nn.Module):
    """The perfect classifier of the mixture's components."""

    task = "classifier"

    def __init__(self, mixture, schedule):
        super().__init__()
        self.exact = Exact(mixture, schedule)

    def forward(self, x, c_noise):
        mixture = self.exact.mixture
        alpha, sigma = self.exact.levels(c_noise)
        density = [mixture.log_prob(x, alpha, sigma, label) for label in range(3)]
        return torch.stack(density, dim=-1) + mixture.weights.log()


class Given:
    """Guides that are at hand."""

    def __init__(self, denoiser: Denoiser | None = None, classifier: NoisyClassifier | None = None) -> None:
        self.one, self.other = denoiser, classifier

    def denoiser(self, run: str | None, step: int | None) -> Denoiser:
        assert self.one is not None
        return self.one

    def classifier(self, run: str) -> NoisyClassifier:
        assert self.other is not None
        return self.other


@pytest.fixture(scope="module")
def schedule() -> Linear:
    return Linear(num_timesteps=T)


@pytest.fixture(scope="module")
def denoiser(mixture, schedule) -> Denoiser:
    return Denoiser(Exact(mixture, schedule), schedule, Eps())


@pytest.fixture(scope="module")
def classifier(mixture, schedule) -> NoisyClassifier:
    return NoisyClassifier(Bayes(mixture, schedule), schedule, Eps())


def cfg(scale: float, rescale: float = 0.0, **options) -> ClassifierFree:
    return ClassifierFree(Given(), scale=scale, rescale=rescale, **{**OFF, **options})


def by(classifier, scale: float, **options) -> ClassifierGuidance:
    return ClassifierGuidance(Given(classifier=classifier), run="", scale=scale, **{**OFF, **options})


def labels(k: int, count: int = 4) -> Tensor:
    return torch.full((count,), k)


# --- Independent numbers --------------------


def at_times(guided, arrays):
    """The guided eps at the times of the arrays."""
    return torch.stack(
        [guided(x, (t + 1).double() / T).eps for x, t in zip(arrays["x_t"], arrays["t"], strict=True)]
    )


@pytest.mark.parametrize("k", [0, 2])
def test_classifier_free_guidance_in_both_conventions(denoiser, reference, agree, k):
    arrays = reference("guidance")
    agree("guidance/eps_uncond", at_times(NoGuidance()(denoiser, None), arrays), arrays["eps_uncond"], 1e-12)
    agree(
        f"guidance/eps_class{k}",
        at_times(NoGuidance()(denoiser, labels(k)), arrays),
        arrays[f"eps_class{k}"],
        1e-12,
    )
    for w in (0.0, 1.0, 1.5, 3.0, 7.5):
        for kind, scale in (("df", w), ("ho", 1 + w)):
            name = f"cfg_{kind}_w{w}_class{k}"
            agree(f"guidance/{name}", at_times(cfg(scale)(denoiser, labels(k)), arrays), arrays[name], 1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("w", [1.5, 3.0, 7.5])
def test_rescaled_guidance(denoiser, reference, agree, w, phi):
    arrays = reference("guidance")
    for k in (0, 2):
        name = f"cfg_rescaled_w{w}_phi{phi}_class{k}"
        guided = cfg(w, rescale=phi)(denoiser, labels(k))
        agree(f"guidance/{name}", at_times(guided, arrays), arrays[name], 1e-12)


@pytest.mark.parametrize("k", [0, 2])
def test_classifier_guidance(denoiser, classifier, reference, agree, k):
    arrays = reference("guidance")
    gradients = [
        classifier.gradient(x, (t + 1).double() / T, labels(k))
        for x, t in zip(arrays["x_t"], arrays["t"], strict=True)
    ]
    agree(
        f"guidance/classifier_grad_class{k}",
        torch.stack(gradients),
        arrays[f"classifier_grad_class{k}"],
        1e-11,
    )
    for scale in (1.0, 4.0):
        name = f"classifier_eps_s{scale}_class{k}"
        untold = Denoiser(denoiser.network, denoiser.schedule, denoiser.parameterization)
        guided = by(classifier, scale)
        eps = [
            add_score(
                untold(x, t), scale * guided.classifier.gradient(x, t, labels(k)), untold.schedule, t
            ).eps
            for x, t in zip(arrays["x_t"], (arrays["t"] + 1).double() / T, strict=True)
        ]
        agree(f"guidance/{name}", torch.stack(eps), arrays[name], 1e-11)


@pytest.mark.parametrize("ratio", [0.995, 0.9])
def test_dynamic_thresholding(schedule, reference, agree, ratio):
    arrays = reference("guidance")
    x0, t = arrays["dynthresh_in"], torch.tensor(0.5, dtype=F64)

    def denoise(x, t):
        return Prediction(x0, x0, schedule(t)[1])

    for largest, text in ((1.0, "1"), (1.5, "1.5"), (1e9, "1e+09")):
        name = f"dynthresh_r{ratio}_max{text}"
        mine = threshold_x0(denoise, schedule, ratio, largest)(x0, t).x0
        agree(f"guidance/{name}", mine, arrays[name], 1e-12)
    clipped = clip_x0(denoise, schedule)(x0, t).x0
    agree("guidance/clip", clipped, arrays[f"dynthresh_r{ratio}_max1"], 1e-12)


def run(guided, schedule, x, steps):
    sampler = DDIM(schedule, eta=0.0, spacing="leading")
    return list(integrate(sampler, guided, x, sampler.grid(steps), lambda: x))


def test_guided_trajectories(mixture, denoiser, classifier, schedule, reference, agree):
    arrays, x = reference("guidance"), reference("noise")["x_T"]
    for w in (2.0, 4.0):
        states = run(cfg(w)(denoiser, labels(0)), schedule, x, 50)
        name = f"traj_ddim_cfg_w{w}_class0"
        agree(f"guidance/{name}", torch.stack([states[i] for i in (0, 25, 49)]), arrays[name], 1e-9)
    for k in (0, 2):
        name = f"traj_ddim_conditional_class{k}"
        agree(
            f"guidance/{name}",
            run(NoGuidance()(denoiser, labels(k)), schedule, x, 50)[-1],
            arrays[name],
            1e-9,
        )
        untold = Denoiser(Untold(mixture, schedule), schedule, Eps())
        states = run(by(classifier, 2.0)(untold, labels(k)), schedule, x, 50)
        name = f"traj_ddim_classifier_s2.0_class{k}"
        agree(f"guidance/{name}", torch.stack([states[i] for i in (0, 25, 49)]), arrays[name], 1e-9)
    weak = Denoiser(Exact(mixture, schedule, gain=0.9), schedule, Eps())
    guided = threshold_x0(NoGuidance()(weak, None), schedule, 0.9, 10.0)
    states = run(guided, schedule, x, 20)
    agree("guidance/ddim_dynthresh_traj", torch.stack(states), arrays["ddim_dynthresh_traj"], 1e-9)


@pytest.mark.parametrize(
    ("label", "end", "way"), [(0, 0.0024, 0.072), (1, 0.0161, 0.104), (2, 0.0299, 0.135)]
)
def test_a_step_of_ddpm_is_near_that_of_dhariwal_and_nichol(
    mixture, classifier, schedule, reference, label, end, way
):
    """Their Alg. 1 moves the mean by the step's variance times the gradient, ours by `v / a`; as in conventions.md."""
    noise, untold = reference("noise"), Denoiser(Untold(mixture, schedule), schedule, Eps())
    sampler, draws = DDPM(schedule, variance="small", spacing="leading"), iter(noise["noise"])
    times = sampler.grid(50)
    guided = by(classifier, 2.0)(untold, labels(label))
    mine = list(integrate(sampler, guided, noise["x_T"], times, lambda: next(draws)))
    x, theirs, least = noise["x_T"], [], posterior(schedule, times[-3], times[-2]).small
    for z, (t, s) in zip(noise["noise"], pairwise(times), strict=False):
        step, gradient = posterior(schedule, t, s), 2 * classifier.gradient(x, t, labels(label)).double()
        variance = step.small if s > 0 else least  # of the last step, as in their code
        fresh = step.small.sqrt() * z if s > 0 else 0
        x = step.c_t * x + step.c_0 * untold(x, t).x0 + variance * gradient + fresh
        theirs.append(x)
    apart = [float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)]
    assert apart[-1] == pytest.approx(end, abs=2e-4)
    assert max(apart) == pytest.approx(way, abs=1e-3)


class Untold(Exact):
    """The perfect eps of the mixture as a network that takes no notice of classes."""

    num_classes = None  # type: ignore[assignment]

    def forward(self, x, c_noise, y):
        return super().forward(x, c_noise, None)


# --- Laws --------------------


@pytest.mark.parametrize("kind", ["cfg", "auto", "classifier"])
def test_the_scale_that_is_off_is_the_identity_at_one_call(mixture, schedule, denoiser, classifier, kind):
    guide = Denoiser(Exact(mixture, schedule, gain=0.8), schedule, Eps())
    auto = AutoGuidance(Given(guide), run=None, step=0, scale=1.0, rescale=0.7, **OFF)
    guidance = {"cfg": cfg(1.0, rescale=0.7), "auto": auto, "classifier": by(classifier, 0.0)}[kind]
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    plain = denoiser(x, t, labels(1))
    before, asked = denoiser.evaluations, classifier.evaluations
    guided = guidance(denoiser, labels(1))(x, t)
    assert torch.equal(plain.x0, guided.x0)
    assert torch.equal(plain.eps, guided.eps)
    assert (denoiser.evaluations - before, guide.evaluations, classifier.evaluations - asked) == (4, 0, 0)


def test_both_halves_go_in_one_batch(denoiser):
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    denoiser.network.batches.clear()
    cfg(2.0)(denoiser, labels(1))(x, t)
    assert denoiser.network.batches == [8]


def test_guidance_acts_within_its_interval(denoiser, schedule):
    x = torch.randn(4, 1, 2, 2, dtype=F64)
    guided, plain = cfg(3.0, interval=[0.3, 2.0])(denoiser, labels(1)), NoGuidance()(denoiser, labels(1))
    for level in (0.1, 0.299, 0.301, 1.0, 1.999, 2.001, 50.0):
        t = schedule.time_of(torch.tensor(-2 * math.log(level), dtype=F64))
        assert torch.equal(guided(x, t).eps, plain(x, t).eps) == (not 0.3 < level <= 2.0), level


def test_autoguidance_extrapolates_from_the_guide(mixture, schedule, denoiser):
    guide = Denoiser(Exact(mixture, schedule, gain=0.8), schedule, Eps())
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    for y in (labels(2), None):
        auto = AutoGuidance(Given(guide), run=None, step=0, scale=2.5, rescale=0.0, **OFF)
        eps = auto(denoiser, y)(x, t).eps
        torch.testing.assert_close(
            eps, guide(x, t, y).eps + 2.5 * (denoiser(x, t, y).eps - guide(x, t, y).eps)
        )
        assert auto.guides() == (guide,)


class Learned(Exact):
    """The perfect eps, and variance values that give away the class, the gain and the image."""

    learn_variance = True

    def forward(self, x, c_noise, y):
        variance = torch.tanh(x + y.view(-1, 1, 1, 1) / 4 + self.gain)
        return torch.cat([super().forward(x, c_noise, y), variance], 1)


def test_guidance_leaves_the_learned_variance_of_the_model_and_class(mixture, schedule):
    model = Denoiser(Learned(mixture, schedule), schedule, Eps())
    guide = Denoiser(Learned(mixture, schedule, gain=0.8), schedule, Eps())
    x, t = 0.1 * torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    expected = model(x, t, labels(1)).variance
    auto = AutoGuidance(Given(guide), run=None, step=0, scale=2.5, rescale=0.0, **OFF)
    for guidance in (cfg(2.5), auto, NoGuidance()):
        variance = guidance(model, labels(1))(x, t).variance
        assert variance is not None
        torch.testing.assert_close(variance, expected)


def test_guidance_keeps_image_and_noise_together(mixture, schedule, denoiser, classifier):
    """`x_t = alpha x_0 + sigma eps` for every guided prediction."""
    guide = Denoiser(Exact(mixture, schedule, gain=0.8), schedule, Eps())
    auto = AutoGuidance(Given(guide), run=None, step=0, scale=2.5, rescale=0.3, **OFF)
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    for guidance in (cfg(3.0), auto, by(classifier, 2.0)):
        prediction = guidance(denoiser, labels(1))(x, t)
        torch.testing.assert_close(noised(schedule, prediction.x0, t, prediction.eps), x)


def test_thresholding_keeps_images_in_range_and_agrees_with_eps(denoiser, schedule):
    x, t = 3 * torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.7, dtype=F64)
    prediction = cfg(7.5, dynamic_threshold=0.9)(denoiser, labels(1))(x, t)
    assert prediction.x0.abs().max() <= 1
    torch.testing.assert_close(noised(schedule, prediction.x0, t, prediction.eps), x)


def test_a_classifier_says_nothing_where_there_is_no_signal(mixture):
    schedule = Linear(num_timesteps=T, zero_terminal_snr=True)
    x0 = torch.zeros(1, 1, 2, 2, dtype=F64)
    prediction = Prediction(x0, x0, schedule(torch.ones((), dtype=F64))[1])
    moved = add_score(prediction, x0 + 1, schedule, torch.ones((), dtype=F64))
    assert torch.equal(moved.x0, x0)
    assert torch.equal(moved.eps, x0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_classifier_has_a_gradient_in_every_mode(classifier, mode):
    with mode():
        x, t = torch.ones(4, 1, 2, 2, dtype=F64), torch.tensor(0.3, dtype=F64)
        assert classifier.gradient(x, t, labels(1)).abs().min() > 0


@pytest.mark.parametrize("kind", ["told", "cfg", "classifier"])
def test_guidance_at_scale_one_samples_the_class(mixture, schedule, denoiser, classifier, kind):
    """DDPM with the exact denoiser: every sample lies in its component, with that component's moments."""
    guidance = {"told": NoGuidance(), "cfg": cfg(1.0), "classifier": by(classifier, 1.0)}[kind]
    base = Denoiser(Untold(mixture, schedule), schedule, Eps()) if kind == "classifier" else denoiser
    sampler = DDPM(schedule, variance="small", spacing="trailing")
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(3000, 1, 2, 2, dtype=F64, generator=generator)

    y = torch.arange(3000) % 3
    *_, x = integrate(sampler, guidance(base, y), draw(), sampler.grid(500), draw)
    points = x.flatten(1)
    likeliest = torch.stack([mixture.log_prob(x, label=k) for k in range(3)]).argmax(0)
    assert (likeliest == y).float().mean() > 0.99
    for k in range(3):
        mine = points[y == k]
        error = mixture.stds[k] / math.sqrt(len(mine))  # of a mean; a std's is sqrt(2) smaller
        assert (mine.mean(0) - mixture.means[k]).abs().max() < 4 * error + 0.004
        assert (mine.std(0) - mixture.stds[k]).abs().max() < 4 * error / math.sqrt(2) + 0.004


def test_greater_scales_lead_further_into_the_class(mixture, schedule, denoiser):
    x = torch.randn(300, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(300) % 3
    certainty = []
    for scale in (0.0, 0.5, 1.0, 2.0):
        sampler = DDIM(schedule, eta=0.0, spacing="trailing")
        *_, end = integrate(sampler, cfg(scale)(denoiser, y), x, sampler.grid(50), lambda: x)
        log_p = (
            torch.stack([mixture.log_prob(end, label=k) for k in range(3)]) + mixture.weights.log()[:, None]
        )
        certainty.append(log_p.softmax(0).gather(0, y[None]).mean().item())
    assert all(a < b + 1e-3 for a, b in pairwise(certainty)), certainty
    assert certainty[0] < 0.5
    assert certainty[2] > 0.99


def test_cross_entropy_is_least_for_the_right_classes(mixture, classifier, schedule):
    from diffusion_cli.diffusion.objectives import CrossEntropy

    images = mixture.load("train")
    x0 = images.pixels.double()
    t = Uniform()(schedule, torch.rand(len(x0), generator=torch.Generator().manual_seed(0)).double()).t
    eps = torch.randn(x0.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    loss = CrossEntropy(label_smoothing=0.0)(classifier, x0, images.labels, t, eps)
    x_t = noised(schedule, x0, t, eps)
    torch.testing.assert_close(loss, -classifier(x_t, t).gather(1, images.labels[:, None])[:, 0])
    assert (
        loss.mean()
        < CrossEntropy(label_smoothing=0.0)(classifier, x0, (images.labels + 1) % 3, t, eps).mean()
    )
    smooth = CrossEntropy(label_smoothing=0.3)(classifier, x0, images.labels, t, eps)
    torch.testing.assert_close(smooth, 0.7 * loss - 0.3 * classifier(x_t, t).mean(1))
