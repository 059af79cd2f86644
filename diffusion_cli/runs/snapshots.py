"""Snapshots of power averages in a run folder, and weights of other lengths that are reconstructed from them.

The file `ema/step_N.safetensors` has the trained weights of each tracked average at step N, in half precision: with
fewer snapshots in full precision, which take as much space, most lengths have larger errors. The checkpoint at the
end of a reconstruction adds its averages in full precision.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.config.averages import differ
from diffusion_cli.config.values import LONGEST_AVERAGE, SHORTEST_AVERAGE
from diffusion_cli.diffusion.power_averages import Fit, Profile, fit, lengths_within
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.checkpoint import EMA_KEY, Checkpoint
from diffusion_cli.runs.weights import save_weights
from diffusion_cli.system.tensors import digest, read_metadata, read_tensors
from diffusion_cli.system.untrusted import from_json, reason

FOLDER = "ema"
"""Folder of the snapshots in that of a run."""
LENGTHS = "lengths"
"""Key of the lengths of the averages in the metadata of a snapshot."""
LARGEST_RESIDUAL = 0.05
"""Residual of the profile above which weights are not reconstructed."""


class ReconstructedWeights(NamedTuple):
    """Weights of a power average that was not tracked."""

    state: dict[str, Tensor]
    """Tensors of the network, by name."""
    digest: str
    """SHA-256 of the length and of all stored averages; a sum can round otherwise elsewhere."""


def state_key(lengths: Sequence[float], number: int) -> str:
    """Return the key of a tracked average among the states of callbacks; the first is that of `weights=ema`."""
    return EMA_KEY if number == 0 else f"{EMA_KEY}_{lengths[number]}"


def snapshot_file(run: Path, step: int) -> Path:
    """Return the file of the snapshot of a step."""
    return run / FOLDER / f"step_{step:08d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """Return the steps with a snapshot, in order."""
    files = (run / FOLDER).glob("step_*.safetensors")
    stems = (file.name.removeprefix("step_").partition(".")[0] for file in files)
    steps = {int(stem) for stem in stems if stem.isdecimal()}
    return sorted(step for step in steps if snapshot_file(run, step).exists())  # not copies by other names


def save_snapshot(run: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write the trained weights of each average, by length; OSError as `atomic_write`."""
    state = {
        f"{number}/{name}": _half(weight)
        for number, weights in enumerate(averages.values())
        for name, weight in weights.items()
    }
    path = snapshot_file(run, step)
    path.parent.mkdir(exist_ok=True)
    save_weights(state, path, (LENGTHS, json.dumps([*averages])))


def _half(weight: Tensor) -> Tensor:
    """Return a weight in half precision, or as it is if its numbers are too large."""
    half = weight.to(torch.float16)
    return half if half.isfinite().all() else weight


def remove_later(run: Path, step: int) -> None:
    """Remove the snapshots after the step at which a training begins: it writes them again."""
    for later in snapshot_steps(run):
        if later > step:
            snapshot_file(run, later).unlink()


