"""Peak memory and time of the second training step of the DDPM network for several options, in fresh processes."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.probe import afresh, observed, trainer_option
from benchmarks.race import Cells, Table

OPTIONS = {
    "plain": ([], ""),
    "precision=bf16": (["precision=bf16"], "rounding"),
    "model.gradient_checkpointing=true": (["model.gradient_checkpointing=true"], ""),
    "accumulate_grad_batches=4": (["accumulate_grad_batches=4"], "noise"),
    "bf16, checkpointing and accumulate_grad_batches=4": (
        ["precision=bf16", "model.gradient_checkpointing=true", "accumulate_grad_batches=4"], "rounding, noise",
    ),
    "trainer.offload_ema=true": (["trainer.offload_ema=true"], ""),
    "2 processes, ddp": (["trainer.devices=2"], "dropout, order of sums"),
    "2 processes, fsdp": (["trainer.devices=2", "trainer.strategy=fsdp"], "dropout, order of sums"),
    "precision=fp16": (["precision=fp16"], "rounding"),
}  # fmt: skip
"""Arguments of each option, and why its weights differ from those without it."""


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """Each option once, regardless of `rounds`."""
    fixed = [
        "model=unet_cifar10", f"batch_size={64 if device.type == 'cuda' else 8}", "max_steps=2", "precision=fp32",
        trainer_option(device), "trainer.threads=1",
    ]  # fmt: skip
    of_option: dict[str, dict[str, Any]] = {}
    rows: list[Cells] = []
    for name, (words, why) in OPTIONS.items():
        if device.type == "cuda" and "trainer.devices=2" in words and torch.cuda.device_count() < 2:
            continue
        taken = of_option[name] = afresh(observed, [*fixed, *words])
        plain = of_option["plain"]
        peak, seconds, cpu = (taken[key] / plain[key] for key in ("peak", "seconds", "cpu_seconds"))
        rows.append((
            name, f"{taken['peak'] / 1e6:.0f}", f"{peak:.3g}", f"{taken['optimizer_state'] / 1e6:.0f}",
            f"{seconds:.3g}", f"{cpu:.3g}",
            "the same bits" if taken["weights"] == plain["weights"] else f"others: {why}",
        ))  # fmt: skip
    head = (
        "option", "peak, MB", "over plain", "optimizer state, MB", "step time over plain", "its CPU time", "weights",
    )  # fmt: skip
    yield Table("Second training step of the DDPM network, one thread a process.", head, rows, of_option)
