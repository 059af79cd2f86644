"""Training step of two networks, by diffusers, denoising-diffusion-pytorch and diffuse."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.ours import PARAMETERS, WORDS, Training, configured, count
from benchmarks.peers import Diffusers, Lucidrains
from benchmarks.race import Contestant, Table, ceilings, flops, paced, raced
from diffusion_cli.system.precision import resolve


class Step(Protocol):
    """A training loop."""

    def step(self, x0: Tensor) -> None:
        """Train on images."""
        ...


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """The DDPM network at two batch sizes of 3x32x32, and a small one at three sizes of one channel."""
    for batch in (128, 512) if device.type == "cuda" else (8, 16):
        yield _table("ddpm", (3, 32, 32), batch, rounds, device)
    for size in (8, 16, 32):
        yield _table("small", (1, size, size), 128, rounds, device)


def short_tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """A single comparison with diffusers: the DDPM network on a GPU, the small one on a CPU."""
    if device.type == "cuda":
        yield _table("ddpm", (3, 32, 32), 128, rounds, device, short=True)
    else:
        yield _table("small", (1, 8, 8), 16, rounds, device, short=True)


def _table(
    name: str, shape: tuple[int, int, int], batch: int, rounds: int, device: torch.device, short: bool = False
) -> Table:
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    x0 = torch.randn(batch, *shape, device=device)
    diffusers = Diffusers(name, shape, device, "fp32")
    advised = Diffusers(name, shape, device, "bf16", recommended=on_gpu)
    auto = resolve("auto", device)
    precisions = [auto] if short or auto == "fp32" else [auto, "fp32"]
    ours = {
        precision: Training(configured(WORDS[name]), shape, device, precision) for precision in precisions
    }
    for training in (diffusers, advised, *ours.values()):
        assert count(training.network) == PARAMETERS[name]
    nominal = flops(lambda: diffusers.step(x0))

    def contestant(title: str, training: Step, precision: str, work: int = nominal) -> Contestant:
        return Contestant(title, paced(lambda: training.step(x0), device), batch, work, precision)

    contestants = [
        contestant("diffusers fp32", diffusers, "fp32"),
        contestant(f"diffusers bf16{', channels_last, compiled' if on_gpu else ''}", advised, "bf16"),
        *(contestant(f"diffuse {precision}", training, precision) for precision, training in ours.items()),
    ]
    caption = (
        f"Training step of the network of {PARAMETERS[name] / 1e6:.2f}M parameters, {batch} images of "
        f"{'x'.join(map(str, shape))}. GFLOP/s are of the operations that diffusers' network takes, "
        f"{nominal / batch / 1e9:.3g} GFLOP an image; ours takes fewer where it upsamples."
    )
    if not short:
        lucidrains = Lucidrains(name, shape, device)
        others = flops(lambda: lucidrains.step(x0))
        contestants += [
            contestant("denoising-diffusion-pytorch fp32 (another network)", lucidrains, "fp32", others)
        ]
        caption += (
            f" denoising-diffusion-pytorch's is another network, of {count(lucidrains.network) / 1e6:.2f}M parameters "
            f"and {others / batch / 1e9:.3g} GFLOP an image, by which its GFLOP/s are counted."
        )
    return raced(caption, contestants, rounds, ceilings(device, short))
