"""Hydra's composition of a command's options and keys, as plain data."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

from diffusion_cli.config import plugins
from diffusion_cli.config.catalogue import CONF, defaults
from diffusion_cli.config.key_types import takes_mapping
from diffusion_cli.config.mapping_words import MARK, decoded, separated
from diffusion_cli.config.option_keys import defaults_left_out
from diffusion_cli.config.renamed import renamed_beside, renamed_keys
from diffusion_cli.config.runs import flatten, replaced
from diffusion_cli.config.typed import KEY, SWEEPS, as_shown, as_text, misspelt_function, quoted
from diffusion_cli.config.values import Node
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.compat import apply_overrides, parse_override


def parse(text: str) -> "Override":
    """Parse an override as Hydra does; UsageError if it is not one."""
    try:
        return parse_override(text)
    except Exception as error:  # antlr's and Hydra's own classes
        raise UsageError(as_shown(text), NO_VALUE, *_syntax_problem(text)) from error


def _syntax_problem(text: str) -> tuple[str, str]:
    """The problem and the remedy of text that is not an override."""
    key, equals, value = text.partition("=")
    if not equals:
        return "not key=value", "write key=value"
    if not KEY.fullmatch(key):
        return "invalid key", "use letters, digits, _ and . in keys"
    if (function := misspelt_function(value)) is not None:
        return f"unknown function {value.partition('(')[0]}", f"did you mean {function}?"
    if "${" in value:
        return "invalid reference ${...}", "use the name of a key, such as ${seed}"
    parts = separated(value)
    if any(not part.strip() for part in parts):
        return "misplaced comma", f"write {key}={','.join(part for part in parts if part.strip())}"
    if value.startswith(SWEEPS):
        return "not a list of values", f"write {key}=1,2,3 or {key}=range(1,4)"
    return "unmatched bracket or quote", f"write {key}=[a,b] for a list, {as_text(key, value)} for text"


def compose(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> tuple[Node, Node]:
    """Hydra's composition of a command's configuration, and the option chosen for each group, as plain data.

    A dataset's option also sets how one trains on it: where nothing is trained, its node is taken from training's.
    """
    if command != "train" and "dataset" in defaults(command):
        mine, others = [], []
        for text in overrides:
            (mine if re.match(r"dataset[=.]", text) else others).append(text)
        composed, choices = _compose(command, others, dirs)
        if mine:
            if not any(text.startswith("dataset=") for text in mine):
                return composed | {"dataset": _paths_of_the_run(mine)}, choices
            trained, chosen = _compose("train", mine, dirs)
            composed["dataset"], choices["dataset"] = trained["dataset"], chosen["dataset"]
        return composed, choices
    return _compose(command, overrides, dirs)


def _paths_of_the_run(overrides: Sequence[str]) -> Node:
    """The paths of a run's own dataset, from overrides of `RUN_DATA`."""
    parsed = [parse(text) for text in overrides]
    return {item.key_or_group.removeprefix("dataset."): str(item.value()) for item in parsed}


def _compose(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> tuple[Node, Node]:
    """As `compose`, of the options of one file; each composition of this package's own is made once."""
    dirs = (*plugins.folders(), *dirs)
    made = _compose_once if dirs else _compose_cached
    return copy.deepcopy(made(command, tuple(overrides), dirs))


_chosen: ContextVar[dict[Any, tuple["DictConfig", Node]] | None] = ContextVar("chosen", default=None)
"""Compositions of options that are kept although files of a user may change later."""


@contextmanager
def keeping_options() -> Iterator[None]:
    """Context in which Hydra composes the same options once, also those in folders of a user."""
    token = _chosen.set({})
    try:
        yield
    finally:
        _chosen.reset(token)


def by_hydra(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> "DictConfig":
    """Return Hydra's composition of a command's file, with its own settings."""
    import hydra

    folders = ",".join(quoted(f"file://{folder.resolve()}") for folder in dirs)
    searchpath = [f"hydra.searchpath=[{folders}]"] if dirs else []
    left_out = defaults_left_out(command, overrides, dirs) if dirs else []
    with hydra.initialize_config_dir(str(CONF), job_name="diffuse", version_base="1.3"):
        words = [*left_out, *overrides, *searchpath]
        return hydra.compose(command, overrides=words, return_hydra_config=True)


def _chosen_options(command: str, choosing: Sequence[str], dirs: Sequence[Path]) -> tuple["DictConfig", Node]:
    """Hydra's composition of the chosen options, without its own settings, and the option of each group."""
    from omegaconf import OmegaConf, flag_override

    composed = by_hydra(command, choosing, dirs)
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(choices, dict)
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed, {str(group): option for group, option in choices.items() if group in defaults(command)}


_options_cached = cache(_chosen_options)


def _kept_options(command: str, choosing: Sequence[str], dirs: Sequence[Path]) -> tuple["DictConfig", Node]:
    """As `_chosen_options`, once within `keeping_options`."""
    kept, key = _chosen.get(), (command, tuple(choosing), tuple(dirs))
    if kept is None:
        return _chosen_options(command, choosing, dirs)
    if key not in kept:
        kept[key] = _chosen_options(command, choosing, dirs)
    return kept[key]


def _compose_once(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> tuple[Node, Node]:
    """Compose the options, a tenth of a second of Hydra's work that is done once, and set the keys."""
    from omegaconf import OmegaConf

    choosing = tuple(text for text in overrides if text.partition("=")[0] in defaults(command))
    options_of = _kept_options if dirs else _options_cached
    composed, choices = copy.deepcopy(options_of(command, choosing, dirs))
    apply_overrides(composed, [text for text in overrides if text not in choosing])
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    if command == "train":
        unresolved = OmegaConf.to_container(composed)
        assert isinstance(unresolved, dict)
        raw = {str(key): value for key, value in unresolved.items()}
        plain["derived"] = [key for key, value in flatten(raw).items() if value == "${max_steps}"]
    written = _with_mappings(command, {str(key): value for key, value in plain.items()}, overrides, dirs)
    if renamed := renamed_keys(written) + renamed_beside(written, overrides):
        raise UsageError.several(renamed)
    return migrated(written), choices  # option files of users are of any version


_compose_cached = cache(_compose_once)


def _with_mappings(command: str, composed: Node, overrides: Sequence[str], dirs: Sequence[Path]) -> Node:
    """Return a configuration with the mappings of overrides in place of their text, but prompts and paths as typed."""
    keys = {text.partition("=")[0].lstrip("+") for text in overrides if MARK in text}
    flat = flatten(composed)
    taken = [key for key in keys if key in flat and takes_mapping(command, key, overrides, dirs)]
    return replaced(composed, {key: decoded(flat[key]) for key in taken}) if taken else composed
