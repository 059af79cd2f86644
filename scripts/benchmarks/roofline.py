"""Roofline of the DDPM network: its operations by arithmetic intensity, and the measured ceilings."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.ours import model_of
from benchmarks.race import bandwidth, ceiling, paced
from diffusion_cli.system.precision import autocast

PRECISIONS = {"fp32": "tab:blue", "bf16": "tab:orange"}
ROUNDS = 3  # the fastest counts, for operations and ceilings


class Operation(NamedTuple):
    """FLOP, bytes and seconds of a call of an operator."""

    flops: int
    bytes: int
    seconds: float


class Operations(TorchDispatchMode):
    """Records every call of an operator with countable floating-point operations, and all bytes moved."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counted: list[Operation] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self._now()
        out = func(*args, **(kwargs or {}))
        seconds = self._now() - start
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        moved = 0 if func.is_view else sum(each.nbytes for each in tensors)
        self.bytes += moved
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            self.counted.append(Operation(flops, moved, seconds))
        return out

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measured(device: torch.device) -> dict[str, Any]:
    """Ceilings, and the forward pass of the DDPM network by operation, in each precision."""
    batch = 128 if device.type == "cuda" else 16
    network = model_of("ddpm", device).denoiser.network
    x, t = torch.randn(batch, 3, 32, 32, device=device), torch.full((batch,), 500.0, device=device)
    found: dict[str, Any] = {"batch": batch, "bytes_per_second": bandwidth(device)}
    for precision in PRECISIONS:
        # Not in inference mode, which dispatches composite operators that cannot be counted.
        with torch.no_grad(), autocast(device, precision):
            forward = paced(lambda: network(x, t), device)
        rounds = []
        for _ in range(ROUNDS):
            with torch.no_grad(), autocast(device, precision):
                seconds = forward()
                with Operations(device) as operations:
                    network(x, t)
            rounds.append((ceiling(device, precision), seconds, operations))
        ceilings, times, passes = zip(*rounds, strict=True)
        same_calls = zip(*(each.counted for each in passes), strict=True)
        calls = [min(same, key=lambda call: call.seconds) for same in same_calls]
        whole = Operation(sum(call.flops for call in calls), passes[0].bytes, min(times))
        found[precision] = {
            "ceiling": max(ceilings),
            "operations": [call._asdict() for call in calls],
            "forward": whole._asdict(),
        }
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the results: a roof per precision, a dot per operation, and a star for the whole forward pass."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    intensity = np.geomspace(0.3, 3000, 200)
    for precision, color in PRECISIONS.items():
        part = found[precision]
        roof = np.minimum(intensity * found["bytes_per_second"], part["ceiling"]) / 1e9
        axes.plot(
            intensity, roof, color=color, label=f"{precision}: at most {part['ceiling'] / 1e9:.0f} GFLOP/s"
        )
        for calls, marker, size in ((part["operations"], ".", 25), ([part["forward"]], "*", 200)):
            axes.scatter(
                [call["flops"] / call["bytes"] for call in calls],
                [call["flops"] / call["seconds"] / 1e9 for call in calls],
                marker=marker, s=size, color=color, edgecolors="white", linewidths=0.4, zorder=3,
            )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP for each byte moved", ylabel="GFLOP/s",
        title=f"Forward pass of the DDPM network, {found['batch']} images of 32x32: operations, and the whole (star)",
    )  # fmt: skip
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(title=f"memory: {found['bytes_per_second'] / 1e9:.0f} GB/s", loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
