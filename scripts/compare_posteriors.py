"""Compare restoration methods on noisy linear measurements with a posterior in closed form.

    python scripts/compare_posteriors.py

Images of 4x4 pixels are from a mixture of three Gaussians. DDIM samples with the optimal denoiser of the mixture and
one measurement with noise. The posterior is a mixture of Gaussians.
"""

import argparse
import math
import time

import torch
from torch import Tensor

from diffusion_cli.data import GaussianMixture
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.schedules import Linear
from diffusion_cli.editing import (
    CT,
    DPS,
    MRI,
    DiffPIR,
    EditProcess,
    GaussianFilter,
    LinearMeasurement,
    MotionFilter,
    PiGDM,
    RestorationMethod,
)
from diffusion_cli.samplers import DDIM

SHAPE = (1, 4, 4)
STD = 0.3
OPERATORS: dict[str, LinearMeasurement] = {
    "gaussian_blur": GaussianFilter(SHAPE, sigma=0.7),
    "motion_blur": MotionFilter(SHAPE, length=3.0),
    "ct, 2 angles": CT(SHAPE, angles=2),
    "mri, half": MRI(SHAPE, acceleration=2.0, centre=0.25),
}
METHODS: dict[str, RestorationMethod] = {
    "dps, scale 0.3": DPS(scale=0.3),
    "dps, scale 1": DPS(scale=1.0),
    "pigdm, data_std 1": PiGDM(),
    "pigdm, data_std 0.3": PiGDM(data_std=STD),
    "diffpir, zeta 0": DiffPIR(zeta=0.0),
    "diffpir, zeta 0.3": DiffPIR(zeta=0.3),
    "diffpir, zeta 1": DiffPIR(zeta=1.0),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="samples")
    parser.add_argument("--sigma-y", type=float, default=0.1, help="standard deviation of the noise")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    arguments = parser.parse_args()
    mixture = example()
    print(
        "| measurement | method | steps | error of the mean | of the covariance | coverage of 90 % | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for operator_name, operator in OPERATORS.items():
        for name, method in METHODS.items():
            for steps in arguments.steps:
                numbers = measure(mixture, operator, method, steps, arguments)
                cells = " | ".join(f"{number:.2f}" for number in numbers)
                print(f"| {operator_name} | {name} | {steps} | {cells} |", flush=True)


def example() -> GaussianMixture:
    """Return three Gaussians with random means."""
    means = (0.5 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))).tolist()
    return GaussianMixture(
        "", means=means, stds=[STD] * 3, weights=[0.5, 0.3, 0.2], shape=SHAPE, size=1, seed=0
    )


def posterior(
    mixture: GaussianMixture, matrix: Tensor, y: Tensor, sigma_y: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights [K], means [K, d] and covariances [K, d, d] of x given `y = A x + sigma_y z`, A = `matrix`."""
    weights, means, covariances = [], [], []
    for weight, mean, std in zip(mixture.weights, mixture.means, mixture.stds, strict=True):
        spread = std**2 * matrix @ matrix.T + sigma_y**2 * torch.eye(len(y), dtype=y.dtype)
        gain = std**2 * torch.linalg.solve(spread, matrix).T
        off = y - matrix @ mean
        likelihood = -0.5 * (off @ torch.linalg.solve(spread, off) + torch.logdet(spread))
        weights.append(weight.log() + likelihood)
        means.append(mean + gain @ off)
        covariances.append(std**2 * (torch.eye(len(mean), dtype=y.dtype) - gain @ matrix))
    return torch.stack(weights).softmax(0), torch.stack(means), torch.stack(covariances)


def moments(weights: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [d] and covariance [d, d] of a mixture of Gaussians."""
    mean = weights @ means
    centred = means - mean
    return mean, torch.einsum("k,kij->ij", weights, covariances) + (weights[:, None] * centred).T @ centred


def measure(
    mixture: GaussianMixture,
    operator: LinearMeasurement,
    method: RestorationMethod,
    steps: int,
    arguments: argparse.Namespace,
) -> tuple[float, float, float, float]:
    """Return relative errors of mean and covariance, coverage of the intervals, and the seconds."""
    generator, count, size = torch.Generator().manual_seed(0), arguments.count, math.prod(SHAPE)
    matrix = operator(torch.eye(size, dtype=torch.float64).view(-1, *SHAPE)).flatten(1).T
    truth = mixture.means[0] + STD * torch.randn(size, dtype=torch.float64, generator=generator)
    clean = operator(truth.view(1, *SHAPE))
    y = clean + arguments.sigma_y * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    exact = posterior(mixture, matrix, y.flatten(), arguments.sigma_y)
    mean, covariance = moments(*exact)
    schedule = Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False)

    def draw() -> Tensor:
        return torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule(t)
        x0 = mixture.denoise(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    sampler = DDIM(schedule)
    process = EditProcess(
        sampler, sampler.grid(steps), None, lambda y: denoise, lambda y: denoise, method, draw, Pixels(SHAPE),
        sigma_y=arguments.sigma_y,
    )  # fmt: skip
    begin = time.perf_counter()
    x = process.restored(operator, y.expand(count, *y.shape[1:]))
    seconds, x = time.perf_counter() - begin, x.flatten(1)
    weights, means, covariances = exact
    component = torch.multinomial(weights, 5000, replacement=True, generator=generator)
    roots = torch.linalg.cholesky(covariances)[component]
    true = means[component] + (
        roots @ torch.randn(5000, size, 1, dtype=torch.float64, generator=generator)
    ).squeeze(-1)
    low, high = x.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
    return (
        float((x.mean(0) - mean).norm() / covariance.trace().sqrt()),
        float((x.T.cov() - covariance).norm() / covariance.norm()),
        float(((true > low) & (true < high)).double().mean()),
        seconds,
    )


if __name__ == "__main__":
    main()
