"""Safe reading of tensors from files of other programs, and digests of tensors."""

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any

from diffusion_cli.errors import FormatError
from diffusion_cli.system.untrusted import check_sums, check_tensors, reason, regular

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "copy or download it again"
"""Remedy of a damaged file."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that may run code when they are loaded."""


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a safetensors file with their own number format, memory-mapped.

    Raises FormatError for a missing file beside pickled weights, a special file, or a file that is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        refuse_pickled(path, path.parent.glob("*"))
    regular(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path.name}: {reason(error)}", AGAIN) from error


def load_checked(file: Path | IO[bytes], *, mmap: bool = False) -> Any:
    """Return the content of a `torch.save` file that `check_tensors` or `check_weights` accepts, on the CPU.

    Args:
        file: the file.
        mmap: whether its tensors are memory-mapped.

    Raises FormatError for objects that torch refuses; its own message advises to run the code of the file.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise FormatError("has other objects than tensors and plain data") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts of a safetensors file beside its tensors; FormatError as `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    regular(path)
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise FormatError(f"{path.name}: {reason(error)}", AGAIN) from error


def read_state_dict(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a `torch.save` or safetensors file, as `read_tensors`.

    Raises FormatError, before code could run, for a pickle of other objects, a damaged file, or one that is neither.
    """
    import torch

    if path.suffix == ".safetensors":
        return read_tensors(path)
    size = regular(path)
    try:
        check_tensors(path)
        check_sums(path)
        state = load_checked(path, mmap=True)
    except OSError:
        raise
    except Exception as error:  # the ZIP and pickle parsers raise many types of errors for damaged files
        raise FormatError(f"is not a file of tensors that torch.save wrote ({reason(error)})") from error
    if not isinstance(state, dict) or not all(
        type(name) is str and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise FormatError("is not a state dict, which contains only tensors by their names")
    # In an untrusted file, tensors of any size and number can share a few bytes.
    if sum(value.numel() * value.element_size() for value in state.values()) > size:
        raise FormatError("has tensors larger than the file")
    for name, value in state.items():
        if not value.is_floating_point() or value.is_neg():
            raise FormatError(f"{name} has no floating-point numbers")
    return state


def refuse_pickled(path: PurePath, files: Iterable[PurePath]) -> None:
    """Raise FormatError if there is a pickled file in place of a safetensors file.

    Args:
        path: the safetensors file, which is missing.
        files: files of its folder, and of others.
    """
    beside = (file for file in files if file.parent == path.parent and file.name.startswith(path.stem))
    pickled = sorted(file.name for file in beside if file.suffix in PICKLED)
    if pickled:
        remedy = "save the model again with safe_serialization=True"
        raise FormatError(f"{pickled[0]} is pickled and could run code", remedy)


def digest(state: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 of named tensors: of their names, dtypes, shapes and bytes."""
    import torch

    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
