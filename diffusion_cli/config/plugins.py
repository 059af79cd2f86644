"""Plugins: modules that the user allows, with classes to build and folders of options.

A module is allowed by `plugins=[module]` on the command line, by the environment variable DIFFUSE_PLUGINS, by an entry
point of an installed package in the group `diffuse.plugins`, or by `plugins: [module]` in `diffuse.yaml` of the working
folder once it was allowed there on a command line: the file may be that of another person. Its options are the files
`<group>/<option>.yaml` in the folder `conf` of the package, or beside the module. Nothing of a module is imported
before a configuration names one of its classes.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from diffusion_cli.config import libraries
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, counted, first_line, format_value
from diffusion_cli.system.trusted_paths import is_own_plugin, remember_plugin

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
    "measurement": ["diffusion_cli.editing.Measurement"],
    "metric": ["diffusion_cli.metrics.Metric", "diffusion_cli.metrics.ModelMetric"],
    "features": ["diffusion_cli.metrics.Features"],
    "reference": ["diffusion_cli.metrics.Reference"],
    "figure": ["diffusion_cli.figures.Figure"],
    "optimizer": ["torch.optim.Optimizer"],
    "lr_schedule": ["diffusion_cli.training.LRSchedule", "torch.optim.lr_scheduler.LRScheduler"],
    "logger": ["lightning.pytorch.loggers.Logger"],
    "callback": ["lightning.pytorch.callbacks.Callback"],
}
"""Base classes of the classes of each group that plugins extend."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
"""A list of names; one name alone is a list of one, as on the command line."""


class _File(BaseModel):
    """The content of `diffuse.yaml`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    plugins: Names = []
    config_dir: Names = []


def allow(names: Sequence[str]) -> None:
    """Allow modules for this process and those that it starts.

    Raises:
        UsageError: a name is not that of a module.
    """
    for name in names:
        _conf(name)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_from_environment(), *names]))


def named(words: Sequence[str]) -> list[str]:
    """Return the modules of the words `plugins=module` and `plugins=[module,module]`."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{KEY}=")]
    return [name.strip(" '\"") for value in values for name in value.strip("[]").split(",") if name.strip()]


def without_plugins(words: Sequence[str]) -> list[str]:
    """Allow the modules that words name, also for `diffuse.yaml` of this folder, and return the other words."""
    names = named(words)
    allow(names)
    for name in names:
        if name in _file().plugins:
            remember_plugin(Path.cwd(), name)
    return [word for word in words if not word.startswith(f"{KEY}=")]


def allowing_words() -> list[str]:
    """Return the word of a command line that allows the modules of this process; none without such modules."""
    names = _from_environment()
    return [f"{KEY}=[{','.join(names)}]"] if names else []


def allowed() -> list[str]:
    """Return the names of the allowed modules.

    Raises:
        UsageError: `diffuse.yaml` names a module that was never allowed in this folder.
    """
    known = [point.value.partition(":")[0] for point in _installed()] + _from_environment()
    for name in _file().plugins:
        if name not in known and not is_own_plugin(Path.cwd(), name):
            problem = "was never allowed in this folder"
            raise UsageError(
                f"{FILE}: {KEY}", name, problem, f"add {KEY}=[{name}] once if you trust its code"
            )
    return list(dict.fromkeys([*known, *_file().plugins]))


def folders() -> list[Path]:
    """Return the folders of options: those of the allowed modules, and those that `diffuse.yaml` names."""
    found = [_conf(name) for name in allowed()]
    for path in _file().config_dir:
        if not Path(path).expanduser().is_dir():
            remedy = "give a folder with <group>/<option>.yaml files"
            raise UsageError(f"{FILE}: config_dir", path, "no such folder", remedy)
        found.append(Path(path).expanduser())
    return [folder for folder in found if folder is not None]


def is_allowed(target: str) -> bool:
    """Return whether a class, as "package.module.Class", is in an allowed module."""
    return any(target.startswith(f"{name}.") for name in allowed())


def imported(target: str) -> Any:
    """Import a class of an allowed module.

    Raises:
        UsageError: its module cannot be imported, or defines no class of this name.
    """
    assert is_allowed(target), target
    module, _, name = target.rpartition(".")
    found = getattr(_module(module), name, None)
    # A name that the module only imports, such as os.system, was not allowed.
    if not inspect.isclass(found) or not is_allowed(f"{found.__module__}."):
        raise UsageError(KEY, module, f"defines no class {name}", f"correct _target_: {target}")
    return found


def function(place: str, key: str) -> Callable[..., Any]:
    """Import a function or class, as "module:name", of an allowed module.

    Args:
        place: module and name.
        key: configuration key of the place, for errors.

    Raises:
        UsageError: the module is not allowed, cannot be imported, or defines no such function.
    """
    module, _, name = place.partition(":")
    if not (module and name):
        raise UsageError(key, place, "is not a module and a function", f"write {key}=module:function")
    if not is_allowed(f"{module}."):
        remedy = f"add plugins=[{module.partition('.')[0]}] if you trust this module"
        raise UsageError(key, place, "is not a function of an allowed plugin", remedy)
    found = getattr(_module(module), name, None)
    if not callable(found):
        raise UsageError(key, place, f"{module} defines no function {name}", "correct the name")
    if not is_allowed(f"{getattr(found, '__module__', None)}."):  # as in `imported`
        remedy = f"write a function in {module} that calls it, or allow its module"
        raise UsageError(key, place, f"{module} only imports {name}", remedy)
    return found


