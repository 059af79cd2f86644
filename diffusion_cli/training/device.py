"""The devices of training, on one node or several."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from pydantic import Field, PositiveInt

from diffusion_cli.errors import UsageError, first_line
from diffusion_cli.system.distributed import started
from diffusion_cli.system.precision import device_of


class Device:
    """The devices of a run: `devices` on each of `num_nodes` nodes; null: as many as were started, or 1.

    "ddp" replicates the model, its EMA weights and the optimizer state on each device (Li et al. 2020);
    "fsdp" shards them (Zhao et al. 2023). `deterministic` allows only algorithms with equal results on every call;
    `profiler` measures the parts of training; `fast_dev_run` trains one step and keeps nothing.

    Raises UsageError if torch sees no such device.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        devices: PositiveInt | None = None,
        num_nodes: PositiveInt | None = None,
        strategy: Literal["ddp", "fsdp"] = "ddp",
        offload_ema: bool = False,
        timeout: Annotated[int, Field(ge=120, le=7 * 86400)] = 1800,
        threads: Annotated[int, Field(ge=1, le=4096)] | None = None,
        deterministic: bool = False,
        profiler: Literal["simple", "pytorch"] | None = None,
        fast_dev_run: bool = False,
    ) -> None:
        try:
            self.torch_device: torch.device = device_of(accelerator)
        except ValueError as error:
            raise UsageError(
                "trainer", "gpu", "torch sees no GPU on this machine", "use trainer=cpu or trainer=auto"
            ) from error
        if threads is not None:
            torch.set_num_threads(threads)
        if deterministic:  # read when cuBLAS starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.deterministic, self.profiler, self.fast_dev_run = deterministic, profiler, fast_dev_run
        self.offload_ema = offload_ema
        self.strategy = strategy
        self.devices, self.num_nodes, self.timeout = devices, num_nodes, timeout

    def plugins(self, precision: str) -> list[Any]:
        """Return the plugins of Lightning's Trainer for a precision: fp32, bf16 or fp16."""
        if precision == "fp16" and self.strategy == "fsdp":
            raise UsageError(
                "precision",
                "fp16",
                "is not supported with trainer.strategy=fsdp",
                "use bf16 or fp32, or trainer.strategy=ddp",
            )
        if precision == "fp16" and self.torch_device.type == "mps":
            raise UsageError("precision", "fp16", "is not supported on Apple GPUs", "use bf16 or fp32")
        # The processes run already; Lightning would detect those of a batch job too, and wait for them.
        place: ClusterEnvironment = (
            TorchElasticEnvironment() if started().world > 1 else LightningEnvironment()
        )
        if precision == "fp32":
            return [place, Precision()]
        kind = self.torch_device.type
        if precision == "bf16":
            return [place, MixedPrecision("bf16-mixed", kind)]
        return [place, MixedPrecision("16-mixed", kind, torch.amp.GradScaler(kind))]

    def trainer_arguments(self) -> dict[str, Any]:
        """Return the arguments of Lightning's Trainer about devices."""
        place = started()
        # A task of srun sees all GPUs of its node or only one.
        visible = torch.cuda.device_count() if self.torch_device.type == "cuda" else 0
        devices = [
            torch.device("cuda", number % visible) if visible else torch.device("cpu")
            for number in range(place.local_world)
        ]
        strategy: Strategy | str = "auto"
        if place.world > 1 and self.strategy == "fsdp":
            strategy = ModelParallelStrategy(
                data_parallel_size=place.world, tensor_parallel_size=1, save_distributed_checkpoint=False
            )
            strategy.parallel_devices = devices
        elif place.world > 1:
            # Buffers are equal in all processes.
            strategy = DDPStrategy(
                parallel_devices=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return {
            "accelerator": self.torch_device.type,
            "devices": 1 if place.world == 1 else "auto",  # the strategy has its own list
            "num_nodes": place.nodes,
            "strategy": strategy,
            "deterministic": self.deterministic,
        }

    def profile(self, folder: Path, step: int) -> Profiler | None:
        """Return the profiler of a start at a step, which writes to `profile/` in the folder of the run; or None."""
        if self.profiler is None:
            return None
        kind = SimpleProfiler if self.profiler == "simple" else PyTorchProfiler
        return kind(dirpath=folder / "profile", filename=f"{self.profiler}-{step}")


@contextmanager
def naming_nondeterministic() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic algorithm into a UsageError."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        problem = f"{first_line(error).partition(',')[0]} on this device"
        raise UsageError(
            "trainer.deterministic", True, problem, "leave it out, or use trainer=cpu"
        ) from error
