"""The part of a training configuration that comes from the source of its first weights.

The network of a source is useful only with its own noise process, so both come from the source, unless an option
chooses another. Nothing here imports torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import PACKAGE, brought_by, content, lineage, options
from diffusion_cli.config.continued import folder_of, foreign_paths, stored_by
from diffusion_cli.config.recipe import AUTO, MODEL
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.tasks import AUTOENCODER, DENOISING, task_of_classes
from diffusion_cli.config.values import Node
from diffusion_cli.convert import read_source
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

SOURCES = ("run", "pretrained")
"""Keys of `init` that name a source."""
INITIAL = ("model", "schedule", "parameterization", "objective", "time_sampling", "sampler")
"""Groups with options that come from a source."""
PROCESS = ("schedule", "parameterization", "objective", "sampler")
"""Those of `INITIAL` that other programs have too."""
LATENT = "latent"
ATTENTION = "model.attention_resolutions"
"""Sizes of the levels of a U-Net with attention, which follow from the size of the data."""


@dataclass(frozen=True)
class InitialParts:
    """The configuration of a source of weights."""

    key: str
    """The source, as on the command line."""
    task: str
    nodes: Node
    """The node of each group of `INITIAL`, and `latent`."""
    problems: Sequence[Problem] = ()

    def check_task(self, task: str) -> None:
        """Raise UsageError if the source was trained for another task than the given one."""
        if self.task != task:
            raise UsageError(
                self.key, NO_VALUE, f"was trained with task={self.task}", f"set task={self.task}"
            )


def open_groups(
    choosing: Sequence[str], choices: Node, setting: Mapping[str, str], dirs: Sequence[Path]
) -> set[str]:
    """Return the groups that neither a word nor an experiment chooses, and `latent` if no key of it is set.

    Args:
        choosing: words of the command line that choose options.
        choices: the option of each group.
        setting: words that set a key, by key.
        dirs: folders with options of the user.
    """
    given = {word.partition("=")[0] for word in choosing if word != f"{MODEL}{AUTO}"}
    given |= {LATENT} if any(key.startswith(f"{LATENT}.") for key in setting) else set()
    if experiment := choices.get("experiment"):
        given |= brought_by(options("experiment", dirs)[experiment]).keys()
    return {*INITIAL, LATENT} - given


def follows_levels(model: Mapping[str, Any], given: Collection[str]) -> bool:
    """Return whether attention stays at the levels of the source: in a U-Net of this package, unless it is given.

    Args:
        model: class and options of the network of the source.
        given: the dotted keys that the user sets.
    """
    ours = str(model.get("_target_")).startswith(f"{PACKAGE}.")
    return ours and {"attention_resolutions", "channel_mult"} <= model.keys() and ATTENTION not in given


def set_by_experiment(choices: Node, groups: Collection[str], dirs: Sequence[Path]) -> set[str]:
    """Return the dotted keys of some groups that the chosen experiment sets."""
    if not (experiment := choices.get("experiment")):
        return set()
    files = lineage(options("experiment", dirs)[experiment])
    return {key for file in files for key in flatten(content(file)) if key.partition(".")[0] in groups}


def parts_of_pretrained(source: str) -> InitialParts:
    """Return the parts of a model of another program; UsageError if it cannot be read."""
    key = "init.pretrained"
    model = read_source(source, key)
    nodes: Node = {"model": model.network.node}
    if model.process is not None:
        nodes |= {group: getattr(model.process, group) for group in PROCESS}
    if model.autoencoder is not None:
        nodes[LATENT] = {"run": None, "pretrained": source}
    return InitialParts(f"{key}={source}", AUTOENCODER if model.process is None else DENOISING, nodes)


def parts_of_run(run: str, output_dir: str, usual: Node, given: Sequence[str]) -> InitialParts:
    """Return the parts of a run; UsageError if there is no such run.

    Args:
        run: its name or folder.
        output_dir: folder of the runs.
        usual: the configuration without the source.
        given: the keys and groups on the command line.
    """
    key = "init.run"
    try:
        folder = folder_of(run, output_dir, "init.step")
    except UsageError as error:
        raise error.renamed({"run": key}) from error
    stored = stored_by(folder)
    nodes: dict[str, Any] = {group: stored.get(group) for group in INITIAL}
    task = task_of_classes(
        [str(node.get("_target_")) for node in nodes.values() if isinstance(node, Mapping)]
    )
    problems = [
        Problem(
            name,
            path,
            f"path from the config of {folder}, which you did not train on this machine",
            f"add {name}=<path>",
        )
        for name, path in foreign_paths(folder, nodes, usual, given).items()
    ]
    latent = stored.get(LATENT)
    if isinstance(latent, Mapping) and any(latent.values()):
        nodes[LATENT] = {"run": run, "pretrained": None}
    return InitialParts(f"{key}={run}", task, nodes, problems)
