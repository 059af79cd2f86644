"""From the words of a command line to a checked configuration."""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

from diffusion_cli.config import plugins
from diffusion_cli.config.at_hand import own_images
from diffusion_cli.config.catalogue import CONF, defaults, options
from diffusion_cli.config.continued import (
    folder_of,
    foreign_classes,
    foreign_paths,
    may_change,
    trained_by,
    with_values,
    without_processes,
)
from diffusion_cli.config.experiments import experiment_problems, named_by_file
from diffusion_cli.config.hydra_words import hydra_in_files, hydra_problem, is_of_hydra
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
from diffusion_cli.config.key_types import takes_list, takes_mapping
from diffusion_cli.config.mapping_words import LABEL, MARK, decoded, separated, with_one_label
from diffusion_cli.config.option_keys import REQUIRED, defaults_left_out
from diffusion_cli.config.own_options import composition_problems, incomplete_files
from diffusion_cli.config.recipe import (
    AUTO,
    DERIVED,
    MODEL,
    NETWORK_BEFORE_AUTO,
    chosen_network,
    conditioned,
    derived_in,
    resolution,
    started_with,
    with_recipe,
)
from diffusion_cli.config.renamed import (
    renamed_beside,
    renamed_in_files,
    renamed_key,
    renamed_keys,
    renamed_split,
)
from diffusion_cli.config.runs import flatten, identity, replaced, run_names, usual_options
from diffusion_cli.config.schema import COMMANDS, GRIDS, UNSWEPT, Config, InitConfig
from diffusion_cli.config.secret_values import secrets_in
from diffusion_cli.config.tasks import task_problems
from diffusion_cli.config.typed import (
    KEY,
    SWEEPS,
    as_shown,
    as_text,
    as_typed,
    misspelt_function,
    quoted,
)
from diffusion_cli.config.unknown import unknown_key, unknown_option
from diffusion_cli.config.validate import check_node, validate
from diffusion_cli.config.values import Node
from diffusion_cli.config.words import accepted
from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.compat import apply_overrides, parse_override
from diffusion_cli.system.trusted_paths import is_own_run

# What runs the jobs of a sweep: `launcher=slurm`, or as Hydra spells it.
LAUNCHER = re.compile(r"(hydra[/.])?launcher(?=[.=])")

OF_RUNS = ("eval", "compare")
"""The commands that read the dataset of a run unless they name another."""
RUN_DATA = ("dataset.path", "dataset.masks", "dataset.source", "dataset.factory")
"""The keys with the places of a run's own dataset."""