def _module(name: str) -> ModuleType:
    """Import an allowed module, also from the working folder; UsageError if its code fails."""
    _conf(name.partition(".")[0])  # finds the module, also in the working folder
    try:
        return importlib.import_module(name)
    except Exception as error:  # code of the user
        if os.environ.get("DIFFUSE_TRACEBACK"):
            raise
        problem = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        remedy = "correct the module; DIFFUSE_TRACEBACK=1 shows the place"
        raise UsageError(KEY, name, problem, remedy) from error


def suits(target: str, group: str) -> Problem | None:
    """Return the problem of a class of an allowed module that is not one for a group; None for a suitable class."""
    if group not in BASES:
        return Problem(group, NO_VALUE, "plugins cannot extend it", f"choose from {', '.join(BASES)}")
    bases = [
        getattr(importlib.import_module(base.rpartition(".")[0]), base.rpartition(".")[2])
        for base in BASES[group]
    ]
    found = imported(target)
    if issubclass(found, tuple(bases)):
        lacking = sorted(getattr(found, "__abstractmethods__", ()))
        remedy = f"define {' and '.join(lacking)} as {BASES[group][0]} describes"
        return Problem(f"{group}._target_", target, "lacks methods", remedy) if lacking else None
    return Problem(
        f"{group}._target_", target, f"not a class for {group}", f"derive it from {' or '.join(BASES[group])}"
    )


def check_call(target: str, supplied: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Raise UsageError unless a class of an allowed module takes what the program passes by position."""
    try:
        inspect.signature(imported(target)).bind(*supplied, **given)
    except TypeError as error:
        problem = (
            f"its __init__ does not fit the {counted(len(supplied), 'positional argument')} of its group"
        )
        remedy = "see the table of groups in docs/howto/plugins.md"
        raise UsageError(KEY, target, f"{problem} ({error})", remedy) from error


def positional(target: str) -> list[str]:
    """Return the arguments of a class of an allowed module that no configuration may set, as they are positional."""
    found = imported(target)
    names = inspect.signature(found).parameters.keys()
    return [name for name in names if name not in libraries.parameters(found)]


def source(module: str) -> Path | None:
    """Return the source file of a module of a plugin or a library, found without importing it; None if it has none."""
    if is_allowed(f"{module}."):
        _conf(module.partition(".")[0])  # finds the module, also in the working folder
    spec = _spec(module, None)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def exists(name: str) -> bool:
    """Return whether Python finds a module of this name without the working folder; imports nothing."""
    return name in sys.stdlib_module_names or _spec(name, None) is not None


def place_of(error: BaseException) -> str | None:
    """Return file and line of an error in the code of an allowed module; None if there is none."""
    frames = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    places = [f"{file}:{line}" for module, file, line in frames if is_allowed(f"{module}.")]
    owner = type(error.obj) if isinstance(error, AttributeError) else None
    if owner is not None and is_allowed(f"{owner.__module__}."):
        places.append(f"{owner.__module__}.{owner.__name__}")  # lacks an attribute that the program reads
    return places[-1] if places else None


def in_use() -> list[str]:
    """Return the names of the allowed modules that this process has imported."""
    return [name for name in allowed() if name in sys.modules]


def _from_environment() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


@cache
def _installed() -> tuple[Any, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


def _file() -> _File:
    """Read `diffuse.yaml` of the working folder."""
    try:
        return _read(Path.cwd() / FILE)
    except FileNotFoundError:  # the folder was removed
        return _File()


@cache
def _read(path: Path) -> _File:
    if not path.is_file():
        return _File()
    try:
        return _File.model_validate(yaml.safe_load(path.read_text()) or {})
    except ValidationError as error:
        problems = [_wrong_key(path, detail) for detail in error.errors(include_url=False)]
        raise UsageError.several(problems) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        remedy = "write plugins: [module] and config_dir: [folder]"
        raise UsageError(path, NO_VALUE, f"is not valid ({first_line(error)})", remedy) from error


def _wrong_key(path: Path, detail: Any) -> Problem:
    """Return the problem of a key of `diffuse.yaml`."""
    name = ".".join(map(str, detail["loc"]))
    place = f"{path.name}: {name}" if name else path.name
    remedy = "write plugins: [module] and config_dir: [folder]"
    if detail["type"] == "extra_forbidden":
        return Problem(place, NO_VALUE, "unknown key", remedy)
    return Problem(place, format_value(detail["input"]), "must be a list of names", remedy)


@cache
def _conf(name: str) -> Path | None:
    """Return the folder of options of a module; None if it has none. Imports nothing.

    If only the working folder has the module, the folder joins the end of Python's path.
    """
    spec = _spec(name, None)
    if spec is None and (spec := _spec(name, [str(Path.cwd())])) is not None:
        sys.path.append(str(Path.cwd()))
    if spec is None:
        raise UsageError(KEY, name, "no such module", "install it, or run diffuse in its folder")
    places = spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]
    return next((folder for place in places if (folder := Path(place, OPTIONS)).is_dir()), None)


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Find a module without importing the packages that it is in; `path`: the folders of the first, None: Python's."""
    first, *rest = name.split(".")
    spec = _top_spec(first) if path is None else PathFinder.find_spec(first, path)
    for number in range(len(rest)):
        inside = spec and spec.submodule_search_locations
        spec = PathFinder.find_spec(".".join([first, *rest[: number + 1]]), inside) if inside else None
    return spec


def _top_spec(name: str) -> ModuleSpec | None:
    """Find a top-level module in a file, also one of an editable installation with an import hook of its own."""
    try:
        spec = PathFinder.find_spec(name) or importlib.util.find_spec(name)
    except ValueError:  # __main__, or an empty name
        return None
    return spec if spec is not None and (spec.has_location or spec.submodule_search_locations) else None
