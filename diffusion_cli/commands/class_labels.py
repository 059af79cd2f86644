"""Convert class names in `label=` and other keys to class indices."""

import re
from collections.abc import Sequence
from typing import Literal

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.config import did_you_mean
from diffusion_cli.config.mapping_words import LABEL
from diffusion_cli.config.values import Attributes, Class, Label
from diffusion_cli.data import composed
from diffusion_cli.diffusion.guidance import Guidance
from diffusion_cli.errors import NO_VALUE, UsageError, examples
from diffusion_cli.runs.load import Loaded, LoadedDenoiser

INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def labels_named(
    label: Label,
    model: LoadedDenoiser,
    guidance: Guidance,
    trained_classes: list[int],
    null_label: Literal["all", "none"],
) -> list[int] | None:
    """Return the class indices of `label=`, or None for unconditional sampling.

    A class name has priority over the words `all`, `none` and `null`. `all` means the classes with training images.
    `none` and an empty list mean no label. `null` means `null_label`.

    Raises UsageError for an unknown class, and for any class if the model is unconditional.
    """
    names = model.info.class_names
    if model.num_classes is None and not guidance.uses_labels:
        if label in (None, "null", "none", []):
            return None
        raise UsageError(
            "label",
            _shown(label),
            "the model is not class-conditional",
            "train one with model.class_conditional=true, or guide it with guidance=classifier",
        )
    assert names is not None
    if not isinstance(label, list | dict) and (label is None or class_place(label, names) is None):
        word = null_label if label in (None, "null") else label
        if word == "none":
            return None
        if word == "all":
            return trained_classes
    wanted = label if isinstance(label, list) else [label if isinstance(label, dict) else str(label)]
    return [class_number(one, names) for item in wanted for one in _classes(item)] or None


def _classes(item: Class | Attributes | None) -> list[Class]:
    """Return the classes of one item of `label=`: a class, or a mapping of the name `label` to one or several."""
    if not isinstance(item, dict):
        return [str(item)]
    if unknown := [name for name in item if name != LABEL]:
        problem = "the model is conditioned on classes only"
        raise UsageError(f"{LABEL}.{unknown[0]}", NO_VALUE, problem, f"write {LABEL}=<class>")
    values = item.get(LABEL)
    listed = values if isinstance(values, list) else [values]
    if None in listed or not listed:
        raise UsageError(LABEL, None, "some images have no class", "name one, or use label=none for all")
    return [str(value) for value in listed]


def warn_of_untrained(key: str, labels: Sequence[int], trained_classes: Sequence[int], model: Loaded) -> None:
    """Print a warning about labels without training images."""
    names = [(model.info.class_names or ())[label] for label in labels if label not in trained_classes]
    if names:
        show_remarks(
            [f"{key}: {examples(names)}: no training images of this class; its samples are arbitrary"]
        )


def class_number(label: int | str, names: Sequence[str], key: str = "label") -> int:
    """Return the index of a class given by name, in any Unicode form.

    An index in [0, number of classes) is accepted too, unless a class name is a number.

    Raises UsageError, about `key`, for an unknown class.
    """
    place = class_place(label, names)
    if place is not None:
        return place
    if not names:
        raise UsageError(key, label, "the model is not class-conditional", "leave it null")
    counted = list(names) == [str(number) for number in range(len(names))]
    if INDEX.fullmatch(str(label)) and (counted or not any(map(NUMBER.fullmatch, names))):
        if int(str(label)) < len(names):
            return int(str(label))
        raise UsageError(key, label, "out of range", f"use a class from 0 to {len(names) - 1}")
    equal = _spellings(str(label), names)
    remedy = f"did you mean {equal[0]}?" if equal else did_you_mean(str(label), names)
    raise UsageError(key, label, "unknown class", remedy)


def is_null(label: Label, names: Sequence[str] | None) -> bool:
    """Return whether a label is the word `null` and no class has that name."""
    return label == "null" and class_place("null", names or ()) is None


def class_place(label: Label, names: Sequence[str]) -> int | None:
    """Return the index of the class with a name, or None if no class has it."""
    for form in (str, composed):
        wanted, known = form(str(label)), list(map(form, names))
        if wanted in known:
            return known.index(wanted)
    return None


def _spellings(number: str, names: Sequence[str]) -> list[str]:
    """Return the names that spell the same number differently, such as 1.0 for 1."""
    if not NUMBER.fullmatch(number):
        return []
    return [name for name in names if NUMBER.fullmatch(name) and float(name) == float(number)]


def _shown(label: Label) -> str:
    return str(label).replace("'", "").replace(" ", "")
