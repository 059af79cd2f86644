"""Read and write weights as safetensors, and compute their digests."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_cli.errors import FormatError
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.untrusted import reason, regular


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in float32.

    Raises FormatError for pickled weights, a special file, or a file that is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    pickled = [
        file.name for file in path.parent.glob(f"{path.stem}*") if file.suffix in (".bin", ".pt", ".ckpt")
    ]
    if not path.is_file() and pickled:
        raise FormatError(f"{pickled[0]} is pickled and could run code")
    regular(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path.name}: {reason(error)}") from error
    return {name: tensor.float() for name, tensor in state.items()}


def check_fit(path: Path, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless the tensors of a file match the weights of a network in name and shape."""
    wanted = network.state_dict()
    for name in sorted(wanted.keys() ^ state.keys()):
        why = "is missing" if name in wanted else "is not part of the network"
        raise FormatError(f"{path.name}: {name} {why}")
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise FormatError(
                f"{path.name}: {name} has shape {list(state[name].shape)}, not {list(tensor.shape)}"
            )


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the weights of a network as safetensors; OSError as `atomic_write`."""
    from safetensors.torch import save as packed

    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(packed(state))


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: of their names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
