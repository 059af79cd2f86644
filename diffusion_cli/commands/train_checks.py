"""Checks of `diffuse train` before training: devices, configuration and data."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.conditions import Conditions
from diffusion_cli.config import TrainConfig, as_text, build, differing, identity
from diffusion_cli.config.at_hand import gpu
from diffusion_cli.config.catalogue import is_exactly, option_of
from diffusion_cli.config.option_keys import as_word, completed
from diffusion_cli.config.recipe import BUDGETED, derived_in
from diffusion_cli.config.runs import BEFORE, flatten
from diffusion_cli.config.validate import target
from diffusion_cli.config.values import Node
from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, class_name, format_value
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.distributed import ProcessInfo
from diffusion_cli.training.logs import LoggerConfig


def check_devices(config: TrainConfig, place: ProcessInfo) -> None:
    """Raise UsageError if the processes, nodes or GPUs differ from the configuration."""
    devices, nodes = config.trainer["devices"], config.trainer["num_nodes"]
    there = 0 if config.trainer["accelerator"] == "cpu" else torch.cuda.device_count()
    if 0 < there < (devices or 1):
        raise UsageError(
            "trainer.devices",
            devices,
            f"GPUs found: {there}",
            f"use at most {there}, or trainer=cpu",
        )
    if (devices or place.local_world) > 1 and config.trainer["accelerator"] in ("gpu", "mps") and there == 0:
        raise UsageError("trainer.devices", devices, "an Apple GPU is one device", "use trainer.devices=1")
    if place.world > 1 and devices not in (None, place.local_world):
        raise UsageError(
            "trainer.devices",
            devices,
            f"torchrun or srun started {place.local_world} processes on this node",
            "leave it null",
        )
    if nodes not in (None, place.nodes):
        raise UsageError(
            "trainer.num_nodes",
            nodes,
            f"nodes on which diffuse was started: {place.nodes}",
            f"start it with torchrun or srun on {nodes} nodes, or with -m launcher=slurm",
        )


def remark_on_machine(config: TrainConfig) -> str | None:
    """Return a warning if the recipe was derived with a GPU but torch finds none, or vice versa; else None."""
    assumed, there = gpu(config.trainer["accelerator"]), torch.cuda.is_available()
    recipe_depends_on_gpu = config.trainer["accelerator"] == "auto" and {
        "dataset.resolution",
        "max_steps",
    } & {*config.derived}
    if assumed == there or not recipe_depends_on_gpu:
        return None
    return (
        "trainer=auto: torch cannot use the GPU of this machine; install a torch build for it, or add trainer=cpu"
        if assumed
        else "trainer=auto: the recipe is for a machine without GPU, but torch found one; add trainer=gpu name=NEW"
    )


def check_loggers(config: TrainConfig) -> None:
    """Raise UsageError for a logger of this package that cannot be used.

    A class of a library or a plugin is built only where it is used, because its constructor may act.
    """
    for name, node in config.logger.items():
        if issubclass(target(node), LoggerConfig):
            build(node).check(f"logger.{name}")


def check_configuration(folder: Path, config: TrainConfig, stored: dict[str, Any]) -> None:
    """Raise UsageError if the run in a folder has another configuration."""
    theirs, ours = completed(stored), completed(config.model_dump())
    # Not of `identity`, which leaves out values.
    there, here = BEFORE | flatten(theirs), BEFORE | flatten(ours)
    derived = derived_in(stored) & set(config.derived)
    keys = [
        key
        for key in differing(identity(theirs), identity(ours))
        if key not in derived & BUDGETED.keys() and there.get(key) != here.get(key)
    ]
    if keys:
        groups = list(_other_options(config.model_dump(), stored, {key.partition(".")[0] for key in keys}))
        chosen = {problem.key for problem in groups}
        if groups:  # values derived in both follow from other choices
            keys = [key for key in keys if key not in derived and key.partition(".")[0] not in chosen]
        run = config.name if folder == Path("outputs", str(config.name)) else folder
        raise UsageError.several(
            [
                *(
                    problem._replace(problem=f"the run in {folder} has {problem.problem}")
                    for problem in [
                        *groups,
                        *(Problem(key, _shown(here.get(key)), _stored(key, there.get(key))) for key in keys),
                    ]
                ),
                Problem(
                    "name",
                    config.name,
                    "this run has another configuration",
                    f"continue with: diffuse train {as_text('run', str(run))}, or choose another name",
                ),
            ]
        )


def _shown(value: Any) -> str:
    """Return a value in the syntax of the command line, a list too."""
    return as_word(value) or format_value(value)


def _stored(key: str, value: Any) -> str:
    """Return what a run has for a key."""
    return f"no {key}" if value is None else _shown(value)


def _other_options(now: Node, before: Node, names: Collection[str]) -> Iterator[Problem]:
    """Yield a problem, with the run's option, for each of some groups with another option.

    An option of another class is named by its class if no option file has it. Options of one class are named only if
    the run and the command have them unchanged.
    """
    for group in sorted(names):
        ours, theirs = now.get(group), before.get(group)
        if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
            continue
        if "_target_" not in ours or "_target_" not in theirs:
            continue
        option, other = option_of(group, ours), option_of(group, theirs)
        if ours["_target_"] == theirs["_target_"]:
            if option is None or other is None or option == other:
                continue
            if not is_exactly(group, option, ours) or not is_exactly(group, other, theirs):
                continue
        names_of = [name or class_name(node) for name, node in ((option, ours), (other, theirs))]
        yield Problem(group, names_of[0], f"{group}={names_of[1]}")


def check_data(folder: Path, now: CheckpointInfo, before: CheckpointInfo) -> None:
    """Raise UsageError if the data differ from those that a run started with: images, classes or labels."""
    restore = "restore the data, or choose another name="
    plain, stored = now.model_dump(), before.model_dump()
    problems = [
        Problem(key, plain[key], f"the run in {folder} started with {stored[key]}", restore)
        for key in ("num_images", "class_names", "shape")
        if plain[key] != stored[key]
    ]
    if now.conditions != before.conditions:
        problem = "have other names, values or ranges than those that the run started with"
        problems.append(Problem("conditions", NO_VALUE, problem, restore))
    if difference := now.form.difference(before.form):
        key, ours, theirs = difference
        problems.append(Problem(key, ours, f"the images of the run in {folder} have {key}={theirs}", restore))
    if now.labels_sha256 != before.labels_sha256:
        what = _conditioning(now)
        remedy = f"restore the {what}, or choose another name="
        problems.append(Problem(what, NO_VALUE, "differ from those that the run started with", remedy))
    if problems:
        raise UsageError.several(problems)
    if before.data_sha256 not in (None, now.data_sha256):
        raise UsageError(
            "dataset",
            NO_VALUE,
            "the images or their names differ from those that the run started with",
            restore,
        )


def _conditioning(info: CheckpointInfo) -> str:
    """Return what `labels_sha256` covers, for messages, such as "attributes or captions"."""
    conditions = info.conditions or Conditions()
    words = {
        "attributes": bool(conditions.other_attributes),
        "labels": info.num_classes is not None and not conditions.other_attributes,
        "condition images": conditions.image is not None,
        "captions": conditions.text is not None,
    }
    return " or ".join(word for word, applies in words.items() if applies) or "labels"


def check_shares(stages: ResolutionSchedule, accumulate_grad_batches: int, world: int) -> None:
    """Raise UsageError unless `world` processes can share each accumulated batch evenly."""
    for stage in stages.all:
        if stage.batch_size // accumulate_grad_batches % world:
            raise UsageError(
                stages.key(stage),
                stage.batch_size,
                f"cannot be split evenly among {world} processes with "
                f"accumulate_grad_batches={accumulate_grad_batches}",
                f"use a multiple of {world * accumulate_grad_batches}",
            )
