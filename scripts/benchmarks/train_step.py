"""A training step of two networks, by diffusers, by denoising-diffusion-pytorch and by us."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.ours import PARAMETERS, WORDS, Training, configured, count
from benchmarks.peers import Diffusers, Lucidrains
from benchmarks.race import Contestant, Table, ceiling, flops, paced, raced
from diffusion_cli.precision import resolve


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """The DDPM network at two batches of 3x32x32, and a small one at three sizes of one channel."""
    for batch in (128, 512) if device.type == "cuda" else (8, 16):
        yield _table("ddpm", (3, 32, 32), batch, rounds, device)
    for size in (8, 16, 32):
        yield _table("small", (1, size, size), 128, rounds, device)


def _table(
    name: str, shape: tuple[int, int, int], batch: int, rounds: int, device: torch.device
) -> Table:  # fmt: skip
    torch.manual_seed(0)
    x0 = torch.randn(batch, *shape, device=device)
    peer, other = Diffusers(name, shape, device, "fp32"), Lucidrains(name, shape, device)
    nominal, others = flops(lambda: peer.step(x0)), flops(lambda: other.step(x0))

    def contestant(
        title: str, step: Callable[[Tensor], None], precision: str, work: int = nominal
    ) -> Contestant:
        return Contestant(title, paced(lambda: step(x0), device), batch, work, precision)

    precisions = list(dict.fromkeys([resolve("auto", device), "fp32"]))
    trainings = {
        precision: Training(configured(WORDS[name]), shape, device, precision) for precision in precisions
    }
    for training in trainings.values():
        assert count(training.network) == count(peer.network) == PARAMETERS[name]
    on_gpu = device.type == "cuda"
    advised = Diffusers(name, shape, device, "bf16", recommended=on_gpu)
    contestants = [
        contestant("diffusers fp32", peer.step, "fp32"),
        contestant(
            f"diffusers bf16{', channels_last, torch.compile' if on_gpu else ''}", advised.step, "bf16"
        ),
        *(
            contestant(f"diffuse {precision}", training.step, precision)
            for precision, training in trainings.items()
        ),
        contestant(
            f"denoising-diffusion-pytorch fp32 (another network, of {count(other.network) / 1e6:.2f}M, by its own FLOPs)",
            other.step,
            "fp32",
            others,
        ),
    ]
    caption = (
        f"Training step of the network of {PARAMETERS[name] / 1e6:.2f}M parameters, {batch} images of "
        f"{'x'.join(map(str, shape))}, {nominal / batch / 1e9:.3g} GFLOP an image. GFLOP/s are of the operations that "
        "diffusers' network takes; ours takes fewer where it upsamples."
    )
    return raced(caption, contestants, rounds, {p: ceiling(device, p) for p in ("fp32", "bf16")})
