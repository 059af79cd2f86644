"""A training step of two networks, by diffusers, by denoising-diffusion-pytorch and by us."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.ours import PARAMETERS, WORDS, Training, configured, count
from benchmarks.peers import Diffusers, Lucidrains
from benchmarks.race import Contestant, Table, ceilings, flops, paced, raced
from diffusion_cli.precision import resolve


class Step(Protocol):
    """What trains one step at a time."""

    def step(self, x0: Tensor) -> None:
        """Train on images."""
        ...


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """The DDPM network at two batches of 3x32x32, and a small one at three sizes of one channel."""
    for batch in (128, 512) if device.type == "cuda" else (8, 16):
        yield _table("ddpm", (3, 32, 32), batch, rounds, device)
    for size in (8, 16, 32):
        yield _table("small", (1, size, size), 128, rounds, device)


def _table(name: str, shape: tuple[int, int, int], batch: int, rounds: int, device: torch.device) -> Table:
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    x0 = torch.randn(batch, *shape, device=device)
    diffusers, lucidrains = Diffusers(name, shape, device, "fp32"), Lucidrains(name, shape, device)
    advised = Diffusers(name, shape, device, "bf16", recommended=on_gpu)
    ours = {
        precision: Training(configured(WORDS[name]), shape, device, precision)
        for precision in dict.fromkeys([resolve("auto", device), "fp32"])
    }
    for training in (diffusers, advised, *ours.values()):
        assert count(training.network) == PARAMETERS[name]
    nominal, others = flops(lambda: diffusers.step(x0)), flops(lambda: lucidrains.step(x0))

    def contestant(title: str, training: Step, precision: str, work: int = nominal) -> Contestant:
        return Contestant(title, paced(lambda: training.step(x0), device), batch, work, precision)

    contestants = [
        contestant("diffusers fp32", diffusers, "fp32"),
        contestant(f"diffusers bf16{', channels_last, compiled' if on_gpu else ''}", advised, "bf16"),
        *(contestant(f"diffuse {precision}", training, precision) for precision, training in ours.items()),
        contestant("denoising-diffusion-pytorch fp32 (another network)", lucidrains, "fp32", others),
    ]
    caption = (
        f"Training step of the network of {PARAMETERS[name] / 1e6:.2f}M parameters, {batch} images of "
        f"{'x'.join(map(str, shape))}. GFLOP/s are of the operations that diffusers' network takes, "
        f"{nominal / batch / 1e9:.3g} GFLOP an image; ours takes fewer where it upsamples. "
        f"denoising-diffusion-pytorch's is another network, of {count(lucidrains.network) / 1e6:.2f}M parameters and "
        f"{others / batch / 1e9:.3g} GFLOP an image, by which its GFLOP/s are counted."
    )
    return raced(caption, contestants, rounds, ceilings(device))
