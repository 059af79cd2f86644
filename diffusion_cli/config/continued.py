"""The run that `diffuse train run=` names, the keys that may change, and the paths that are trusted."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import PACKAGE, defaults, documented, options
from diffusion_cli.config.recipe import BUDGETED, DECAY_STEPS, derived_in
from diffusion_cli.config.runs import file_in_place_of_run, flatten, identity, replaced
from diffusion_cli.convert import is_model
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.migrate import migrated_config
from diffusion_cli.system.locks import holder
from diffusion_cli.system.trusted_paths import is_own_run, unnamed
from diffusion_cli.system.untrusted import read_yaml

PATHS = {
    "path",
    "masks",
    "source",
    "factory",
    "run",
    "pretrained",
    "weights",
    "lpips_weights",
    "stats",
    "data_dir",
    "cache_dir",
}
"""Last names of the keys that take files and folders of this machine."""
IMPORTED = "imported"
"""Key of the source of an imported model, in place of the keys of a training."""
OUTWARD = ("logger", "callback")
"""Groups of classes that may act outside the folder of the run."""
SERVICES = {f"{PACKAGE}.training.{name}" for name in ("MLflow", "Trackio", "WandB")}
"""Loggers of the package that send a run to an account or an address."""


def may_change(key: str) -> bool:
    """Whether a run may continue with another value of a key: a budget, an interval, a place or a cost."""
    node: Any = None
    for name in reversed(key.split(".")):
        node = {name: node}
    return key != "name" and not identity(node)


def folder_of(run: str, output_dir: str, step_key: str | None = None) -> Path:
    """The folder of a run, by path or by name in `output_dir`; UsageError if there is none.

    Args:
        run: its path or name.
        output_dir: folder of the runs.
        step_key: the key that chooses one of its checkpoints; None without one.
    """
    folders = (Path(run).expanduser(), Path(output_dir, run))
    for folder in folders:
        if (folder / "checkpoints").is_dir():
            return folder if folder.name else folder.resolve()
    for folder in folders:
        if process := holder(folder):
            problem = f"has no checkpoint yet, and is being trained by {process}"
            raise UsageError("run", run, problem, "wait for its first checkpoint")
        if (folder / "config.yaml").is_file():
            raise UsageError("run", run, "has no checkpoint yet", "repeat the command that started it")
        if is_model(folder):
            raise UsageError("run", run, "is a model, not a run", f"use init.pretrained={folder}")
        if folder.is_file():
            raise UsageError("run", run, *file_in_place_of_run(folder, step_key))
    raise UsageError(
        "run", run, f"no such run, here or in {output_dir}", "use the path of its folder, or set output_dir"
    )


def stored_by(folder: Path) -> dict[str, Any]:
    """The configuration that a run was last trained with; UsageError if it cannot be read."""
    try:
        stored = read_yaml(folder / "config.yaml")
        if not isinstance(stored, dict):
            raise FormatError("not a run configuration")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            folder / "config.yaml",
            NO_VALUE,
            str(reason),
            f"repeat its full training command with name={folder.name}",
        ) from error
    return migrated_config(stored)


def trained_by(folder: Path) -> dict[str, Any]:
    """The configuration of a run that training can continue; UsageError as `stored_by`, and for an imported model."""
    stored = stored_by(folder)
    if IMPORTED in stored:
        problem = f"was imported from {stored[IMPORTED]}, so it has no training to continue"
        remedy = f"start from its weights with: diffuse train init.run={folder.name} name=<new>"
        raise UsageError("run", folder.name, problem, remedy)
    return stored


def without_processes(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run without its numbers of processes, which are another machine's."""
    unset = {"trainer.devices": None, "trainer.num_nodes": None, "dataset.num_workers": 0}
    return replaced(stored, {key: unset[key] for key in unset.keys() & flatten(stored).keys()})


def foreign_paths(
    folder: Path, stored: Mapping[str, Any], usual: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """The untrusted paths of a run: the user did not train it here, does not name them now, and no option has them.

    Args:
        folder: the run's folder.
        stored: its configuration.
        usual: the configuration without any word.
        given: the keys and groups on the command line.
    """
    if is_own_run(folder):
        return {}
    shipped = {str(value) for value in flatten(usual).values()} | {
        value
        for group in defaults("train")
        for file in options(group).values()
        for _, value, _ in documented(file)
    }
    found = {
        key: value
        for key, value in flatten(stored).items()
        if key.rpartition(".")[2] in PATHS and isinstance(value, str) and value not in shipped
        if not key.startswith("init.")  # read at the start of the run only
    }
    named = {key for key in found if {key, key.partition(".")[0]} & set(given)}
    data = {key: path for key, path in found.items() if key.startswith("dataset.")}
    node = stored.get("dataset")
    trained = set(data) - {f"dataset.{name}" for name in unnamed(node if isinstance(node, Mapping) else {})}
    return {key: path for key, path in found.items() if key not in named | trained}


def foreign_classes(folder: Path, stored: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The loggers and callbacks of a run that may act outside its folder, such as send its numbers to a server.

    Those are the classes of libraries, plugins and `SERVICES`, if the user did not train the run here and names no
    option of their group now.

    Args:
        folder: the run's folder.
        stored: its configuration.
        given: the keys and groups on the command line.
    """
    if is_own_run(folder):
        return {}
    targets = {
        f"{group}.{name}": node.get("_target_") if isinstance(node, Mapping) else node
        for group in OUTWARD
        if group not in given and isinstance(stored.get(group), Mapping)
        for name, node in stored[group].items()
    }
    return {
        key: target
        for key, target in targets.items()
        if target in SERVICES or not str(target).startswith(f"{PACKAGE}.")
    }


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values of some dotted keys.

    What was derived from the budget is derived from the new one, as where a whole command gives it.
    """
    derived = derived_in(config)
    before = flatten(config)
    decay_steps, max_steps = before.get(DECAY_STEPS), before["max_steps"]
    falls = (
        DECAY_STEPS in derived
        if "derived" in config
        else decay_steps is not None and decay_steps == max_steps
    )
    max_steps = values.get("max_steps", max_steps)
    followed = {key: BUDGETED[key](max_steps) for key in derived & BUDGETED.keys()}
    if falls:
        followed[DECAY_STEPS] = max_steps
    return replaced(config, followed | dict(values))
