"""What `--cfg` and `--info` print, as Hydra does."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from diffusion_cli.config.catalogue import did_you_mean
from diffusion_cli.config.grid import load_grid
from diffusion_cli.config.hydra_words import split_hydra
from diffusion_cli.config.launcher import search_path, split_launcher
from diffusion_cli.config.loading import choosing_words, load, references
from diffusion_cli.config.runs import flatten, replaced
from diffusion_cli.config.schema import GRIDS
from diffusion_cli.config.sweepers import fixed_words, plan_sweep
from diffusion_cli.errors import NO_VALUE, UsageError

CFG = ("job", "hydra", "all")
"""Values of `--cfg`."""
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""Values of `--info`."""
OF_INFO = {
    "config": ("searchpath", "defaults-tree", "defaults"),
    "all": ("plugins", "searchpath", "defaults-tree", "defaults"),
}
"""Other values whose output a value prints first; the configuration follows."""


def config_text(
    command: str, overrides: Sequence[str], dirs: Sequence[Path], *, cfg: str, resolve: bool, package: str | None,
    multirun: bool,
) -> str:  # fmt: skip
    """Return the configuration of a command in YAML; of each job, for a sweep or a grid.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: folders with options of the user.
        cfg: part to print: one of `CFG`.
        resolve: whether to replace references `${...}` by their values.
        package: dotted key of the part to print; None: all.
        multirun: whether the jobs of a sweep are printed.

    Raises:
        UsageError: the configuration is invalid, or has no such part.
    """
    found = [_hydra(command, overrides, dirs, multirun, resolve)] if cfg in ("hydra", "all") else [{}]
    if cfg in ("job", "all"):
        jobs = [*_jobs(command, overrides, dirs, multirun, resolve)]
        found = [found[0] | job for job in jobs]
    if package is None or package == "_global_":
        return yaml.safe_dump_all(found, sort_keys=False, allow_unicode=True)
    texts = []
    for part in (_part(config, package) for config in found):
        is_node = isinstance(part, dict | list)
        shown = yaml.safe_dump(part, sort_keys=False, allow_unicode=True).removesuffix("...\n")
        texts.append(f"# @package {package}\n{shown}" if is_node else shown)
    return "---\n".join(texts)


def info_text(command: str, overrides: Sequence[str], dirs: Sequence[Path], what: str) -> str:
    """Return what Hydra knows of a command: its defaults list, search path or plugins; `what` is one of `INFO`."""
    from diffusion_cli.config.hydra_jobs import print_info

    own, others = split_hydra(command, split_launcher(overrides)[1], sweeping=True)
    groups = [text for text in own if text.startswith("hydra/")]
    words = [*choosing_words(command, others, dirs), *groups, *search_path(dirs)]
    with redirect_stdout(StringIO()) as printed:
        for part in OF_INFO.get(what, (what,)):
            print_info(part, command, words)
    if what not in OF_INFO:
        return printed.getvalue()
    settings = {"cfg": "job", "resolve": False, "package": None, "multirun": False}
    return f"{printed.getvalue()}\nConfig\n******\n{config_text(command, others, dirs, **settings)}"


def _jobs(
    command: str, overrides: Sequence[str], dirs: Sequence[Path], multirun: bool, resolve: bool
) -> Iterator[dict[str, Any]]:
    """Yield the configuration of each job."""
    if multirun:
        plan = plan_sweep(command, overrides, dirs)
        words = plan.jobs or plan.swept.variants
        configs = [load(command, job, dirs) for job in words]
    elif command in GRIDS:
        variants = load_grid(command, overrides, dirs)
        words, configs = [list(overrides)] * len(variants), [variant.config for variant in variants]
    else:
        words, configs = [list(overrides)], [load(command, overrides, dirs)]
    for job, config in zip(words, configs, strict=True):
        dumped = config.model_dump()
        unresolved = {} if resolve else references(command, job, dirs)
        values = flatten(dumped)
        yield replaced(dumped, {key: text for key, text in unresolved.items() if _applies(text, key, values)})


def _applies(reference: str, key: str, values: Mapping[str, Any]) -> bool:
    """Return whether a key has the value that its reference names; an earlier key of an option file may replace it."""
    if key not in values:
        return False
    whole = re.fullmatch(r"\$\{([\w.]+)\}", reference)
    return whole is None or values.get(whole[1], values[key]) == values[key]


def _hydra(
    command: str, overrides: Sequence[str], dirs: Sequence[Path], multirun: bool, resolve: bool
) -> dict[str, Any]:
    """Return Hydra's own settings of a command."""
    from diffusion_cli.config.hydra_jobs import hydra_config, own_settings

    if multirun:
        return {"hydra": own_settings(plan_sweep(command, overrides, dirs).hydra, resolve)}
    jobs = load_grid(command, overrides, dirs) if command in GRIDS else None
    first = jobs[0].config if jobs else load(command, overrides, dirs)
    words = [*fixed_words(first), *search_path(dirs)]
    return {"hydra": own_settings(hydra_config(command, words), resolve)}


def _part(config: Mapping[str, Any], package: str) -> Any:
    """Return the part of a configuration with a dotted key; UsageError if there is none."""
    part: Any = config
    for name in package.split("."):
        if not isinstance(part, Mapping) or name not in part:
            keys = list(dict.fromkeys([*config, *flatten(config)]))
            raise UsageError(
                f"--package {package}", NO_VALUE, "not in the configuration", did_you_mean(package, keys)
            )
        part = part[name]
    return part
