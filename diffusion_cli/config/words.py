"""Words of a command line that are not `key=value`: each error shows the word to write instead."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import CONF, chosen, defaults, did_you_mean, documented, options
from diffusion_cli.config.option_keys import option_keys
from diffusion_cli.config.schema import GRIDS
from diffusion_cli.config.typed import as_text
from diffusion_cli.errors import NO_VALUE, Problem

FLAGS = ["--help", "--cfg", "--resolve", "--package", "--info", "--config-dir", "--multirun", "-h", "-m"]
FLAGS_OF_HYDRA = {
    "--config-name": ("the command names its configuration", "use --config-dir DIR for options of your own"),
    "--config-path": ("the command names its configuration", "use --config-dir DIR for options of your own"),
    "--run": ("a command runs without it", "leave it out"),
    "--hydra-help": ("unknown flag", "use --help, or --cfg hydra"),
    "--shell-completion": ("unknown flag", "run diffuse completion"),
    "--experimental-rerun": ("unknown flag", "use run= to continue a run"),
}
"""Flags of Hydra's programs that `diffuse` does not have: problem and remedy."""
SHORT_FLAGS = {"-cn": "--config-name", "-cp": "--config-path", "-r": "--run", "-sc": "--shell-completion"}
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "lr_scheduler": "lr_schedule",
    "warmup": "lr_schedule.warm_up_steps",
    "warmup_steps": "lr_schedule.warm_up_steps",
    "grad_clip": "clip_norm",
    "gradient_clip_val": "clip_norm",
    "max_grad_norm": "clip_norm",
    "steps": "max_steps",
    "epochs": "max_epochs",
    "gpus": "trainer.devices processes",
    "num_gpus": "trainer.devices processes",
    "devices": "trainer.devices processes",
    "trainer.devices": "processes",
    "device": "trainer.accelerator",
    "scale": "guidance.scale",
    "cfg": "guidance.scale",
    "cfg_scale": "guidance.scale",
    "guidance_scale": "guidance.scale",
    "scheduler": "sampler schedule",
    "n": "num_samples",
}
"""Keys by their names in other programs; of several, the command has one, or has an option of the given name."""
OTHER_OPTIONS = {
    "sampler": {
        "dpmpp": "dpmpp_2m",
        "dpmsolver": "dpmpp_2m",
        "dpmsolverpp": "dpmpp_2m",
        "dpmsolvermultistep": "dpmpp_2m",
        "dpmsolversinglestep": "dpmpp_2s",
        "dpmpp2mkarras": "dpmpp_2m",
        "eulera": "euler_ancestral",
        "eulerancestraldiscrete": "euler_ancestral",
        "eulerdiscrete": "euler",
        "heundiscrete": "heun",
        "lmsdiscrete": "lms",
        "unipcmultistep": "unipc",
        "pndm": "plms",
    },
    "lr_schedule": {
        "wsd": "warmup_stable_decay",
        "invsqrt": "inverse_sqrt",
        "rsqrt": "inverse_sqrt",
        "none": "constant",
    },
    "dataset": {
        "photos": "folder",
        "images": "folder",
        "imagefolder": "folder",
        "zip": "folder",
        "numpy": "array",
        "npz": "array",
        "npy": "array",
        "cifar": "cifar10",
        "hf": "huggingface",
        "hub": "huggingface",
        "datasets": "huggingface",
        "parquet": "huggingface",
        "webdataset": "huggingface",
        "pytorch": "torch",
        "torchvision": "torch",
    },
}
"""Options of groups by their names in other programs, in lower case, with p for + and without other signs."""
OTHER_VALUES = {"device": {"gpu": "cuda"}}
"""Values of keys by their names in other programs, which are accepted too."""
CLOSE = 0.85
"""Similarity from which a bare word or a flag is read as a misspelt key."""


