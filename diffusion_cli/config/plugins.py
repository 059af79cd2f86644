"""Plugins: modules that the user allows, with classes to build and folders of options.

A module is allowed by `plugins=[module]` on the command line, by `plugins: [module]` in `diffuse.yaml` of the working
folder, by the environment variable DIFFUSE_PLUGINS, or by an entry point of an installed package in the group
`diffuse.plugins`. Its options are the files `<group>/<option>.yaml` in the folder `conf` of the package, or beside the
module. Nothing of a module is imported before a configuration names one of its classes.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from diffusion_cli.errors import NO_VALUE, Problem, UsageError, first_line

VARIABLE = "DIFFUSE_PLUGINS"
"""Environment variable with the names of modules, separated by commas; child processes inherit it."""
FILE = "diffuse.yaml"
KEY = "plugins"
ENTRY_POINTS = "diffuse.plugins"
OPTIONS = "conf"
BASES = {
    "dataset": ["diffusion_cli.data.Dataset"],
    "model": ["torch.nn.Module"],
    "schedule": ["diffusion_cli.diffusion.schedules.Schedule"],
    "parameterization": ["diffusion_cli.diffusion.parameterizations.Parameterization"],
    "objective": ["diffusion_cli.diffusion.objectives.Objective"],
    "time_sampling": ["diffusion_cli.diffusion.time_sampling.Times"],
    "sampler": ["diffusion_cli.samplers.Sampler"],
    "guidance": ["diffusion_cli.diffusion.guidance.Guidance"],
    "edit": ["diffusion_cli.editing.Edit"],
    "restoration": ["diffusion_cli.editing.RestorationMethod"],
    "metric": ["diffusion_cli.metrics.Metric", "diffusion_cli.metrics.ModelMetric"],
    "features": ["diffusion_cli.metrics.Features"],
    "reference": ["diffusion_cli.metrics.Reference"],
    "figure": ["diffusion_cli.figures.Figure"],
}
"""Base classes of the classes of each group that plugins extend."""


class _File(BaseModel):
    """The content of `diffuse.yaml`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    plugins: list[str] = []
    config_dir: list[str] = []


def allow(names: Sequence[str]) -> None:
    """Allow modules for this process and those that it starts.

    Raises:
        UsageError: a name is not that of a module.
    """
    known = _from_environment()
    os.environ[VARIABLE] = ",".join([*known, *(name for name in names if name not in known)])
    for name in names:
        _conf(name)


def without_plugins(words: Sequence[str]) -> list[str]:
    """Allow the modules of the words `plugins=module` and `plugins=[module,module]`, and return the other words."""
    named = [word.partition("=")[2] for word in words if word.startswith(f"{KEY}=")]
    allow([name.strip(" '\"") for value in named for name in value.strip("[]").split(",") if name.strip()])
    return [word for word in words if not word.startswith(f"{KEY}=")]


def allowed() -> list[str]:
    """Return the names of the allowed modules."""
    installed = [point.value.partition(":")[0] for point in _installed()]
    return list(dict.fromkeys([*installed, *_file(Path.cwd()).plugins, *_from_environment()]))


def folders() -> list[Path]:
    """Return the folders of options: those of the allowed modules, and those that `diffuse.yaml` names."""
    found = [_conf(name) for name in allowed()]
    found += [Path(path).expanduser() for path in _file(Path.cwd()).config_dir]
    return [folder for folder in found if folder is not None]


def is_allowed(target: str) -> bool:
    """Return whether a class, as "package.module.Class", is in an allowed module."""
    return any(target.startswith(f"{name}.") for name in allowed())


def imported(target: str) -> Any:
    """Import a class or a function of an allowed module.

    Raises:
        UsageError: its module cannot be imported, or defines no class or function of this name.
    """
    assert is_allowed(target), target
    module, _, name = target.rpartition(".")
    _find_in_working_folder()
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # code of the user
        if os.environ.get("DIFFUSE_TRACEBACK"):
            raise
        problem = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        remedy = "correct the module; DIFFUSE_TRACEBACK=1 shows the place"
        raise UsageError(KEY, module, problem, remedy) from error
    # A name that the module only imports, such as os.system, was not allowed.
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not is_allowed(f"{found.__module__}."):
        raise UsageError(KEY, module, f"defines no class {name}", f"correct _target_: {target}")
    return found


def suits(target: str, group: str) -> Problem | None:
    """Return the problem of a class of an allowed module that is not one for a group; None for a suitable class."""
    if group not in BASES:
        return Problem(group, NO_VALUE, "plugins cannot extend it", f"choose from {', '.join(BASES)}")
    bases = [
        getattr(importlib.import_module(base.rpartition(".")[0]), base.rpartition(".")[2])
        for base in BASES[group]
    ]
    found = imported(target)
    if inspect.isclass(found) and issubclass(found, tuple(bases)):
        return None
    return Problem(
        f"{group}._target_", target, f"not a class for {group}", f"derive it from {' or '.join(BASES[group])}"
    )


def parameters(target: str) -> dict[str, tuple[Any, Any]]:
    """Return the keyword-only arguments of a class of an allowed module: type and default, `...` for none."""
    found = imported(target)
    hints = get_type_hints(found.__init__ if inspect.isclass(found) else found, include_extras=True)
    return {
        name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def place_of(error: BaseException) -> str | None:
    """Return file and line of an error in the code of an allowed module; None if there is none."""
    frames = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    places = [f"{file}:{line}" for module, file, line in frames if is_allowed(f"{module}.")]
    return places[-1] if places else None


def _from_environment() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


@cache
def _installed() -> tuple[Any, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


@cache
def _file(folder: Path) -> _File:
    """Read `diffuse.yaml` of the working folder."""
    path = folder / FILE
    if not path.is_file():
        return _File()
    try:
        return _File.model_validate(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        remedy = "write plugins: [module] and config_dir: [folder]"
        raise UsageError(path, NO_VALUE, f"is not valid ({first_line(error)})", remedy) from error


@cache
def _conf(name: str) -> Path | None:
    """Return the folder of options of a module; None if it has none."""
    _find_in_working_folder()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(KEY, name, "no such module", "install it, or run diffuse in its folder")
    places = spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]
    return next((folder for place in places if (folder := Path(place, OPTIONS)).is_dir()), None)


def _find_in_working_folder() -> None:
    """Let Python find modules of the working folder, after all others."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
