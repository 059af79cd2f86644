"""Networks of Hugging Face transformers: loading of weights and preprocessing of images."""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError, first_line
from diffusion_cli.system.downloads import DownloadError, NoConnectionError, PublishedFile, State
from diffusion_cli.system.files import CANNOT_WRITE, file_digest
from diffusion_cli.system.hub import connect

NETWORK = ("config.json", "model.safetensors")
"""Files of a network."""
TOKENIZER = ("vocab.json", "merges.txt")
"""Files of the tokenizer of CLIP."""
OPTIONAL = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of the tokenizer that some repositories have."""
NEEDS_TRANSFORMERS = ("needs transformers", "install it: pip install 'diffuse-cli[transformers]'")
"""Problem and remedy without the optional dependency, which includes huggingface_hub."""


def load(name: str, architecture: str, weights: str) -> Any:
    """Load a network of transformers with weights from safetensors files, never from pickles.

    Args:
        name: name of the features, for errors.
        architecture: class of transformers.
        weights: folder with config.json and model.safetensors, or a name on the hub, downloaded once.

    Raises:
        UsageError: transformers or the weights are missing, or the weights are damaged or of another network.
    """
    transformers = imported(name)
    transformers.logging.set_verbosity_error()  # missing weights are an error below, so its warning is not needed
    try:
        network, told = pretrained(
            getattr(transformers, architecture), weights, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise missing(weights, " and ".join(NETWORK), f"features={name}", error) from error
    except Exception as error:  # damaged files raise errors of many types
        raise unfit(weights, architecture, str(error).partition("\n")[0]) from error
    if told["missing_keys"]:
        raise unfit(weights, architecture, f"it has no {min(told['missing_keys'])}")
    return network.requires_grad_(False).eval()


def imported(name: str) -> Any:
    """Import transformers, an optional dependency."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("features", name, *NEEDS_TRANSFORMERS) from error


def pretrained(kind: Any, weights: str, **options: Any) -> Any:
    """Load a class of transformers from a folder, from the local cache of the hub, or from the hub."""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    try:
        return kind.from_pretrained(weights, local_files_only=True, **options)
    except OSError:
        connect()
        return kind.from_pretrained(weights, **options)


def missing(weights: str, files: str, option: str, error: Exception) -> UsageError:
    """Return the error that needed files are missing; `option` names them for `diffuse data fetch`."""
    return UsageError(
        "features.weights",
        weights,
        first_line(error).rstrip("."),
        f"use another metric or features=classifier, give a folder with {files} (not pickled), or run "
        f"diffuse data fetch {option} where there is a network and copy the cache",
    )


@dataclass(frozen=True)
class HubFile(PublishedFile):
    """A file of a repository on the Hugging Face Hub, in the cache of huggingface_hub.

    Args:
        repository: name on the hub.
        name: file name.
        required: whether it is an error if the repository has no such file.
    """

    repository: str
    name: str
    required: bool = True
    size = None
    checksum = "checked by the hub"

    @property
    def source(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self._hub('constants').ENDPOINT}/{self.repository}/resolve/main/{self.name}"

    @property
    def path(self) -> Path:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._cached() or self.to_copy / self.name

    @property
    def by_hand(self) -> str:
        return "get the files of the repository by hand into a folder, and set weights= to it"

    @property
    def to_copy(self) -> Path:
        return Path(self._hub("constants").HF_HUB_CACHE, f"models--{self.repository.replace('/', '--')}")

    def state(self) -> State:
        path = self._cached()
        if path is None:
            return "absent" if self._known_absent() else "missing"
        return "present" if _has_its_checksum(path) else "damaged"

    def fetch(self) -> None:
        hub = self._hub()
        try:
            connect()
        except OSError as error:
            raise NoConnectionError(str(error)) from error
        try:
            hub.hf_hub_download(self.repository, self.name, force_download=self.state() == "damaged")
        except Exception as error:  # the classes of the HTTP library and of the hub
            if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
                raise
            if self._known_absent():
                return
            raise DownloadError(first_line(error)) from error
        if self.state() != "present":
            raise DownloadError("the content does not have the checksum of the hub")

    def _hub(self, module: str = "") -> Any:
        """Import huggingface_hub, or a module of it; UsageError if it is not installed."""
        try:
            hub = importlib.import_module("huggingface_hub")
            return importlib.import_module(f"huggingface_hub.{module}") if module else hub
        except ImportError as error:
            raise UsageError(self.repository, NO_VALUE, *NEEDS_TRANSFORMERS) from error

    def _cached(self) -> Path | None:
        found = self._known()
        return Path(found) if isinstance(found, str) else None

    def _known_absent(self) -> bool:
        """Whether the file is optional, and the cache records that the repository has none."""
        found = self._known()
        return not (self.required or found is None or isinstance(found, str))

    def _known(self) -> Any:
        """Return what the cache knows of the file: its path, an object that stands for no such file, or None."""
        return self._hub().try_to_load_from_cache(self.repository, self.name)


def _has_its_checksum(path: Path) -> bool:
    """Whether a file of the cache has the digest that names its blob: SHA-256, or SHA-1 as in git."""
    digits = path.resolve().name
    if len(digits) == 64:
        return file_digest(path) == digits
    if len(digits) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == digits
    return True  # a cache without links, on file systems that have none


def files(weights: str, names: Sequence[str], optional: Sequence[str] = ()) -> list[HubFile]:
    """Return files of weights by name on the hub; none for a folder."""
    if Path(weights).expanduser().is_dir():
        return []
    return [HubFile(weights, name, name not in optional) for name in (*names, *optional)]


def unfit(weights: str, architecture: str, reason: str) -> UsageError:
    """Return the error that weights do not fit the network."""
    return UsageError(
        "features.weights",
        weights,
        f"does not have the weights of a {architecture} ({reason})",
        "give other weights",
    )


def prepared(
    images: Tensor,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    crop: bool,
) -> Tensor:
    """Convert uint8 images [B, C, H, W], C 1 or 3, to normalized float32 [B, 3, size, size].

    With `crop`, resizes the short side to `size` and crops the centre, as CLIP does; otherwise resizes both sides.
    PIL is used as for published values: it clips overshoots between its two passes and torch does not, which changes
    sharp edges by up to 20 gray values.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    tall, wide = (size * height // short, size * width // short) if crop else (size, size)
    top, left = (tall - size) // 2, (wide - size) // 2
    arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(array).resize((wide, tall), Image.Resampling.BICUBIC) for array in arrays]
    square = np.stack([np.asarray(image)[top : top + size, left : left + size] for image in resized])
    pixels = torch.from_numpy(square).to(images.device)
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    return (scaled - scaled.new_tensor(mean)[:, None, None]) / scaled.new_tensor(std)[:, None, None]
