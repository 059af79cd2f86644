"""The YAML files against the classes they name, and what follows from a configuration."""

import importlib
import inspect
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from diffusion_cli import config
from diffusion_cli.config import COMMANDS, CONF, as_typed, build, check_node, expand, load, seconds, signature
from diffusion_cli.config.libraries import is_named
from diffusion_cli.diffusion.schedules import Cosine

OPTIONS = sorted(file for file in CONF.glob("*/*.yaml"))


def nodes(file: Path) -> dict:
    """The `_target_` nodes of an option file by their dotted keys, wherever they stand."""
    text, group = file.read_text(), file.parent.name
    content = yaml.safe_load(text) or {}
    if "_target_" in content:
        return {group: content}
    prefix = "" if "@package _global_" in text else f"{group}."
    found = {key: node for key, node in content.items() if isinstance(node, dict) and "_target_" in node}
    return {f"{prefix}{key}": node for key, node in found.items()}


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_option_names_every_argument_of_a_class_of_ours_and_says_what_it_is(file):
    for key, node in nodes(file).items():
        if not is_named(node["_target_"]):  # a class of a library has more arguments, with defaults
            arguments = set(configurable(node["_target_"]))
            assert set(node) - {"_target_"} == arguments
            assert set(signature(node["_target_"]) or {}) == arguments, (
                "the static reading agrees with Python's"
            )
        # What the recipe fills in is checked where it has done so, in every composed configuration.
        plain = {k: v for k, v in node.items() if v not in ("???", "auto") and not str(v).startswith("${")}
        complaints = [line for line in check_node(key, plain) if "missing" not in line.problem]
        assert complaints == []
    assert config.summary(file)
    for key, _, comment in config.documented(file, file.parent.name):
        assert comment or key in ("dataset", "ema", *nodes(file)), f"{key} has no comment"


# --- Defaults of constructors ------------------------------------------------------------


def usual_options() -> dict[str, list[tuple[str, dict]]]:
    """For each class in conf/, the group and the node of each option that may have its defaults.

    These are the options that a command chooses by default or a task brings; all options of the class, where none is.
    """
    choices = [config.defaults(command) for command in COMMANDS]
    choices += [config.brought_by(file) for file in CONF.glob("task/*.yaml")]
    chosen = {
        (group, name)
        for choice in choices
        for group, names in choice.items()
        for name in (names if isinstance(names, list) else [names])
    }
    options = [(file.parent.name, file.stem, node) for file in OPTIONS for node in nodes(file).values()]
    usual = {}
    for target in {node["_target_"]: None for _, _, node in options if not is_named(node["_target_"])}:
        same = [option for option in options if option[2]["_target_"] == target]
        usual[target] = [(group, node) for group, name, node in same if (group, name) in chosen] or [
            (group, node) for group, _, node in same
        ]
    return usual


USUAL = usual_options()


