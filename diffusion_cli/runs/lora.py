"""Low-rank adapters (LoRA) in checkpoints: read the frozen weights of a run, and merge the adapters into them.

A checkpoint of such a run has only what it trains: adapters, layers that its source lacks, and buffers. The frozen
weights are once in the run folder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.schema import LoraInfo
from diffusion_cli.system.tensors import digest, read_tensors
from diffusion_cli.system.untrusted import reason

BASE = "base.safetensors"
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""Ends of the names of A and B of a layer, as in modules of peft."""


def read_base(run: Path, lora: LoraInfo) -> dict[str, Tensor]:
    """Return the frozen weights of a run by name; UsageError if they are missing, damaged or of another run."""
    path = run / BASE
    try:
        state = read_tensors(path)
        if digest(state) != lora.sha256:
            raise FormatError("has other weights than those that the run was trained with")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        raise UsageError(
            path,
            NO_VALUE,
            f"the frozen weights of the run cannot be read ({why})",
            "restore it, or choose another run",
        ) from error
    return state


def merged(trained: Mapping[str, Tensor], base: Mapping[str, Tensor], lora: LoraInfo) -> dict[str, Tensor]:
    """Return all weights of a network, `W + alpha / r B A` for each layer with an adapter.

    The sum is computed in float64, so that a weight has one rounding.

    Args:
        trained: weights of a checkpoint: A [r, in] and B [out, r] of each adapter, and new layers.
        base: frozen weights, as W [out, in].
        lora: rank r and alpha.

    Raises:
        FormatError: an adapter has no layer, or does not fit it.

    Source: Hu et al. 2022, Eq. 3.
    """
    adapters = {name for name in trained if name.endswith((DOWN, UP))}
    result = {**base, **{name: weight for name, weight in trained.items() if name not in adapters}}
    layers = sorted({name.removesuffix(DOWN).removesuffix(UP) for name in adapters})
    for layer in layers:
        weight = base.get(f"{layer}.weight")
        down, up = trained.get(layer + DOWN), trained.get(layer + UP)
        if weight is None or down is None or up is None:
            raise FormatError(f"the adapter of {layer} is incomplete, or has no layer")
        shapes = weight.ndim == 2 and (down.shape, up.shape) == (
            (lora.rank, weight.shape[1]),
            (weight.shape[0], lora.rank),
        )
        if not shapes or not down.is_floating_point() or not up.is_floating_point():
            raise FormatError(f"the adapter of {layer} does not fit its layer")
        scale = lora.alpha / lora.rank
        total = torch.addmm(weight.double(), up.double(), down.double(), alpha=scale)
        result[f"{layer}.weight"] = total.to(weight.dtype)
    return result
