"""Guidance against independent numbers."""

from itertools import pairwise

import pytest
import torch

from diffusion_cli.diffusion.denoiser import Denoiser, Prediction, add_score, clip_x0, threshold_x0
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.posterior import posterior
from diffusion_cli.samplers import DDIM, DDPM, integrate
from helpers.guidance import Exact, T, Untold, by, cfg, classes, labels

F64 = torch.float64


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
        at_times(NoGuidance()(denoiser, classes(k)), arrays),
        arrays[f"eps_class{k}"],
        1e-12,
    )
    for w in (0.0, 1.0, 1.5, 3.0, 7.5):
        for kind, scale in (("df", w), ("ho", 1 + w)):
            name = f"cfg_{kind}_w{w}_class{k}"
            agree(f"guidance/{name}", at_times(cfg(scale)(denoiser, classes(k)), arrays), arrays[name], 1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("w", [1.5, 3.0, 7.5])
def test_rescaled_guidance(denoiser, reference, agree, w, phi):
    arrays = reference("guidance")
    for k in (0, 2):
        name = f"cfg_rescaled_w{w}_phi{phi}_class{k}"
        guided = cfg(w, rescale=phi)(denoiser, classes(k))
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
        states = run(cfg(w)(denoiser, classes(0)), schedule, x, 50)
        name = f"traj_ddim_cfg_w{w}_class0"
        agree(f"guidance/{name}", torch.stack([states[i] for i in (0, 25, 49)]), arrays[name], 1e-9)
    for k in (0, 2):
        name = f"traj_ddim_conditional_class{k}"
        agree(
            f"guidance/{name}",
            run(NoGuidance()(denoiser, classes(k)), schedule, x, 50)[-1],
            arrays[name],
            1e-9,
        )
        untold = Denoiser(Untold(mixture, schedule), schedule, Eps())
        states = run(by(classifier, 2.0)(untold, classes(k)), schedule, x, 50)
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
    guided = by(classifier, 2.0)(untold, classes(label))
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