def found(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def configurable(target: str) -> dict[str, Any]:
    """The keyword-only arguments of a class or a function, with their defaults."""
    parameters = inspect.signature(found(target)).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def frozen(value: Any) -> Any:
    """A value with tuples in place of lists."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def left_open(group: str, node: dict) -> set[str]:
    """Arguments without a value of their own: `???`, and what a whole command resolves (`auto`, `${...}`)."""
    refused = {problem.key for problem in check_node(group, node)}
    return {name for name, value in node.items() if value == "???" or f"{group}.{name}" in refused}


def differences(group: str, node: dict) -> dict[str, Any]:
    """Defaults that are not the values of an option; one left open has none, or that which turns it off."""
    off, unlike, unset = (inspect.Parameter.empty, None, 0), {}, left_open(group, node)
    for name, default in configurable(node["_target_"]).items():
        accepted = off if name in unset else (frozen(node[name]),)
        if (default, type(default)) not in [(value, type(value)) for value in accepted]:
            unlike[name] = default
    return unlike


@pytest.mark.parametrize("target", USUAL)
def test_defaults_of_a_constructor_are_the_values_of_its_usual_option(target):
    assert {} in [differences(group, node) for group, node in USUAL[target]]


SUPPLIED = {
    "schedule": (),
    "parameterization": (),
    "objective": (),
    "time_sampling": (),
    "restoration": (),
    "measurement": ((1, 16, 16),),
    "guidance": (SimpleNamespace(denoiser=lambda *names: names, classifier=str),),
    "sampler": (Cosine(),),
    "model": ((3, 16, 16), 4),
}
"""What the program supplies to the classes of a group."""


def state(part: Any) -> Any:
    """The attributes of an object and of what it is made of, for a comparison."""
    if isinstance(part, torch.Tensor):
        return tuple(part.shape), part.numpy(force=True).tobytes()
    if isinstance(part, nn.Module):
        return repr(part), state(part.state_dict())
    if isinstance(part, dict):
        return {key: state(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return tuple(map(state, part))
    return (type(part), state(vars(part))) if hasattr(part, "__dict__") else part


def test_parts_of_every_supplied_group_are_built():
    assert set(SUPPLIED) <= {group for options in USUAL.values() for group, _ in options}


LISTS = {"betas": [0.1, 0.2]}
"""Values of arguments without a default that are not text."""


@pytest.mark.parametrize("target", [target for target in USUAL if USUAL[target][0][0] in SUPPLIED])
def test_a_part_is_built_without_naming_an_argument(target):
    group, node = next(option for option in USUAL[target] if not differences(*option))
    given = {name: LISTS.get(name, "x") for name in left_open(group, node) if node[name] == "???"}
    supplied = ((3, 16), None) if target.endswith(".SetTransformer") else SUPPLIED[group]
    states = []
    for make in (lambda: found(target)(*supplied, **given), lambda: build(node | given, *supplied)):
        torch.manual_seed(0)
        states.append(state(make()))
    assert states[0] == states[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_schema_has_the_keys_of_the_yaml(command):
    keys = (key for key, _, _ in config.documented(CONF / f"{command}.yaml"))
    written = {key.partition(".")[0] for key in keys}
    groups = set(config.defaults(command)) - {"experiment", "task"}
    assert written | groups == set(COMMANDS[command].model_fields) - {"derived"}


OF_OTHER_TASKS = {
    "model/classifier": "classifier", "objective/cross_entropy": "classifier",
    "model/kl": "autoencoder", "objective/autoencoder": "autoencoder",
}  # fmt: skip
"""The task of the options, by the first words of their names, that do not denoise."""


def compositions() -> Iterator[tuple[str, dict[str, str]]]:
    """Options by group, for each command, such that every option is part of one.

    The first option of a group is composed by all commands that have the group, the others by one of them. Options
    are composed together, unless they bring options of other groups.
    """
    seen: set[str] = set()
    for command in COMMANDS:
        together: dict[str, list[str]] = {}
        for group in config.defaults(command):
            files = config.options(group)
            for option in sorted(files)[:1] if group in seen else files:
                if config.brought_by(files[option]) or f"{group}/{option}".startswith((*OF_OTHER_TASKS,)):
                    yield command, {group: option}
                else:
                    together.setdefault(group, []).append(option)
            seen.add(group)
        for options in zip_longest(*together.values()):
            yield command, {group: name for group, name in zip(together, options, strict=True) if name}


@pytest.mark.parametrize(("command", "choices"), [*compositions()])
def test_every_option_composes_into_a_valid_configuration(command, choices):
    words = [f"{group}={option}" for group, option in choices.items()]
    for group, option in choices.items():
        keys = config.documented(config.options(group)[option], group)
        words += [
            f"{key}={LISTS.get(key.rpartition('.')[2], 'x')}" for key, value, _ in keys if value == "???"
        ]
        tasks = [task for name, task in OF_OTHER_TASKS.items() if f"{group}/{option}".startswith(name)]
        words += [f"task={task}" for task in tasks]
    # A run may be an autoencoder, for its metrics.
    words += {"eval": ["run=x"], "import": ["source=x"], "push": ["repo=me/x"]}.get(command, [])
    load(command, words)


def test_a_list_of_options_composes():
    checked = load("eval", ["metric=[fid,is]"])
    assert isinstance(checked, config.EvalConfig)
    assert set(checked.metric) == {"fid", "is"}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "digits-cosine"),
        (["seed=0", "max_time=3m", "sampler=ddpm", "checkpoint_every=7", "data_dir=/x"], "digits-cosine"),
        (["schedule=linear", "optimizer.lr=0.5", "seed=3"], "digits-linear-lr_0.5-seed_3"),
        (["dataset=cifar10"], "cifar10-cosine"),
        (["dataset=cifar10", "model=unet_tiny"], "cifar10-cosine-unet_tiny"),
        (["experiment=ddpm_cifar10"], "cifar10-linear-ddpm_cifar10"),
        (["dataset=folder", "dataset.path=/a/b c.zip"], "folder-cosine-path_b_c.zip"),
        (["name=mine"], "mine"),
        (["task=classifier"], "digits-cosine-classifier"),
        (
            ["dataset=cifar10", "task=classifier", "model=classifier_cifar10"],
            "cifar10-cosine-classifier-classifier_cifar10",
        ),
    ],
)
def test_the_name_of_a_run_follows_from_what_is_trained(words, name):
    checked = load("train", words)
    assert isinstance(checked, config.TrainConfig)
    assert checked.name == name


def test_a_dataset_brings_its_published_training_unless_told_otherwise():
    checked = load("train", ["dataset=cifar10", "batch_size=64"])
    assert isinstance(checked, config.TrainConfig)
    assert (checked.max_steps, checked.ema.decay, checked.optimizer["lr"], checked.batch_size) == (
        800000,
        0.9999,
        2e-4,
        64,
    )


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("2h30m", 9000), ("1d", 86400), (None, None)])
def test_durations(text, value):
    assert seconds(text) == value


# --- Names of classes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("1.0", "1.0"),
        ("1e3", "1e3"),
        ("1_000", "1_000"),
        ("007", "007"),
        ("true", "true"),
        ("null", "null"),
        ("cat (1)", "cat (1)"),
        ("it's", "it's"),
        ("'a, b'", "a, b"),
        (r"a\, b", "a, b"),
        ("[1.0, none,null]", ["1.0", "none", "null"]),
        ("['a, b',c]", ["a, b", "c"]),
        ("[]", []),
    ],
)
def test_names_of_classes_are_read_as_they_are_typed(value, label):
    words = f"label={value}"
    assert load("sample", [words]).model_dump()["label"] == label
    typed = as_typed("sample", [words])
    assert as_typed("sample", typed) == typed
    if isinstance(label, str):
        edited = load("edit", ["edit=attribute", f"edit.source={value}"])
        assert edited.model_dump()["edit"]["source"] == label


def test_without_a_label_none_is_named():
    assert load("sample", []).model_dump()["label"] is None


def test_names_of_classes_in_a_sweep_are_read_as_they_are_typed():
    labels = [
        load("sample", words).model_dump()["label"]
        for words in expand("sample", ["label=1e3,1.0,[true,null]"]).jobs
    ]
    assert labels == ["1e3", "1.0", ["true", "null"]]