def load(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> Config:
    """Compose and check the configuration of a command; raises UsageError with all of them at once."""
    try:
        return _load(command, overrides, dirs)
    except UsageError as error:
        raise UsageError.several(named_by_file(command, overrides, dirs, error.problems)) from error


def _load(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> Config:
    """As `load`, with errors that do not name the file of an experiment."""
    for problems_in in (renamed_in_files, incomplete_files, experiment_problems, hydra_in_files):
        if wrong := problems_in(command, overrides, dirs):
            raise UsageError.several(wrong)
    words, mistakes = _with_one_label(command, as_typed(command, overrides, dirs))
    choosing, setting, wrong_words = _sort(command, words, dirs)
    mistakes += wrong_words
    try:
        composed, unknown = (
            _continuing(choosing, setting, dirs)
            if command == "train" and setting.get("run", "run=null") != "run=null"
            else _training(choosing, setting, dirs)
            if command == "train"
            else _composed(command, choosing, setting, dirs)
        )
    except UsageError as error:
        raise UsageError.several(_one_per_plugin([*mistakes, *error.problems])) from error
    except Exception as error:  # Hydra and OmegaConf have no common base class
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf", "antlr4", "yaml"):
            raise
        raise UsageError.several(
            [*mistakes, *composition_problems(command, overrides, dirs, error)]
        ) from error
    config, wrong = _check(command, composed)
    if any(
        problem.key == "max_steps" for problem in wrong
    ):  # what is derived from it is wrong only because of it
        wrong = [problem for problem in wrong if problem.key not in composed["derived"]]
    unknown = _without_consequences(unknown, mistakes)
    mistakes += [*unknown, *secrets_in(composed), *_without_consequences(wrong, [*mistakes, *unknown])]
    if mistakes or config is None:
        raise UsageError.several(_one_per_plugin(mistakes))
    return config


def _with_one_label(command: str, words: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Words with one `label=` for all `label.<name>=`, where a command has the key, and the conflicts."""
    return with_one_label(words) if LABEL in COMMANDS[command].model_fields else ([*words], [])


def _one_per_plugin(problems: Sequence[Problem]) -> list[Problem]:
    """The problems with only the first of those that end by allowing the same plugin."""
    first = {problem.remedy: problem for problem in reversed(problems)}
    return [
        problem
        for problem in problems
        if not problem.remedy.startswith(f"add {plugins.KEY}=") or first[problem.remedy] is problem
    ]


def _without_consequences(problems: Sequence[Problem], words: Sequence[Problem]) -> list[Problem]:
    """The problems of keys without those that follow from wrong words: a group that has no option, a misspelt key."""
    wrong = {_key_of(problem) for problem in words}
    meant = {problem.remedy for problem in words}
    return [
        problem
        for problem in problems
        if not {_key_of(problem), _key_of(problem).partition(".")[0]} & wrong
        and f"did you mean {problem.key}?" not in meant
    ]


def _key_of(problem: Problem) -> str:
    """The key of a problem with a word or a key."""
    return str(problem.key).partition("=")[0].lstrip("+")


def _composed(
    command: str, choosing: list[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """The configuration of a command that does not train, and a line for each unknown key."""
    implied = compose(command, choosing, dirs)[0]
    known, unknown = _known(command, setting, implied)
    composed = compose(command, [*choosing, *known], dirs)[0] if known else implied
    dataset = composed.get("dataset")
    if isinstance(dataset, dict) and dataset.get("resolution") == AUTO:
        dataset["resolution"] = resolution(own_images(dataset), on_gpu=True)  # the same on every machine
    return composed, unknown


def _training(
    choosing: Sequence[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """The configuration of a training, named and with its recipe, and a line for each unknown key."""
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
    known, unknown = _known("train", setting, composed)
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
    known, unknown = _known("train", {key: text for key, text in keys.items() if may_change(key)}, composed)
    composed = with_values(composed, {item.key_or_group: item.value() for item in map(parse, known)})
    return composed | {"name": folder.name, "output_dir": str(folder.parent), "run": None}, mistakes + unknown


def _with_keys(
    choosing: Sequence[str], setting: Mapping[str, str], implied: Node | None, dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """A training's configuration by options and keys, and a problem for each unknown key."""
    if implied is None:
        implied = compose("train", choosing, dirs)[0]
    known, unknown = _known("train", setting, implied)
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
    # In versions before format 7, the kind of the schedule followed from a value that no name had.
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


def references(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> dict[str, str]:
    """Return the values `${...}` of a command's configuration, by dotted key; none for a run that continues."""
    from omegaconf import OmegaConf

    words, _ = _with_one_label(command, as_typed(command, overrides, dirs))
    choosing, setting, _ = _sort(command, words, dirs)
    if command == "train" and setting.get("run", "run=null") != "run=null":
        return {}
    choosing = [text for text in choosing if command == "train" or not text.startswith("dataset=")]
    plain = OmegaConf.to_container(_by_hydra(command, choosing, (*plugins.folders(), *dirs)))
    assert isinstance(plain, dict)
    written = flatten({str(key): value for key, value in plain.items() if key != "hydra"}) | {
        key: as_shown(text).partition("=")[2] for key, text in setting.items()
    }
    return {key: value for key, value in written.items() if isinstance(value, str) and "${" in value}


def choosing_words(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> list[str]:
    """Return the overrides that choose options; UsageError for wrong ones."""
    choosing, _, mistakes = _sort(command, as_typed(command, overrides, dirs), dirs)
    if mistakes:
        raise UsageError.several(mistakes)
    return choosing


def _by_hydra(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> "DictConfig":
    """Hydra's composition of a command's file, with its own settings."""
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

    composed = _by_hydra(command, choosing, dirs)
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(choices, dict)
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed, {str(group): option for group, option in choices.items() if group in defaults(command)}


_options_cached = cache(_chosen_options)


def _compose_once(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> tuple[Node, Node]:
    """Compose the options, a tenth of a second of Hydra's work that is done once, and set the keys."""
    from omegaconf import OmegaConf

    choosing = tuple(text for text in overrides if text.partition("=")[0] in defaults(command))
    options_of = _chosen_options if dirs else _options_cached
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


def _sort(
    command: str, overrides: Sequence[str], dirs: Sequence[Path]
) -> tuple[list[str], dict[str, str], list[Problem]]:
    """Overrides that choose an option, those that set a key (text by key), and what is wrong with the others."""
    groups = defaults(command)
    choosing: list[str] = []
    setting: dict[str, str] = {}
    mistakes: list[Problem] = []
    for text in overrides:
        try:
            item = parse(text)
        except UsageError as mistake:
            mistakes += mistake.problems
            continue
        key, shown = item.key_or_group, as_shown(text)
        if is_of_hydra(text) and not LAUNCHER.match(text):
            mistakes += filter(None, [hydra_problem(command, text, sweeping=False)])
            continue
        renamed = None if item.is_sweep_override() else renamed_split(key, item.value())
        if renamed is not None:
            mistakes.append(renamed)
        elif item.is_force_add() or item.is_add() or item.is_delete():
            remedy = "leave it out" if item.is_delete() else f"write {shown.lstrip('+')}"
            mistakes.append(Problem(shown, NO_VALUE, "keys cannot be added or removed", remedy))
        elif item.package is not None:
            mistakes.append(Problem(shown, NO_VALUE, "@ in a key is not supported", "write key=value"))
        elif item.is_sweep_override():
            as_list = takes_list(command, key, overrides, dirs)
            remedy = _one_value(command, shown, _listed_values(item, dirs), as_list)
            mistakes.append(Problem(shown, NO_VALUE, "several values", remedy))
        elif key in groups and isinstance(item.value(), list) and not isinstance(groups[key], list):
            mistakes.append(Problem(shown, NO_VALUE, "takes one option", _listed_options(item)))
        elif key in groups:
            value = item.value()
            names = value if isinstance(value, list) else [value]
            known = options(key, dirs)
            wrong = ["null" if name is None else str(name) for name in names if str(name) not in known]
            mistakes += [unknown_option(command, key, name, dirs) for name in wrong]
            choosing += [] if wrong else [text]
        else:
            setting[key] = f"{key}={ours}" if (ours := accepted(key, item.value())) else text
    return choosing, setting, mistakes


def _listed_options(item: "Override") -> str:
    """The remedy for a list of options of a group that takes one."""
    key, listed = item.key_or_group, item.get_value_element_as_str()[1:-1]
    return f"{'with -m ' if ',' in listed else ''}write {key}={listed or '<option>'}"


def _listed_values(item: "Override", dirs: Sequence[Path]) -> str:
    """The values of an override with several, separated by commas; empty for an interval."""
    from hydra.core.override_parser.types import Glob

    value = item.value()
    if isinstance(value, Glob):
        return ",".join(value.filter([*options(item.key_or_group, dirs)]))
    words = () if item.is_interval_sweep() else item.sweep_string_iterator()
    return as_shown(f"=[{','.join(words)}]")[2:-1]


def _one_value(command: str, text: str, listed: str, as_list: bool) -> str:
    """The remedy for several values of a key; `listed` has the values that a list can have."""
    key, _, value = text.partition("=")
    if command in GRIDS or as_list:
        return f"write {key}=[{listed or '<value>'}]"
    if not listed:
        return "give one, or add -m" + " hydra/sweeper=optuna" * ("interval(" in value)
    if "/" in value:
        return f"write {as_text(key, value)} for a path with a comma, or add -m for one run per value"
    return "give one, or add -m for one run per value"


def _known(command: str, setting: Mapping[str, str], implied: Node) -> tuple[list[str], list[Problem]]:
    """The overrides of keys that the chosen options have, and a line for the others."""
    keys = [*flatten(implied), *defaults(command)]
    if command in OF_RUNS and implied.get("dataset") is None:
        keys += RUN_DATA
    known, unknown = [], []
    for key, text in setting.items():
        shown = as_shown(text)
        if LAUNCHER.match(text) and command not in UNSWEPT:
            unknown.append(Problem(shown, NO_VALUE, "applies to sweeps only", "add -m"))
            continue
        if any(other == key or other.startswith(f"{key}.") for other in keys):
            known.append(text)
            continue
        if renamed := renamed_key(command, key, parse(text).value()):
            unknown.append(renamed)
            continue
        unknown.append(unknown_key(command, shown, keys))
    return known, unknown


def _check(command: str, composed: Node) -> tuple[Config | None, list[Problem]]:
    config, mistakes = validate(COMMANDS[command], composed)
    of_nodes: list[Problem] = []
    for key in defaults(command):
        node = composed.get(key)
        if isinstance(node, dict):
            nodes = (
                {key: node} if "_target_" in node else {f"{key}.{name}": item for name, item in node.items()}
            )
            for path, item in nodes.items():
                of_nodes += check_node(path, item) if isinstance(item, dict) else []
    mistakes, of_nodes = (
        [problem for problem in found if problem.value != REQUIRED] for found in (mistakes, of_nodes)
    )
    explained = {problem.key for problem in of_nodes}
    missing = [
        Problem(key, NO_VALUE, "missing", f"add {key}=<value>")
        for key, value in flatten(composed).items()
        if value == REQUIRED and key not in explained
    ]
    return config, mistakes + missing + of_nodes
