"""Compare restoration methods on an inpainting task with a known conditional distribution.

    python scripts/compare_restoration.py

Images of 2x2 pixels are from a mixture of three Gaussians, and the first pixel is known. DDPM samples with the optimal
denoiser of the mixture; the conditional distribution given the pixel is known in closed form.
"""

import argparse
from collections import deque

import torch

from diffusion_cli.data import GaussianMixture
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.schedules import Linear
from diffusion_cli.editing import DPS, EditProcess, Mask, RePaint, Replacement, RestorationMethod
from diffusion_cli.samplers import DDPM

MEANS = [[-0.6, -0.2, 0.3, 0.5], [0.5, 0.4, -0.4, 0.1], [0.1, -0.7, 0.6, -0.5]]
STD = 0.3
SEEN = 0.25


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20000, help="samples")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    mixture = GaussianMixture(
        "", means=MEANS, stds=[STD] * 3, weights=[0.5, 0.3, 0.2], shape=[1, 2, 2], size=1, seed=0
    )
    print(
        "| method | resampling steps | network calls | error of component frequencies | of means | of deviations |"
    )
    print("|---|---|---|---|---|---|")
    cases: list[tuple[str, int, RestorationMethod]] = [("replacement", 1, Replacement())]
    cases += [("repaint", n, RePaint(num_resamples=n, jump_length=1)) for n in (2, 5, 10, 20, 50)]
    cases += [(f"dps, scale {scale:g}", 1, DPS(scale=scale)) for scale in (0.1, 0.3, 1.0)]
    for name, resamples, method in cases:
        errors = measure(mixture, method, arguments.steps, arguments.count)
        cells = " | ".join(f"{error:.3f}" for error in errors)
        print(f"| {name} | {resamples} | {resamples * arguments.steps} | {cells} |", flush=True)


def measure(
    mixture: GaussianMixture, method: RestorationMethod, steps: int, count: int
) -> tuple[float, float, float]:
    """Return the total variation of the component frequencies, and the largest errors of mean and deviation."""
    schedule = Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False)
    sampler = DDPM(schedule, variance="small", spacing="trailing")
    operator = Mask(torch.tensor([[True, False], [False, False]])[None, None])
    y = torch.zeros(count, 1, 2, 2, dtype=torch.float64)
    y[:, :, 0, 0] = SEEN
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=generator)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        alpha, sigma = schedule(t)
        x0 = mixture.denoise(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    process = EditProcess(
        sampler, sampler.grid(steps), None, lambda y: denoise, lambda label: denoise, method, draw, Pixels(())
    )
    (x,) = deque(method.restore(process, operator, y), maxlen=1)
    x = operator.project(x, y)
    # Given the pixel, component k has weight w_k N(seen; m_k, s_k^2); its other pixels are unchanged.
    weights = (
        mixture.weights.log() - 0.5 * ((SEEN - mixture.means[:, 0]) / mixture.stds) ** 2 - mixture.stds.log()
    ).softmax(0)
    mean = weights @ mixture.means[:, 1:]
    variance = weights @ (mixture.stds[:, None] ** 2 + mixture.means[:, 1:] ** 2) - mean**2
    density = torch.stack([mixture.log_prob(x, label=k) for k in range(3)]) + mixture.weights.log()[:, None]
    frequencies = density.softmax(0).mean(1)
    unknown = x.flatten(1)[:, 1:]
    return (
        0.5 * (frequencies - weights).abs().sum().item(),
        (unknown.mean(0) - mean).abs().max().item(),
        (unknown.std(0) - variance.sqrt()).abs().max().item(),
    )


if __name__ == "__main__":
    main()
