"""Time and memory of short training runs in processes of their own."""

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.ours import configured
from diffusion_cli.commands.train import train
from diffusion_cli.config import TrainConfig
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.system.distributed import Distributed, launch
from diffusion_cli.system.tensors import digest
from diffusion_cli.training.callbacks import GracefulStop
from diffusion_cli.training.module import TrainingModule


class Probe:
    """Records the end of each optimizer step of `diffuse train` in this process, and the memory in use.

    On a GPU, the peak is that of torch's allocator; on the CPU, the peak resident memory (VmHWM of Linux) minus the
    memory before the model was built.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.peak = self.optimizer_state = 0
        before, original = resident(), GracefulStop.on_optimizer_step

        def watched(stop: GracefulStop, trainer: Trainer, module: TrainingModule, step: int) -> None:
            original(stop, trainer, module, step)
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.cpu_ends.append(time.process_time())
            on_gpu = module.device.type == "cuda"
            self.peak = torch.cuda.max_memory_allocated() if on_gpu else _most_resident() - before
            self.optimizer_state = sum(
                _local_bytes(value)
                for values in trainer.optimizers[0].state.values()
                for value in values.values()
            )

        GracefulStop.on_optimizer_step = watched  # pyright: ignore[reportAttributeAccessIssue]

    def taken(self) -> dict[str, float]:
        """Return median wall and CPU seconds between the ends of steps, and memory in bytes."""
        seconds, cpu_seconds = (
            median(after - before for before, after in pairwise(ends)) for ends in (self.ends, self.cpu_ends)
        )
        return {
            "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": self.peak, "optimizer_state": self.optimizer_state,
        }  # fmt: skip


def _local_bytes(value: object) -> int:
    """Return the part of a tensor in this process."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.nbytes if isinstance(local, Tensor) else 0


def _most_resident() -> int:
    """Return the peak memory in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def observed(words: list[str]) -> dict[str, Any]:
    """Results of a short `diffuse train` on random 32x32 images, with the SHA-256 of the final weights.

    With several processes, these are the maxima over processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, np.random.default_rng(0).integers(256, size=(256, 32, 32, 3), dtype=np.uint8))
        fixed = [
            f"output_dir={folder}", "name=run", "dataset=array", f"dataset.path={images}", "dataset.val_fraction=0",
            "compile=false", "logger=csv", "preview_every=100000", "log_every=100000",
        ]  # fmt: skip
        checked = configured([*fixed, *words])
        found = Path(folder) / "found.json"
        launch(_observe, checked, found, processes=checked.trainer["devices"])
        weights = digest(read(Path(folder) / "run" / LAST).state["state_dict"])
        return {**json.loads(found.read_text()), "weights": weights}


def _observe(checked: TrainConfig, found: Path) -> None:
    """Train as one of the processes, and record the maxima over all."""
    probe = Probe()
    train(checked)
    taken = Distributed().all_gather(probe.taken())
    if Distributed().is_main:
        found.write_text(json.dumps({key: max(each[key] for each in taken) for key in taken[0]}))


def afresh(function: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of a function in a new process with its output discarded."""
    with ProcessPoolExecutor(1, get_context("spawn"), _be_silent) as pool:
        return pool.submit(function, *arguments).result()


def _be_silent() -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def resident() -> int:
    """Return the memory in use, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def trainer_option(device: torch.device) -> str:
    """Return the argument of `diffuse train` for a device."""
    return f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}"
