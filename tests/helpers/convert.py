"""Comparison of networks with those of other programs."""

from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_cli.config import build
from diffusion_cli.convert import read_autoencoder
from diffusion_cli.convert.base import Network, Weights
from diffusion_cli.runs.imported import weights_of


def built(network: Network, weights: Weights) -> Any:
    """The network with its weights, in evaluation mode."""
    module = build(network.node, network.shape, network.num_classes)
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


def autoencoder_of(source: Path | str, key: str = "key") -> Any:
    """The autoencoder of a folder of diffusers with its weights, in evaluation mode."""
    model = read_autoencoder(str(source), key)
    return built(model.network, weights_of(model, str(source), key))


def agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Check outputs relative to the largest value of theirs, which must not be constant."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def same_bytes(ours: Weights, theirs: Weights) -> None:
    """Check that weights have the same names, types and bytes."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].equal(tensor), name
