"""Checkpoints and the run folders they lie in: written whole or not at all, read without running code.

A checkpoint is Lightning's, with a plain `diffuse` entry that says how to build the model again:
`{"format": 1, "config": {...}, "shape": [C, H, W], "num_classes": K | None, "class_names": [...] | None}`.
"""

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_cli.config import build, check_node
from diffusion_cli.denoiser import Denoiser

FORMAT = 1
LAST = Path("checkpoints", "last.ckpt")


@dataclass(frozen=True)
class Model:
    """A trained denoiser, and what is known of where it came from."""

    denoiser: Denoiser
    shape: tuple[int, int, int]
    num_classes: int | None
    """Number of classes that the network is conditioned on, or None."""
    config: dict[str, Any]
    step: int
    digest: str
    """SHA-256 of the weights."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; at the end it takes the place of `path` in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint as tensors and plain data; ValueError if it is damaged or not ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: is not a whole checkpoint; take an earlier one from {path.parent}"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("diffuse", {}).get("format") != FORMAT:
        raise ValueError(
            f"{path}: is not a checkpoint of diffuse, format {FORMAT}; give a run made by diffuse train"
        )
    return checkpoint


def find_run(run: str | None, output_dir: str) -> Path:
    """The folder of a run by path or name, or the newest under `output_dir`; ValueError if there is none."""
    root = Path(output_dir)
    runs = sorted((file for file in root.glob(f"*/{LAST}")), key=lambda file: file.stat().st_mtime)
    if run is None:
        if not runs:
            raise ValueError(f"output_dir={output_dir}: holds no run; make one with: diffuse train")
        return runs[-1].parent.parent
    for folder in (Path(run), root / run):
        if (folder / LAST).is_file():
            return folder
    known = ", ".join(file.parent.parent.name for file in reversed(runs[-5:])) or "none"
    raise ValueError(f"run={run}: holds no {LAST}; the newest runs in {output_dir} are: {known}")


def load_model(run: Path, weights: Literal["ema", "raw"], device: torch.device) -> Model:
    """Build the model of a run again from its newest checkpoint, in evaluation mode."""
    path = run / LAST
    checkpoint = read(path)
    about = checkpoint["diffuse"]
    config = about["config"]
    mistakes = [
        line for key in ("schedule", "parameterization", "model") for line in check_node(key, config[key])
    ]
    if mistakes:
        raise ValueError(f"{path}: was made by another version of diffuse: {'; '.join(mistakes)}")
    channels, size, _ = about["shape"]
    network = build(config["model"], channels, size, about["num_classes"])
    denoiser = Denoiser(network, build(config["schedule"]), build(config["parameterization"]))
    network.load_state_dict(_network_state(checkpoint, weights))
    return Model(
        denoiser.to(device).eval().requires_grad_(False),
        tuple(about["shape"]),
        getattr(network, "num_classes", None),
        config,
        checkpoint["global_step"],
        digest(network.state_dict()),
    )


def _network_state(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"]) -> dict[str, Tensor]:
    if weights == "ema":
        return checkpoint["callbacks"]["EMA"]["network"]
    prefix = "denoiser.network."
    state = checkpoint["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
