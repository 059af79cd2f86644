"""Laws of guidance on a mixture with known classes."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction, add_score, noised
from diffusion_cli.diffusion.guidance import AutoGuidance, Dropouts, NoGuidance
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Linear
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import DDIM, DDPM, integrate
from helpers.conditions import GreyNetwork
from helpers.guidance import OFF, Exact, Given, T, Untold, by, cfg, classes, labels

F64 = torch.float64


@pytest.mark.parametrize("kind", ["cfg", "auto", "classifier"])
def test_the_scale_that_is_off_is_the_identity_at_one_call(mixture, schedule, denoiser, classifier, kind):
    guide = Denoiser(Exact(mixture, schedule, gain=0.8), schedule, Eps())
    auto = AutoGuidance(Given(guide), run=None, step=0, scale=1.0, rescale=0.7, **OFF)
    guidance = {"cfg": cfg(1.0, rescale=0.7), "auto": auto, "classifier": by(classifier, 0.0)}[kind]
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    plain = denoiser(x, t, labels(1))
    before, asked = denoiser.evaluations, classifier.evaluations
    guided = guidance(denoiser, classes(1))(x, t)
    assert torch.equal(plain.x0, guided.x0)
    assert torch.equal(plain.eps, guided.eps)
    assert (denoiser.evaluations - before, guide.evaluations, classifier.evaluations - asked) == (4, 0, 0)


def test_both_halves_go_in_one_batch(denoiser):
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    denoiser.network.batches.clear()
    cfg(2.0)(denoiser, classes(1))(x, t)
    assert denoiser.network.batches == [8]


def test_guidance_acts_within_its_interval(denoiser, schedule):
    x = torch.randn(4, 1, 2, 2, dtype=F64)
    guided, plain = cfg(3.0, interval=[0.3, 2.0])(denoiser, classes(1)), NoGuidance()(denoiser, classes(1))
    for level in (0.1, 0.299, 0.301, 1.0, 1.999, 2.001, 50.0):
        t = schedule.time_of(torch.tensor(-2 * math.log(level), dtype=F64))
        assert torch.equal(guided(x, t).eps, plain(x, t).eps) == (not 0.3 < level <= 2.0), level


def test_autoguidance_extrapolates_from_the_guide(mixture, schedule, denoiser):
    guide = Denoiser(Exact(mixture, schedule, gain=0.8), schedule, Eps())
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    for y in (classes(2), None):
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
        variance = guidance(model, classes(1))(x, t).variance
        assert variance is not None
        torch.testing.assert_close(variance, expected)


def test_guidance_keeps_image_and_noise_together(mixture, schedule, denoiser, classifier):
    """`x_t = alpha x_0 + sigma eps` for every guided prediction."""
    guide = Denoiser(Exact(mixture, schedule, gain=0.8), schedule, Eps())
    auto = AutoGuidance(Given(guide), run=None, step=0, scale=2.5, rescale=0.3, **OFF)
    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    for guidance in (cfg(3.0), auto, by(classifier, 2.0)):
        prediction = guidance(denoiser, classes(1))(x, t)
        torch.testing.assert_close(noised(schedule, prediction.x0, t, prediction.eps), x)


def test_thresholding_keeps_images_in_range_and_agrees_with_eps(denoiser, schedule):
    x, t = 3 * torch.randn(4, 1, 2, 2, dtype=F64), torch.tensor(0.7, dtype=F64)
    prediction = cfg(7.5, dynamic_threshold=0.9)(denoiser, classes(1))(x, t)
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
        return torch.randn(1500, 1, 2, 2, dtype=F64, generator=generator)

    y = torch.arange(1500) % 3
    *_, x = integrate(sampler, guidance(base, Condition.of(y)), draw(), sampler.grid(250), draw)
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
        *_, end = integrate(sampler, cfg(scale)(denoiser, Condition.of(y)), x, sampler.grid(50), lambda: x)
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


def test_a_classifier_cannot_guide_a_model_with_a_label_that_is_no_class(denoiser, classifier):
    number = AttributeDescription(name="label", kind="number", low=0, high=9)
    network = GreyNetwork(Conditions(attributes=(number,)))
    with pytest.raises(UsageError, match=r"^guidance=classifier: the label of this model is no class; "):
        by(classifier, 1.0).check(denoiser.with_network(network), Dropouts(0, 0), ["label"])
    by(classifier, 1.0).check(denoiser, Dropouts(0, 0), ["label"])


def test_a_classifier_leaves_images_without_a_class_unguided(denoiser, classifier):
    x, t = torch.linspace(-1, 1, 16, dtype=F64).view(4, 1, 2, 2), torch.tensor(0.3, dtype=F64)
    told = torch.tensor([1, -1, 2, -1])
    y = Condition.of(told)
    guided = by(classifier, 2.0)(denoiser, y)(x, t)
    free = denoiser(x, t, y)
    assert torch.equal(guided.eps[told < 0], free.eps[told < 0])
    assert ((guided.eps - free.eps)[told >= 0].abs() > 0).all()
    alone = by(classifier, 2.0)(denoiser, y.rows(torch.tensor([0, 2])))(x[::2], t)
    torch.testing.assert_close(guided.eps[::2], alone.eps)
