"""Callbacks that the user chooses by `callback=`: presets, checks, and their state in checkpoints."""

import copy
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch.callbacks as lightning_callbacks
from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import NonNegativeFloat, PositiveInt

from diffusion_cli.config.validate import build_user
from diffusion_cli.config.values import Node
from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.untrusted import printable, reason
from diffusion_cli.training.stored_state import problem_of_state

_WEIGHTS = ("changes the weights or parameters, which diffuse stores by itself", "use the keys of ema")
_CHECKPOINTS = (
    "writes checkpoints that diffuse does not read",
    "use checkpoint_every, keep_last and keep_best",
)
REFUSED = {
    "Checkpoint": _CHECKPOINTS,
    "OnExceptionCheckpoint": _CHECKPOINTS,
    "ProgressBar": ("conflicts with the progress bar of diffuse", "leave it out"),
    "WeightAveraging": _WEIGHTS,
    "StochasticWeightAveraging": _WEIGHTS,
    "ModelPruning": _WEIGHTS,
    "BaseFinetuning": _WEIGHTS,
    "BatchSizeFinder": ("changes the batch size during training", "use batch_size"),
    "LearningRateFinder": ("changes the learning rate before training", "use optimizer.lr"),
    "GradientAccumulationScheduler": ("changes the parts of a batch", "use accumulate_grad_batches"),
    "BasePredictionWriter": ("diffuse makes no predictions with Lightning", "use diffuse sample"),
}
"""Problem and remedy of the callbacks of Lightning, with those derived from them, that cannot work here."""


class EarlyStopping(lightning_callbacks.EarlyStopping):
    """Stops training when a measured value no longer improves; a resumed run counts on, with the patience of now."""

    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: PositiveInt = 5,
        min_delta: NonNegativeFloat = 0.0,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        super().__init__(
            monitor, min_delta, patience, mode=mode,
            stopping_threshold=stopping_threshold, divergence_threshold=divergence_threshold,
            check_on_train_epoch_end=False,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, except the patience, which is a setting."""
        super().load_state_dict({**state_dict, "patience": self.patience})


def make_callbacks(nodes: Mapping[str, Node]) -> dict[str, Callback]:
    """Return the callbacks of checked nodes by name.

    Raises UsageError for callbacks that cannot work, or that share a state in checkpoints.
    """
    callbacks = {name: build_user(f"callback.{name}", node) for name, node in nodes.items()}
    seen: dict[str, str] = {}
    for name, callback in callbacks.items():
        key = f"callback.{name}"
        for refused, (problem, remedy) in REFUSED.items():
            if isinstance(callback, getattr(lightning_callbacks, refused)):
                raise UsageError(key, type(callback).__name__, problem, remedy)
        other = seen.setdefault(callback.state_key, name)
        if other != name and type(callback).state_dict is not Callback.state_dict:
            raise UsageError(key, NO_VALUE, f"does the same as callback.{other}", "leave one of them out")
    return callbacks


def check_monitors(callbacks: Mapping[str, Callback], measured: Collection[str]) -> None:
    """Raise UsageError for a callback that monitors none of the measured values."""
    wrong = [
        Problem(
            f"callback.{name}.monitor",
            monitor,
            "is not measured in this training",
            f"choose from {', '.join(measured)}",
        )
        for name, callback in callbacks.items()
        if (monitor := getattr(callback, "monitor", None)) is not None and monitor not in measured
    ]
    if wrong:
        raise UsageError.several(wrong)


def check_states(callbacks: Mapping[str, Callback], stored: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError if a callback cannot load its state of a checkpoint at `path`."""
    for name, callback in callbacks.items():
        if callback.state_key in stored:
            try:
                callback.load_state_dict(copy.deepcopy(stored[callback.state_key]))
            except Exception as error:  # code of a library or of the user
                problem = f"callback={name} cannot load its state ({type(error).__name__}: {reason(error)})"
                raise UsageError(path, NO_VALUE, problem, "leave the callback out") from error


def stop_reason(callbacks: Mapping[str, Callback]) -> str:
    """Return which callback stopped training, and why if it has said so."""
    for name, callback in callbacks.items():
        if message := getattr(callback, "stopping_reason_message", None):
            return f"callback={name} ({str(message).replace(' Signaling Trainer to stop.', '').rstrip('.')})"
    return f"callback={','.join(callbacks)}"


class PlainStates(Callback):
    """Keeps the state of the user's callbacks in checkpoints plain, because a checkpoint with other objects is refused.

    It comes after these callbacks.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self.callbacks = callbacks
        self._named: set[str] = set()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for key in [*self._others(trainer, checkpoint)]:
            del checkpoint[key]
        for name, callback in self.callbacks.items():
            problem = problem_of_state(checkpoint["callbacks"].get(callback.state_key))
            if problem is not None:
                del checkpoint["callbacks"][callback.state_key]
                self._name(name, problem)

    def _others(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> Iterator[str]:
        """Yield the entries that a callback added to a checkpoint of Lightning."""
        known = {
            "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks",
            "optimizer_states", "lr_schedulers", type(trainer.precision_plugin).__qualname__,
        }  # fmt: skip
        yield from (key for key in checkpoint if key not in known)

    def _name(self, name: str, problem: str) -> None:
        if name not in self._named and Distributed().is_main:
            line = f"callback={name}: its state {problem}, so it is not stored; a resumed run starts it anew"
            ProgressBar.write(printable(f"diffuse: {line}"), file=sys.stderr)
        self._named.add(name)
