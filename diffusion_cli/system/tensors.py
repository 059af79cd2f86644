"""Safe reading of tensors from files of other programs."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_cli.errors import FormatError
from diffusion_cli.system.untrusted import reason, regular

if TYPE_CHECKING:
    from torch import Tensor

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that may run code when they are loaded."""


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a safetensors file in float32.

    Raises FormatError for a missing file beside pickled weights, a special file, or a file that is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        refuse_pickled(path)
    regular(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path.name}: {reason(error)}") from error
    return {name: tensor.float() for name, tensor in state.items()}


def refuse_pickled(path: Path) -> None:
    """Raise FormatError if there is a pickled file in place of a safetensors file."""
    pickled = [file.name for file in path.parent.glob(f"{path.stem}*") if file.suffix in PICKLED]
    if pickled:
        raise FormatError(f"{pickled[0]} is pickled and could run code")
