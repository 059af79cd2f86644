"""Private and undocumented APIs of libraries, each in one function; tests/system/test_compat.py checks them.

Libraries are imported within the functions, so that importing this module costs nothing.
"""

import atexit
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from numpy import ndarray
    from omegaconf import DictConfig
    from torch import nn


def run_exit_functions() -> None:
    """Run the `atexit` functions before `os._exit`, which skips them; tested with CPython 3.11."""
    atexit._run_exitfuncs()


def signal_at_end_of_parent(number: int) -> None:
    """Get a signal when the parent of this process ends; Python has no function for this call of Linux."""
    import ctypes

    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def keep_signal_handlers(trainer: Any) -> None:
    """Stop a Lightning trainer from replacing the process's signal handlers; tested with Lightning 2.6.

    Its SIGTERM handler waits for all processes, although not every process gets the signal.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def defer_torchmetrics() -> None:
    """Import the metrics of torchmetrics at their first use, not with Lightning; tested with torchmetrics 1.9.

    Lightning needs two base classes of it. The metrics import scipy, torchvision and transformers, which takes a
    quarter of the start of a training.
    """
    if "torchmetrics" not in sys.modules and (spec := find_spec("torchmetrics")) is not None:
        sys.meta_path.insert(0, _TorchmetricsFinder(spec))


class _TorchmetricsFinder(MetaPathFinder, Loader):
    """Finder of the package torchmetrics for its first import, which does not run its `__init__.py`.

    Its modules `utilities` and `metric` import each other and work only in this order, so `utilities` comes first.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec, self._loader = spec, spec.loader

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._spec.name:
            return None
        self._spec.loader = self
        return self._spec

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self._spec.loader = module.__loader__ = self._loader
        module.__class__ = _DeferredTorchmetrics
        import_module("torchmetrics.utilities")


class _DeferredTorchmetrics(ModuleType):
    """The package torchmetrics before its `__init__.py` is run, which any name but those of Lightning does."""

    def __getattr__(self, name: str) -> Any:
        if name == "_logger":
            return logging.getLogger("torchmetrics")
        if name == "__version__":
            return import_module("torchmetrics.__about__").__version__
        if name in ("Metric", "MetricCollection"):
            return getattr(import_module("torchmetrics.collections"), name)
        if name.startswith("__"):
            raise AttributeError(f"module 'torchmetrics' has no attribute {name!r}")
        object.__setattr__(self, "__class__", ModuleType)
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def set_batch_progress(checkpoint: dict[str, Any], batches: int) -> None:
    """Set the number of batches that a Lightning checkpoint counts as done; tested with Lightning 2.6.

    Lightning restores the old count, which is wrong once `accumulate_grad_batches` has changed.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        shift = batches - counts["ready"]
        counts |= {stage: number + shift for stage, number in counts.items()}


def cpu_has_bf16() -> bool:
    """Return whether the CPU has bfloat16 instructions, AVX512-BF16 or AMX; tested with torch 2.14.

    `torch.backends.cpu.get_cpu_capability` names neither.
    """
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_transformed() -> bool:
    """Return whether functions have derivatives in forward mode, or torch.func transforms them; tested with torch 2.14.

    Custom functions of autograd would need rules of their own for each of these.
    """
    import torch
    from torch.autograd import forward_ad

    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def count_in_group(key: str) -> int:
    """Add 1 to a counter that all processes of the default group share, and return it; tested with torch 2.14.

    torch has no public way to the group's store. Raises RuntimeError if the process that serves it has ended.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store().add(key, 1)


def is_compiled(network: "nn.Module") -> bool:
    """Return whether `network.compile()` was called; torch has no public API. Tested with torch 2.14."""
    return network._compiled_call_impl is not None


def compile_error() -> type[Exception]:
    """Return the base class of `torch.compile` errors, which torch does not export; tested with torch 2.14.

    Its module takes as long to import as torch.
    """
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def untrained_lpips(network: Literal["alex", "vgg", "squeeze"]) -> Any:
    """Return torchmetrics' LPIPS with trained linear layers and a random backbone.

    The public class downloads a backbone from a fixed URL. Tested with torchmetrics 1.9.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(pnet_rand=True, net=network)


@lru_cache(maxsize=1024)  # a command parses each of its words several times, in about a millisecond
def parse_override(text: str) -> "Override":
    """Parse one override as `hydra.compose` does; Hydra has no public parser. Tested with Hydra 1.3.

    Raises exceptions of Hydra and antlr for text that is not an override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def apply_overrides(config: "DictConfig", overrides: Sequence[str]) -> None:
    """Set keys of a composed configuration as `hydra.compose` does; Hydra has no public way. Tested with Hydra 1.3.

    Raises exceptions of Hydra for keys that the configuration lacks and values that it does not take.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    ConfigLoaderImpl._apply_overrides_to_config([parse_override(text) for text in overrides], config)


def sklearn_digits() -> "ndarray":
    """Return the images of `load_digits` with their digits in the last column [1797, 65]; tested with scikit-learn 1.9.

    `sklearn.datasets` imports pandas and scipy, which takes as long as an import of torch.
    """
    import numpy as np

    spec = find_spec("sklearn")
    file = Path(spec.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if spec else None
    if file is not None and file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.column_stack([values, labels])


@contextmanager
def watching_submissions(submitted: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Context that calls a function with the jobs that submitit submits; tested with submitit 1.5.

    Errors of sacct are dropped, because submitit repeats each of them on both streams at every poll.
    """
    import submitit
    from submitit.slurm.slurm import SlurmInfoWatcher

    submit, command = submitit.AutoExecutor.map_array, SlurmInfoWatcher._make_command

    def reporting(self: Any, *arguments: Any) -> list[Any]:
        jobs = submit(self, *arguments)
        submitted(jobs)
        return jobs

    def quiet(self: Any) -> list[str] | None:
        words = command(self)
        return words and ["sh", "-c", '"$@" 2>/dev/null || true', "sh", *words]

    executor: Any = submitit.AutoExecutor
    executor.map_array, SlurmInfoWatcher._make_command = reporting, quiet
    try:
        yield
    finally:
        executor.map_array, SlurmInfoWatcher._make_command = submit, command
