"""Validation of the training state in a checkpoint against the state that this run would store.

A checkpoint may be an untrusted file, and a fused optimizer does not check the sizes of its state.
`expected_state` makes a template from the run's objects; `check_state` compares a checkpoint with it. Other
versions of torch and Lightning store other options: `mend_state` drops unknown options and adds missing ones.
"""

import copy
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.untrusted import DEEPEST, plain
from diffusion_cli.training.module import TrainingModule

LARGEST = sys.float_info.max
SMALLEST_SCALE = 2.0**-149
"""The smallest positive float32, the type of the fp16 gradient scale."""
MOST_STEPS = 2**53
AVERAGES_OF_SQUARES = frozenset(
    [
        "exp_avg_sq",
        "max_exp_avg_sq",
        "square_avg",
        "acc_delta",
        "sum",
        "exp_inf",
        "row_var",
        "col_var",
        "variance",
    ]
)
"""State of optimizers of torch that cannot be negative."""
LONGEST_TEXT = 1000
MOST_NAMES = 3


@dataclass(frozen=True)
class Like:
    """A tensor with the shape, strides and type of another, and finite numbers from `low` to `high`."""

    tensor: Tensor
    low: float = -LARGEST
    high: float = LARGEST


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`."""

    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False


@dataclass(frozen=True)
class OfType:
    """Any value of a plain type; a text has at most 1000 characters."""

    type: type


@dataclass(frozen=True)
class Maybe:
    """A value that may also be missing or null."""

    expected: Any


@dataclass(frozen=True)
class Among:
    """A mapping with these entries; others are ignored."""

    entries: Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """A mapping with these entries; `mend_state` drops unknown plain ones and adds missing `defaults`."""

    entries: Mapping[str, Any]
    defaults: Mapping[str, Any]


class StoredOptions(Callback):
    """Adapts a checkpoint to this version, and raises UsageError if it does not resume at its step."""

    def __init__(self, expected: Mapping[str, Any]) -> None:
        # Only the parts with options, so that no weights stay in memory.
        self._options = {key: expected[key] for key in ("loops", "optimizer_states", "lr_schedulers")}
        self._step: int = expected["global_step"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mend_state(checkpoint, self._options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._step:
            raise UsageError(
                f"the checkpoint of step {self._step}",
                NO_VALUE,
                f"this version of Lightning continues it at step {trainer.global_step}",
                "install the version that saved it, or start again with another name=",
            )


@dataclass(frozen=True)
class PlainState:
    """The state of a callback of the user: plain values and plain tensors."""


def problem_of_state(value: Any) -> str | None:
    """Return why a state is not of plain values and tensors, or None if it is."""
    try:
        plain(_without_tensors(value, 0))
    except ValueError as error:
        return str(error)
    return None


def _without_tensors(value: Any, depth: int) -> Any:
    """Return a state with 0 for each plain tensor and lists for tuples, to a bounded depth."""
    if type(value) is Tensor and value.layout == torch.strided:
        return 0
    if depth > DEEPEST:
        return value  # `plain` refuses it
    if type(value) is dict:
        return {key: _without_tensors(item, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_without_tensors(item, depth + 1) for item in value]
    return value


def expected_state(
    trainer: Trainer, module: TrainingModule, step: int, users: Collection[Callback] = ()
) -> dict[str, Any]:
    """Return the template of this run's checkpoint at a step, before the strategy moves or shards the module.

    Args:
        trainer: trainer with all callbacks.
        module: module to train.
        step: step of the checkpoint.
        users: callbacks of the user, with states of any plain values.
    """
    optimizer, scheduler = _optimizer_state(module, step)
    # The run may have been saved with more or fewer callbacks.
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    stored = {
        callback.state_key: Maybe(_alike(getattr(callback, "example_state", callback.state_dict)(), step))
        for callback in callbacks
        if callback not in users and callback.state_dict()
    } | {callback.state_key: Maybe(PlainState()) for callback in users}
    precision = trainer.precision_plugin
    return {
        "epoch": Number(0, MOST_STEPS, whole=True),
        "global_step": step,
        "pytorch-lightning_version": OfType(str),
        "diffuse": OfType(dict),
        "state_dict": _alike(module.state_dict(), step),
        # Any counts of batches are valid: the module recomputes them for accumulate_grad_batches.
        "loops": Among({"fit_loop": _alike_options(trainer.fit_loop.state_dict())}),
        "callbacks": Among(stored),
        "optimizer_states": [optimizer],
        "lr_schedulers": [scheduler],
        type(precision).__qualname__: Maybe(_scaler_state(precision.state_dict())),
    }


def _optimizer_state(module: TrainingModule, step: int) -> tuple[dict[str, Any], Options]:
    """Return templates of the states of the optimizer and its scheduler, from a step on copies of the weights."""
    optimizer, scheduler = module.optimization.trial(module)
    state, peaks = (
        optimizer.state_dict(),
        [group.get("initial_lr", math.inf) for group in optimizer.param_groups],
    )
    entries = {
        number: Maybe({name: _of_optimizer(name, value, step) for name, value in values.items()})
        for number, values in state["state"].items()
    }
    changes = not module.optimization.is_plain
    groups = [
        _group_options(group, Number() if changes else Number(0, peak), changes)
        for group, peak in zip(state["param_groups"], peaks, strict=True)
    ]
    moved = scheduler.state_dict()
    if not module.optimization.has_own_schedule:
        return {"state": entries, "param_groups": groups}, Options(_any_numbers(moved), moved)
    flags = {name: value for name, value in moved.items() if isinstance(value, bool)}
    rates = [group.entries["lr"] for group in groups]
    exact = {"base_lrs": scheduler.base_lrs, "_last_lr": rates, "lr_lambdas": [Maybe({})] * len(rates)}
    return {"state": entries, "param_groups": groups}, Options(_alike(moved, step + 1) | exact, flags)


def _of_optimizer(name: str, value: Any, step: int) -> Any:
    """Return the template of an entry of the state of a weight."""
    if isinstance(value, Tensor):
        low, high = (0, step) if name == "step" else (0 if name in AVERAGES_OF_SQUARES else -LARGEST, LARGEST)
        return Like(value.to("meta") if value.dim() else value, low, high)
    return _any_numbers(value)


def _group_options(group: Mapping[str, Any], rate: Number, changes: bool) -> Options:
    """Return the template of the options of a group of weights.

    Args:
        group: the options after one step.
        rate: template of the learning rate.
        changes: whether a scheduler or an optimizer of others may change any number.
    """
    entries = {
        name: _any_numbers(value) if changes and name != "params" else value for name, value in group.items()
    }
    entries |= {"lr": rate} | ({"fused": Maybe(OfType(bool))} if "fused" in group else {})
    return Options(entries, {name: value for name, value in group.items() if name not in ("params", "lr")})


def _any_numbers(value: Any) -> Any:
    """Return the template of plain data of the same structure, with any finite numbers."""
    if isinstance(value, Mapping):
        return {key: _any_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_any_numbers(item) for item in value]
    if isinstance(value, Tensor):
        return Like(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(whole=isinstance(value, int))
    return OfType(type(value)) if isinstance(value, bool | str) else value


def _scaler_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template of the fp16 gradient scaler; empty for other precisions."""
    if not state:
        return {}
    tracker = Number(0, state["growth_interval"], whole=True)
    return {**state, "scale": Number(SMALLEST_SCALE), "_growth_tracker": tracker}


def _alike(value: Any, most: int) -> Any:
    """Return the template of a value: similar tensors, integers in [0, most], floats from 0, any text."""
    if isinstance(value, Mapping):
        return {key: _alike(item, most) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_alike(item, most) for item in value]
    if isinstance(value, Tensor):
        return Like(value) if value.is_floating_point() else Like(value, low=0)
    if isinstance(value, bool | str):
        return OfType(type(value))
    if isinstance(value, int | float):
        return Number(0, most, whole=True) if isinstance(value, int) else Number(0)
    return value


def _alike_options(value: Any) -> Any:
    """Return the template of loop counters and options; missing entries get the values before training."""
    if not isinstance(value, Mapping):
        return _alike(value, MOST_STEPS)
    return Options({key: _alike_options(item) for key, item in value.items()}, value)


def mend_state(stored: Any, expected: Any) -> None:
    """Remove plain options that are not in a template from a checkpoint, in place, and add missing ones."""
    if isinstance(expected, Options) and isinstance(stored, dict):
        for name in [name for name in stored if name not in expected.entries and _is_plain(stored[name])]:
            del stored[name]
        for name, default in expected.defaults.items():
            stored.setdefault(name, copy.deepcopy(default))
    entries = expected.entries if isinstance(expected, Among | Options) else expected
    if isinstance(entries, Mapping) and isinstance(stored, dict):
        for name, other in entries.items():
            mend_state(stored.get(name), other)
    elif isinstance(entries, list) and isinstance(stored, list):
        for item, other in zip(stored, entries, strict=False):  # `check_state` compares the lengths
            mend_state(item, other)


def _is_plain(value: Any) -> bool:
    try:
        plain(list(value) if isinstance(value, tuple) else value)
    except ValueError:
        return False
    return True


def check_state(path: Path, checkpoint: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise UsageError with the first difference unless a checkpoint matches a template."""
    for difference in _differences(checkpoint, expected, "", {}):
        raise UsageError(
            path,
            NO_VALUE,
            f"is not a training state of this run ({difference})",
            "restore a checkpoint that this run saved, or start again with another name=",
        )


def _differences(stored: Any, expected: Any, key: str, owners: dict[int, str]) -> Iterator[str]:
    """Yield a line for each difference from a template; `owners` maps memory to the key of its tensor."""
    if isinstance(expected, Maybe):
        if stored is not None:
            yield from _differences(stored, expected.expected, key, owners)
    elif isinstance(expected, Mapping | Among | Options):
        yield from _entry_differences(stored, expected, key, owners)
    elif isinstance(expected, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(expected):
            yield f"{key}: must have {len(expected)} items"
            return
        for number, (item, other) in enumerate(zip(stored, expected, strict=True)):
            yield from _differences(item, other, f"{key}.{number}", owners)
    elif isinstance(expected, PlainState):
        if problem := problem_of_state(stored):
            yield f"{key}: {problem}"
    elif isinstance(expected, Like):
        yield from _tensor_differences(stored, expected, key, owners)
    elif not _is_as(stored, expected):
        yield f"{key}: {_wanted(expected)}"


def _entry_differences(
    stored: Any, expected: Mapping[str, Any] | Among | Options, key: str, owners: dict[int, str]
) -> Iterator[str]:
    entries = expected if isinstance(expected, Mapping) else expected.entries
    if not isinstance(stored, Mapping):
        yield f"{key}: must be a mapping"
        return
    if not isinstance(expected, Among):
        unknown = [name for name in stored if name not in entries]
        names = ", ".join(name[:80] for name in unknown[:MOST_NAMES] if isinstance(name, str))
        if unknown:
            yield f"{key or 'the checkpoint'}: has {len(unknown)} unknown entries {names}".rstrip()
    for name, other in entries.items():
        if name in stored:
            yield from _differences(stored[name], other, f"{key}.{name}".lstrip("."), owners)
        elif not isinstance(other, Maybe):
            yield f"{key}.{name}: is missing".lstrip(".")


def _tensor_differences(stored: Any, expected: Like, key: str, owners: dict[int, str]) -> Iterator[str]:
    like = expected.tensor
    if type(stored) is not Tensor:
        yield f"{key}: must be a tensor"
        return
    if stored.shape != like.shape or stored.dtype != like.dtype:
        yield (
            f"{key}: is {stored.dtype} {list(stored.shape)}".replace("torch.", "")
            + f" and must be {like.dtype} {list(like.shape)}".replace("torch.", "")
        )
        return
    plain = stored.layout == torch.strided and not (
        stored.is_neg() or stored.is_conj() or stored.requires_grad
    )
    if not plain or stored.stride() != like.stride():
        yield f"{key}: must be a plain tensor with the strides of the weights"
        return
    if not stored.numel():
        return
    owner = owners.setdefault(stored.untyped_storage().data_ptr(), key)
    if owner != key:
        yield f"{key}: shares its memory with {owner}"
    low, high = (bound.item() for bound in stored.aminmax())
    if not expected.low <= low <= high <= expected.high:
        yield f"{key}: has numbers from {low:.4g} to {high:.4g} and {_wanted(Number(expected.low, expected.high))}"


def _is_as(stored: Any, expected: Any) -> bool:
    """Return whether a plain value matches its template."""
    if isinstance(expected, OfType):
        return type(stored) is expected.type and (type(stored) is not str or len(stored) <= LONGEST_TEXT)
    if isinstance(expected, Number):
        kinds = (int,) if expected.whole else (int, float)
        return type(stored) in kinds and expected.low <= stored <= expected.high
    return stored is expected or (type(stored) in (bool, int, float, str) and stored == expected)


def _wanted(expected: Any) -> str:
    if isinstance(expected, OfType):
        return f"must be of type {expected.type.__name__}"
    if isinstance(expected, Number):
        low = "" if expected.low == -LARGEST else f" from {expected.low:.4g}"
        high = "" if expected.high == LARGEST else f" to {expected.high:.10g}"
        return f"must be a {'whole' if expected.whole else 'finite'} number{low}{high}"
    return f"must be {expected}"
