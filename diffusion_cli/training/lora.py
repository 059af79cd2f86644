"""Low-rank adapters (LoRA) of a network in training, by the library peft."""

import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from diffusion_cli.errors import UsageError
from diffusion_cli.runs.lora import DOWN
from diffusion_cli.runs.schema import LoraInfo
from diffusion_cli.system.tensors import digest
from diffusion_cli.training.initialization import matching


def add_adapters(
    network: nn.Module,
    rank: int,
    alpha: float | None,
    targets: Literal["auto"] | Sequence[str],
    new: Collection[str],
) -> LoraInfo:
    """Add an adapter to linear layers, `W x + alpha / r B A x` with B = 0 at first, and freeze all other weights.

    The state dict of the network gets only what is trained, and its buffers.

    Args:
        network: network with trained weights.
        rank: rank r of the adapters.
        alpha: scale of the adapters; None for r.
        targets: names or patterns of linear layers, or of modules with such layers; "auto" for all layers.
        new: names of weights without training, which are trained as a whole.

    Raises:
        UsageError: peft is not installed, a pattern matches no linear layer, or the rank is larger than a layer's.

    Source: Hu et al. 2022.
    """
    layers = {
        name: layer for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not {f"{name}.weight", f"{name}.bias"} & {*new}
    }  # fmt: skip
    if not layers:
        problem = "the network has no trained linear layers, which adapters change"
        raise UsageError("lora.rank", rank, problem, "leave it out to train all weights")
    chosen = layers.keys()
    if targets != "auto":
        chosen = matching([*layers], targets, "lora.targets", "linear layer with trained weights")
    most = max(min(layers[name].weight.shape) for name in chosen)
    if rank > most:
        raise UsageError("lora.rank", rank, "is larger than the rank of each layer", f"use at most {most}")
    try:
        from peft import LoraConfig as Adapters
        from peft import inject_adapter_in_model
    except ImportError as error:
        remedy = "install it: pip install 'diffuse-cli[lora]'"
        raise UsageError("lora.rank", rank, "needs peft", remedy) from error
    alpha = rank if alpha is None else alpha
    # A pattern of whole names, because peft also accepts the end of a name.
    names = "|".join(map(re.escape, sorted(chosen)))
    # peft accepts any number as its alpha.
    scale: Any = alpha
    inject_adapter_in_model(Adapters(r=rank, lora_alpha=scale, target_modules=names), network)
    for name, parameter in network.named_parameters():
        if name in new:
            parameter.requires_grad_(True)
    # Hooks with names, because all weights of a copy for averaging are frozen.
    stored_elsewhere = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    network.register_state_dict_post_hook(partial(_drop, stored_elsewhere))
    network.register_load_state_dict_pre_hook(partial(_keep, stored_elsewhere))
    frozen = frozen_weights(network)
    number = sum(weight.numel() for weight in frozen.values())
    return LoraInfo(rank=rank, alpha=float(alpha), frozen=number, sha256=digest(frozen))


def frozen_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the frozen weights of a network by the names that they have without adapters."""
    weights = dict(network.named_parameters())
    layers = [name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)]
    plain = {
        f"{layer}.base_layer.{part}": f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }
    return {
        plain.get(name, name): weight.detach() for name, weight in weights.items() if not weight.requires_grad
    }


def _drop(
    names: Collection[str], network: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Remove weights from the state dict of a network."""
    for name in names:
        del state[prefix + name]


def _keep(names: Collection[str], network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the current weights of a network to a state dict that is loaded."""
    for name in names:
        state[prefix + name] = network.get_parameter(name)
