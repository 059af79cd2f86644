"""The configuration of a training: of a new run, of one that starts from weights, or of one that continues."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from diffusion_cli.config.at_hand import own_images
from diffusion_cli.config.compose import compose, parse
from diffusion_cli.config.continued import (
    folder_of,
    foreign_classes,
    foreign_paths,
    may_change,
    trained_by,
    with_values,
    without_processes,
)
from diffusion_cli.config.initial import (
    ATTENTION,
    INITIAL,
    SOURCES,
    follows_levels,
    open_groups,
    parts_of_pretrained,
    parts_of_run,
    set_by_experiment,
)
from diffusion_cli.config.overrides import known_keys
from diffusion_cli.config.recipe import (
    AUTO,
    DERIVED,
    MODEL,
    NETWORK_BEFORE_AUTO,
    chosen_network,
    conditioned,
    derived_in,
    started_with,
    with_recipe,
)
from diffusion_cli.config.runs import flatten, identity, replaced, run_names, usual_options
from diffusion_cli.config.schema import InitConfig
from diffusion_cli.config.tasks import task_problems
from diffusion_cli.config.typed import as_shown
from diffusion_cli.config.validate import validate
from diffusion_cli.config.values import Node
from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.system.trusted_paths import is_own_run


def continues(setting: Mapping[str, str]) -> bool:
    """Return whether the words of a training, by key, name a run to continue."""
    return setting.get("run", "run=null") != "run=null"


def training(
    choosing: Sequence[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """Return the configuration of a training, named and with its recipe, and a problem for each wrong word.

    Args:
        choosing: words that choose options.
        setting: words that set a key, by key.
        dirs: folders with options of the user.

    Raises:
        UsageError: the run, or the source of the first weights, cannot be read.
    """
    of_run = _continuing if continues(setting) else _new
    return of_run(choosing, setting, dirs)


def _new(
    choosing: Sequence[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """The configuration of a new run, or of one that starts again with the words that it began with."""
    implied, choices = compose("train", choosing, dirs)
    if any(_value(f"init.{name}", setting, implied) is not None for name in SOURCES):
        return _from_weights(choosing, setting, dirs)
    if choices["model"] != AUTO:
        composed, unknown = _with_keys(choosing, setting, implied, dirs)
        name = composed["name"] or _name(composed, implied, choices, dirs, implied)
        stored = started_with(Path(str(composed["output_dir"]), str(name)))
        unknown += task_problems(choosing, composed, choices)
        named = conditioned(composed, stored, setting) | {"name": name}
        return with_recipe(named, stored, cache(partial(own_images, composed["dataset"]))), unknown

    def with_network(option: str) -> list[str]:
        return [*(text for text in choosing if not text.startswith(MODEL)), f"{MODEL}{option}"]

    # The name of a run is the same on every machine: it has all stated keys of the network, for any option.
    words = with_network(NETWORK_BEFORE_AUTO)
    implied = compose("train", words, dirs)[0]
    composed, unknown = _with_keys(words, setting, implied, dirs)
    images = cache(partial(own_images, composed["dataset"]))
    stated = {key: AUTO for key in setting if key in flatten(implied) and key.startswith("model.")}
    name = composed["name"] or _name(composed, replaced(implied, stated), choices, dirs, implied)
    stored = started_with(Path(str(composed["output_dir"]), str(name)))
    option = chosen_network(composed, stored, images)
    if option != NETWORK_BEFORE_AUTO:
        words = with_network(option)
        composed, unknown = _with_keys(words, setting, None, dirs)
    unknown += task_problems(choosing, composed, choices)
    derived = [*composed["derived"], f"{MODEL}{option}"]
    named = conditioned(composed, stored, setting) | {"name": name, "derived": derived}
    return with_recipe(named, stored, images), unknown


def _from_weights(
    choosing: Sequence[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """The configuration of a training that starts from weights, and its problems.

    A run that has started keeps its network and process, even if those of the source have changed.
    """
    implied, choices = compose("train", choosing, dirs)
    groups = open_groups(choosing, choices, setting, dirs)
    on_top = {key for key in setting if key.partition(".")[0] in groups}
    composed, _ = _with_keys(
        choosing, {key: text for key, text in setting.items() if key not in on_top}, implied, dirs
    )
    before, now = ({key: node for key, node in of.items() if key not in groups} for of in (implied, composed))
    name = composed["name"] or _name_by_words(
        now, before, choices, {key: setting[key] for key in on_top}, dirs
    )
    stored = started_with(Path(str(composed["output_dir"]), str(name)))
    init, output_dir = composed["init"], str(composed["output_dir"])
    if problems := validate(InitConfig, init, "init")[1]:
        raise UsageError.several(problems)
    if all(flatten(stored).get(f"init.{key}") == init[key] for key in SOURCES):
        parts = stored
    else:
        given = [*(word.partition("=")[0] for word in choosing), *setting]
        source = (
            parts_of_run(init["run"], output_dir, implied, given)
            if init["run"]
            else parts_of_pretrained(init["pretrained"])
        )
        source.check_task(choices["task"])
        parts, problems = source.nodes, [*source.problems]
    composed |= {group: parts[group] for group in groups if parts.get(group) is not None}
    preset = {key: flatten(implied)[key] for key in set_by_experiment(choices, groups, dirs)}
    for key in sorted(preset.keys() - flatten(composed).keys()):
        problem, remedy = (
            f"sets {key}, which the source of the weights lacks",
            f"choose {key.partition('.')[0]}= too",
        )
        problems.append(Problem(f"experiment={choices['experiment']}", NO_VALUE, problem, remedy))
    known, unknown = known_keys("train", setting, composed)
    own = {item.key_or_group: item.value() for item in map(parse, known) if item.key_or_group in on_top}
    composed = replaced(
        composed,
        {key: value for key, value in (preset | own).items() if key in flatten(composed) or key in own},
    )
    problems += unknown + task_problems(choosing, composed, choices)
    derived = [*composed["derived"]]
    if "model" in groups and follows_levels(composed["model"], preset.keys() | own.keys()):
        derived.append(ATTENTION)
    named = conditioned(composed, stored, setting) | {"name": name, "derived": derived}
    return with_recipe(named, stored, cache(partial(own_images, composed["dataset"]))), problems


def _name_by_words(
    now: Node, before: Node, choices: Node, on_top: Mapping[str, str], dirs: Sequence[Path]
) -> str:
    """The name of a training that starts from weights: it does not follow from the source, which may change.

    Args:
        now: the configuration without the groups that come from the source.
        before: what the choices alone imply of it.
        choices: the option of each group.
        on_top: words that set a key of these groups, by key.
        dirs: folders with options of the user.
    """
    usual = usual_options(choices, dirs)
    stated = {key: parse(text).value() for key, text in on_top.items() if not may_change(key)}
    for group in INITIAL:  # a default option is a choice here
        if group in now and group != "schedule" and choices[group] == usual[group] and not may_change(group):
            stated[f"{group}.{group}"] = choices[group]
    named = choices if "schedule" in now else {**choices, "schedule": None}
    return run_names({**now, **stated}, before, named, dirs)[0]


def _value(key: str, setting: Mapping[str, str], implied: Node) -> Any:
    """The value of a key, on the command line or in the options that it chooses."""
    return parse(setting[key]).value() if key in setting else flatten(implied).get(key)


def _continuing(
    choosing: Sequence[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """The configuration of the run that `run=` names, and a line for each word that does not go with it."""
    groups = {text.partition("=")[0]: text for text in choosing}
    keys = {key: text for key, text in setting.items() if key != "run"}
    run = str(parse(setting["run"]).value())
    mistakes = [
        Problem(
            as_shown(text),
            NO_VALUE,
            *(
                (f"conflicts with run={run}, which continues that run", "leave one of them out")
                if key in (f"init.{name}" for name in SOURCES)
                else (f"cannot change for run={run}", "leave it out, or start a new run with name=")
            ),
        )
        for key, text in {**groups, **keys}.items()
        if not may_change(key)
    ]
    chosen = {group: text for group, text in groups.items() if may_change(group)}
    usual = compose("train", list(chosen.values()), dirs)[0]
    output_dir = str(parse(keys.pop("output_dir")).value()) if "output_dir" in keys else usual["output_dir"]
    folder = folder_of(run, output_dir)
    stored = trained_by(folder) if is_own_run(folder) else without_processes(trained_by(folder))
    for key, path in foreign_paths(folder, stored, usual, {*groups, *keys}).items():
        remedy = (
            f"add {key}=<path>"
            if may_change(key)
            else f"repeat its full training command with name={folder.name}"
        )
        mistakes.append(
            Problem(
                key,
                path,
                f"path from the config of {folder}, which you did not train on this machine",
                remedy,
            )
        )
    for key, target in foreign_classes(folder, stored, groups).items():
        group = key.partition(".")[0]
        problem = f"class from the config of {folder}, which you did not train on this machine"
        mistakes.append(Problem(key, target, problem, f"add {group}=<option> to choose your own"))
    # A run of an earlier version has fewer keys of the trainer, which is no part of its identity.
    stored = (
        {**stored, "trainer": {**usual["trainer"], **stored["trainer"]}} if "trainer" in stored else stored
    )
    composed = {**usual, **stored, **{group: usual[group] for group in chosen}}
    known, unknown = known_keys(
        "train", {key: text for key, text in keys.items() if may_change(key)}, composed
    )
    composed = with_values(composed, {item.key_or_group: item.value() for item in map(parse, known)})
    return composed | {"name": folder.name, "output_dir": str(folder.parent), "run": None}, mistakes + unknown


def _with_keys(
    choosing: Sequence[str], setting: Mapping[str, str], implied: Node | None, dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """A training's configuration by options and keys, and a problem for each unknown key."""
    if implied is None:
        implied = compose("train", choosing, dirs)[0]
    known, unknown = known_keys("train", setting, implied)
    return (compose("train", [*choosing, *known], dirs)[0] if known else implied), unknown


