"""Write weights as safetensors, and compare them with networks."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from diffusion_cli.errors import FormatError
from diffusion_cli.system.files import atomic_write


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


def save_weights(state: Mapping[str, Tensor], path: Path, entry: tuple[str, str] = ("format", "pt")) -> None:
    """Write the weights of a network as safetensors; OSError as `atomic_write`.

    Args:
        state: tensors by name.
        path: file to write.
        entry: key and text of the metadata. There is one, because safetensors writes several in random order.
    """
    from safetensors.torch import save as packed

    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(packed(plain, dict([entry])))