class StoredAverages:
    """The power averages that a run stored up to the step of one of its checkpoints.

    Args:
        run: run folder.
        checkpoint: checkpoint at the end of the averages to reconstruct.

    Raises:
        UsageError: about `ema_length`, if the run tracked no power averages or has no snapshot before the checkpoint.
    """

    def __init__(self, run: Path, checkpoint: Checkpoint) -> None:
        self.run, self.checkpoint, self.step = run, checkpoint, checkpoint.step
        self.lengths = _tracked(run, checkpoint.info.config.ema)
        """Lengths of the tracked averages."""
        self.steps = [step for step in snapshot_steps(run) if 0 < step < self.step]
        """Steps of the snapshots before the checkpoint."""
        if not self.steps:
            problem = f"{run} has no snapshots of the averages before step {self.step}"
            remedy = "restore its folder ema, choose a later step=, or train with a lower ema.snapshot_every"
            raise UsageError("ema_length", NO_VALUE, problem, remedy)

    @property
    def bytes(self) -> int:
        """Size of the snapshots before the checkpoint."""
        return sum(snapshot_file(self.run, step).stat().st_size for step in self.steps)

    @cached_property
    def within_reach(self) -> list[float]:
        """The tracked lengths, and those in steps of 0.005 with at most the largest residual, in order."""
        return sorted({*self.lengths, *lengths_within(self._profiles, self.step, LARGEST_RESIDUAL)})

    def fit(self, length: float) -> Fit:
        """Return the coefficients and the residual of a length."""
        return fit(self._profiles, Profile(self.step, length))

    def check(self, length: float) -> None:
        """Raise UsageError if the stored averages give a length with too large a residual."""
        residual = self.fit(length).residual
        if residual > LARGEST_RESIDUAL:
            problem = f"the snapshots of {self.run} give it with a residual of {residual:.1%}"
            known = self.within_reach
            raise UsageError("ema_length", length, problem, f"choose a length from {known[0]} to {known[-1]}")

    def reconstruct(self, length: float) -> ReconstructedWeights:
        """Return the weights of an average of another length, at the step of the checkpoint.

        They are the sum of the stored averages with the coefficients of `fit`, computed in float64. Weights that are
        not trained are those of the checkpoint.

        Raises:
            UsageError: a snapshot is damaged, or there are too few of them for this length.
        """
        self.check(length)
        state = dict(self.checkpoint.weights("ema"))
        total: dict[str, Tensor] = {}
        sha = hashlib.sha256(f"{length}".encode())
        for coefficient, weights in zip(self.fit(length).coefficients, self._averages(), strict=True):
            sha.update(digest(weights).encode())
            for name, weight in weights.items():
                term = weight.double().mul_(float(coefficient))
                total[name] = term if name not in total else total[name].add_(term)
        state |= {name: weight.to(state[name].dtype) for name, weight in total.items()}
        return ReconstructedWeights(state, sha.hexdigest())

    @property
    def _profiles(self) -> list[Profile]:
        return [Profile(step, length) for step in (*self.steps, self.step) for length in self.lengths]

    def _averages(self) -> Iterator[dict[str, Tensor]]:
        """Yield the trained weights of each stored average, in the order of the profiles."""
        like = self.checkpoint.weights("ema")
        names: set[str] = set()
        for step in self.steps:
            path = snapshot_file(self.run, step)
            try:
                averages = _read(path, self.lengths)
                names = names or {*averages[0]}
                for weights in averages:
                    _check(weights, names, like)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
                problem, remedy = f"invalid or damaged snapshot ({why})", "restore it, or remove this file"
                raise UsageError(path, NO_VALUE, problem, remedy) from error
            yield from averages
        for number in range(len(self.lengths)):
            try:
                whole = self.checkpoint.state["callbacks"][state_key(self.lengths, number)]["network"]
                weights = {name: whole[name] for name in names}
                _check(weights, names, like)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                problem = f"the average of length {self.lengths[number]} is missing or incomplete"
                raise UsageError(
                    f"the checkpoint of step {self.step}", NO_VALUE, problem, "choose another step="
                ) from error
            yield weights


def _tracked(run: Path, ema: Mapping[str, Any]) -> list[float]:
    """Return the lengths of the power averages in the `ema` entry of a checkpoint, which may be untrusted."""
    lengths = ema.get("lengths") if ema.get("profile") == "power" else None
    if (
        not isinstance(lengths, list)
        or not all(
            type(length) is float and SHORTEST_AVERAGE <= length < LONGEST_AVERAGE for length in lengths
        )
        or not differ(lengths)
    ):
        problem = f"{run} was trained without power averages"
        raise UsageError("ema_length", NO_VALUE, problem, "train a run with ema.profile=power")
    return lengths


def _read(path: Path, lengths: Sequence[float]) -> list[dict[str, Tensor]]:
    """Return the weights of each average of a snapshot; FormatError if it is of other lengths."""
    if from_json(read_metadata(path).get(LENGTHS, "null").encode()) != lengths:
        raise FormatError("is of other lengths than the run")
    averages: list[dict[str, Tensor]] = [{} for _ in lengths]
    for key, weight in read_tensors(path).items():
        number, _, name = key.partition("/")
        if not number.isdecimal() or int(number) >= len(lengths):
            raise FormatError("has tensors of other averages")
        averages[int(number)][name] = weight
    return averages


def _check(weights: Mapping[str, Tensor], names: set[str], like: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless the weights have these names, and fit those of a checkpoint."""
    if not names or {*weights} != names or not names <= like.keys():
        raise FormatError("has other weights than the run")
    for name, weight in weights.items():
        if weight.shape != like[name].shape or weight.dtype not in (torch.float16, like[name].dtype):
            raise FormatError(f"{name} does not fit the run")
        if not weight.isfinite().all():
            raise FormatError(f"{name} has numbers that are not finite")
