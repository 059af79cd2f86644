"""Selection of the device and the precision."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from diffusion_cli.errors import UsageError
from diffusion_cli.system.compat import cpu_has_bf16

NumberFormat = Literal["fp32", "bf16", "fp16"]
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str) -> torch.device:
    """Return the device named auto, cpu, cuda, mps or gpu (cuda or mps); UsageError if it does not exist here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "gpu":
        name = "mps" if torch.backends.mps.is_available() and not torch.cuda.is_available() else "cuda"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device", "mps", "torch sees no Apple GPU here", "use device=cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device", "cuda", "torch sees no GPU here", "use device=cpu, or install torch with CUDA"
        )
    return torch.device(name)


def resolve(precision: NumberFormat | Literal["auto"], device: torch.device) -> NumberFormat:
    """Return the precision; `auto` is bf16 on hardware with bfloat16, else fp32."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the hardware has bfloat16: Ampere and later GPUs, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has_bf16()


def emulated_format(precision: NumberFormat, device: torch.device) -> str | None:
    """Return a warning about a precision that a CPU without its instructions emulates; None for others."""
    if device.type != "cpu" or precision == "fp32" or (precision == "bf16" and has_fast_bf16(device)):
        return None
    better = resolve("auto", device)
    return f"precision={precision}: this CPU emulates it, which is slower than fp32; use precision={better}"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context in which a network computes in fp32, bf16 or fp16; weights and images stay float32."""
    if precision == "fp32":
        # By default cuDNN convolves in TF32, with 10 of 23 mantissa bits.
        return torch.backends.cudnn.flags(
            enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False,
            deterministic=torch.backends.cudnn.deterministic,
        )  # fmt: skip
    return torch.autocast(device.type, FORMATS[precision])