def sort_words(command: str, words: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Return the overrides among the words after a command, and a problem for each of the others.

    Args:
        command: name of the command.
        words: the words after it, without its flags; each other word that begins with `-` is an unknown flag.
    """
    words = [word.removeprefix("++") if "=" in word else word for word in words]  # sets a key, as without it
    if all(map(_is_override, words)):
        return words, []
    keys = known_keys(command, words)
    groups = list(_grouped(words, keys))
    overrides = [group[0] for group in groups if _is_override(group[0]) and len(group) == 1]
    others = (group for group in groups if not _is_override(group[0]) or len(group) > 1)
    return overrides, [_problem(command, group, keys) for group in others]


def overridden(command: str, words: Sequence[str]) -> list[str]:
    """Return a line for each `key=value` that another value of the key follows, which replaces it."""
    last = {word.partition("=")[0]: word for word in words if _is_override(word)}
    lines = []
    for word in words:
        key, _, value = word.partition("=")
        if last.get(key, word) != word:
            other = last[key].partition("=")[2]
            as_list = command in GRIDS or isinstance(defaults(command).get(key), list)
            both = (
                f"write {key}=[{value.strip('[]')},{other.strip('[]')}]"
                if as_list
                else f"with -m write {key}={value},{other}"
            )
            lines.append(f"{word}: ignored, because {last[key]} follows; for both {both}")
    return lines


def known_keys(command: str, words: Sequence[str], dirs: Sequence[Path] = ()) -> list[str]:
    """Return the groups and keys of a command with the options that its words choose.

    Args:
        command: name of the command.
        words: words of the command line.
        dirs: the user's folders of options, besides those of plugins.
    """
    keys = [*defaults(command), *(key for key, _, _ in documented(CONF / f"{command}.yaml"))]
    for group, option in chosen(command, words, dirs).items():
        for name in option if isinstance(option, list) else [option]:
            file = options(group, dirs).get(str(name))
            keys += [of.key for of in option_keys(file, group)] if file else []
    return keys


def nearest_key(name: str, keys: Sequence[str], cutoff: float = 0.6, value: str = "") -> str | None:
    """Return the key that a misspelt name most likely stands for, or None.

    Args:
        name: misspelt name of a key or group.
        keys: keys and groups of the command.
        cutoff: smallest similarity, 0 to 1.
        value: value of the key, which distinguishes groups with one name in other programs.
    """
    others = [other for other in OTHER_NAMES.get(name, "").split() if other in keys]
    if others and name not in keys:
        return next((other for other in others if value in options(other)), others[0])
    spelt = name.replace("-", "_").lower()
    parent, _, last = spelt.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in keys if parent and key.rpartition(".")[0] == parent}
    if beside:
        near = difflib.get_close_matches(last, beside, n=1, cutoff=cutoff)
        return beside[near[0]] if near else None
    near = [key for key in keys if key.rpartition(".")[2] == spelt]
    near = near or difflib.get_close_matches(spelt, keys, n=1, cutoff=cutoff)
    return near[0] if near else None


def nearest_option(group: str, name: str, known: Sequence[str]) -> str:
    """Return the remedy for an unknown option of a group: the one that the name most likely stands for, or all."""
    if group == "guidance" and re.fullmatch(r"\d+(\.\d*)?", name):
        return f"write guidance=cfg guidance.scale={name}"
    spelt = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
    spelt = spelt.removeprefix("k") if name.lower().startswith("k_") else spelt
    plain = {option.replace("_", ""): option for option in known}
    spelt = spelt.removesuffix("scheduler")
    other = OTHER_OPTIONS.get(group, {}).get(spelt, plain.get(spelt))
    return f"did you mean {other}?" if other in known else did_you_mean(name, known)


def accepted(key: str, value: Any) -> str | None:
    """Return our value of a key for its name in other programs, or None."""
    return OTHER_VALUES.get(key, {}).get(value) if isinstance(value, str) else None


def _is_override(word: str) -> bool:
    """Whether a word is `key=value`, or an addition or removal of a key in Hydra's grammar."""
    return word[:1] not in ("", "-", "=") and ("=" in word or word[0] in "~+")


def _is_bare(word: str) -> bool:
    """Whether a word is a name or a value alone."""
    return word[:1] not in ("", "-", "~", "+") and "=" not in word


def _is_key(word: str, keys: Sequence[str]) -> bool:
    """Whether a bare word is a key, or nearly one."""
    return _is_bare(word) and nearest_key(word, keys, CLOSE) is not None


def _grouped(words: Sequence[str], keys: Sequence[str]) -> Iterator[list[str]]:
    """Yield words in groups: `key = value`, `key value` and `--key value` are one group each."""
    rest = list(words)
    while rest:
        word, following = rest[0], "".join(rest[1:2])
        count = 1
        if _is_bare(word) and following.startswith("="):
            count = 3 if following == "=" else 2
        elif _is_bare(following):
            is_flag = word.startswith("-") and "=" not in word
            count = 2 if is_flag or word.endswith("=") or _is_key(word, keys) else 1
        yield rest[:count]
        del rest[:count]


def _problem(command: str, group: Sequence[str], keys: Sequence[str]) -> Problem:
    """The problem of words that are not `key=value`."""
    shown = " ".join(group)
    if not shown.strip():
        return Problem(repr(shown), NO_VALUE, "empty word", "leave it out")
    if shown.startswith("-"):
        return _flag_problem(command, group, keys)
    if len(group) > 1:
        equals = "=" in shown
        name, _, value = ("" if equals else "=").join(group).partition("=")
        problem = "spaces around =" if equals else "no = between key and value"
        return Problem(shown, NO_VALUE, problem, f"write {_word(command, name, value, keys)}")
    if shown.startswith("="):
        return Problem(shown, NO_VALUE, "no key before =", "write key=value")
    name, _, value = shown.partition(":")
    if _is_key(name, keys):
        problem = "no = between key and value" if value else "no value"
        return Problem(shown, NO_VALUE, problem, f"write {_word(command, name, value, keys)}")
    choices = [f"{of}={name.lower()}" for of in defaults(command) if name.lower() in options(of)]
    if choices:
        remedy = f"write {' or '.join(choices)}"
    elif "run" in keys and command != "train":
        remedy = f"did you mean {as_text('run', name)}?"
    else:
        remedy = f"see diffuse {command} --help"
    return Problem(shown, NO_VALUE, "not key=value", remedy)


def _flag_problem(command: str, group: Sequence[str], keys: Sequence[str]) -> Problem:
    """The problem of an unknown flag, which may be a key or a group."""
    flag, _, value = "=".join(group).partition("=")
    if found := FLAGS_OF_HYDRA.get(SHORT_FLAGS.get(flag, flag)):
        return Problem(" ".join(group), NO_VALUE, *found)
    name, near = flag.lstrip("-"), difflib.get_close_matches(flag, FLAGS, n=1, cutoff=0.75)
    if not near and (len(name) > 1 or name in OTHER_NAMES) and nearest_key(name, keys, CLOSE) is not None:
        return Problem(
            " ".join(group), NO_VALUE, "unknown flag", f"write {_word(command, name, value, keys)}"
        )
    return Problem(group[0], NO_VALUE, "unknown flag", did_you_mean(flag, near or FLAGS))


def _word(command: str, name: str, value: str, keys: Sequence[str]) -> str:
    """The word `key=value` that a name and a value most likely stand for."""
    key = nearest_key(name, keys, value=value) or name
    if key not in defaults(command):
        return f"{key}={value or '<value>'}"
    known = options(key)
    near = re.search(r"did you mean (.*)\?", nearest_option(key, value, [*known]))
    return f"{key}={near[1]}" if near else f"{key}=<option>, one of {', '.join(known)}"
