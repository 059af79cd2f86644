"""Compare trained consistency functions with the exact one, on data with a closed-form score.

    python scripts/compare_consistency.py --steps 3000

Images of 2x2 pixels are from a mixture of three Gaussians. The exact function takes x_t to the end of its path, the
probability flow ODE with the exact score. Consistency training and trajectory distillation take as many optimizer
steps as their teacher. The table has the root mean squares of the errors at states x_t of several noise levels,
divided by the standard deviation of the data. The last two rows are errors of the teacher: at the end of its own
paths, which are the targets of trajectory distillation, and of its prediction of x_0, a mean, in place of a
consistency function.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import diffusion_cli as diffuse
from diffusion_cli.cli import run
from diffusion_cli.data import GaussianMixture
from diffusion_cli.diffusion.denoiser import Denoise, Prediction
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.model import Model
from diffusion_cli.samplers import ODE

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""sigma / alpha of the states."""
STUDENTS = {
    "consistency training": ["experiment=consistency"],
    "trajectory distillation": ["experiment=trajectory_distillation"],
}
"""Words of `diffuse train` by method."""


def trained(folder: Path, name: str, steps: int, words: list[str]) -> Model:
    """Return a trained model; a finished run is used again."""
    command = [
        "train", f"name={name}", f"output_dir={folder}", "dataset=gaussian_mixture", "model.channel_mult=[1]",
        "parameterization=v", f"max_steps={steps}", "trainer=cpu", "logger=csv", "preview_every=null",
        "validate_every=1000000", *words,
    ]  # fmt: skip
    if code := run(command):
        raise SystemExit(code)
    return diffuse.load(folder / name)


def path_end(denoise: Denoise, schedule: Schedule, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the ends of the paths of a denoiser from x_t at time t, float64."""
    last = torch.tensor(schedule.grid_t_min, dtype=torch.float64)
    x, _ = ODE(schedule, rtol=1e-4, atol=1e-5).step(denoise, x_t, t, last, no_noise, None)
    return denoise(x, last).x0.double()


def no_noise() -> Tensor:
    raise AssertionError("the probability flow has no noise")


def exact(mixture: GaussianMixture, schedule: Schedule, x_t: Tensor, t: Tensor) -> Prediction:
    """Return the optimal prediction of the mixture."""
    alpha, sigma = schedule(t)
    x0 = mixture.denoise(x_t, alpha, sigma)
    return Prediction(x0, (x_t - alpha * x0) / sigma, sigma)


def main() -> None:
    """Train the models and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each training")
    parser.add_argument("--count", type=int, default=1000, help="states of each noise level")
    parser.add_argument("--output", type=Path, default=Path("outputs/consistency"), help="folder of the runs")
    arguments = parser.parse_args()
    teacher = trained(arguments.output, "teacher", arguments.steps, [])
    start = [f"init.run={arguments.output / 'teacher'}"]
    students = {
        method: trained(arguments.output, method.replace(" ", "_"), arguments.steps, [*start, *words])
        for method, words in STUDENTS.items()
    }
    schedule = teacher.denoiser.schedule
    mixture = GaussianMixture("", size=arguments.count)
    x0 = mixture.load("val").pixels.double()
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        method: lambda x_t, t, model=model: model.denoise(x_t, t).x0 for method, model in students.items()
    }
    methods["the teacher's paths"] = partial(path_end, teacher.denoiser, schedule)
    methods["the teacher's x_0"] = lambda x_t, t: teacher.denoise(x_t, t).x0
    print(f"| sigma / alpha | {' | '.join(f'{level:g}' for level in LEVELS)} |")
    print("|---" * (len(LEVELS) + 1) + "|")
    states: list[tuple[Tensor, Tensor, Tensor]] = []
    for level in LEVELS:
        t = schedule.time_of(-2 * torch.tensor(level, dtype=torch.float64).log())
        alpha, sigma = schedule(t)
        x_t = alpha * x0 + sigma * eps
        states.append((x_t, t, path_end(partial(exact, mixture, schedule), schedule, x_t, t)))
    for method, function in methods.items():
        errors = [
            (function(x_t.float(), t).double() - end).square().mean().sqrt() / x0.std()
            for x_t, t, end in states
        ]
        print(f"| {method} | {' | '.join(f'{error:.4f}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    main()