def _name(composed: Node, implied: Node, choices: Node, dirs: Sequence[Path], before: Node) -> str:
    """The name of a training; that of an existing run with the same values if its name has fewer of them.

    In versions without `auto` derived values were defaults, so that names lack them, and `before` is the configuration
    that the choices implied. The network of a later run may have been chosen by `auto`.
    """
    names = run_names(composed, implied, choices, dirs)
    runs = Path(str(composed["output_dir"]))
    if same := next((name for name in names if started_with(runs / name)), None):
        return same
    # In versions before format 7, no name of a run had the kind of its learning rate schedule.
    schedule = usual_options(choices, dirs)["lr_schedule"]
    _, unnamed = run_names(composed, implied, {**choices, "lr_schedule": schedule}, dirs)
    if unnamed not in names and (former := identity(started_with(runs / unnamed))):
        now = {key: value for key, value in identity(composed).items() if value != AUTO}
        if all(former.get(key, value) == value for key, value in now.items()):
            return unnamed
    now = identity(composed)
    stated = {key: now[key] for key in DERIVED if key in now and flatten(before)[key] == AUTO != now[key]}
    wanted = stated if choices["model"] == AUTO else stated | flatten({"model": composed["model"]})
    for number in range(len(stated) + 1):
        for left_out in combinations(stated, number):
            usual = replaced(before, {key: now[key] for key in left_out})
            both = [
                run_names(composed, usual, chosen, dirs) for chosen in (choices, {**choices, "model": AUTO})
            ]
            for shorter in chain(*both):
                existing = started_with(runs / shorter)
                same_network = f"{MODEL}{choices['model']}" in derived_in(existing)
                if (
                    existing
                    and ("derived" not in existing or same_network)
                    and wanted.items() <= flatten(existing).items()
                ):
                    return shorter
    return names[0]
