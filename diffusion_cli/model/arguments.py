"""Arguments of the Python API: their checks, and their form as overrides."""

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.config.mapping_words import encoded
from diffusion_cli.errors import NO_VALUE, UsageError, format_value

ConfigT = TypeVar(
    "ConfigT",
    config.SampleConfig,
    config.EditConfig,
    config.EvalConfig,
    config.TrainConfig,
    config.ExportConfig,
    config.ImportConfig,
)
LONGEST = 60
"""Characters of a value in a message."""


def as_overrides(**settings: Any) -> list[str]:
    """Return settings as overrides, key=value."""
    return [f"{key}={_word(key, value)}" for key, value in settings.items()]


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that are not None."""
    return {key: value for key, value in settings.items() if value is not None}


def texts(key: str, values: Any) -> list[str]:
    """Return a sequence of texts as a list; UsageError, about `key`, for any other value."""
    if isinstance(values, str):
        raise UsageError(key, values, "must be a list", f"write [{values!r}]")
    if not isinstance(values, Sequence):
        raise UsageError(key, shown(values), "must be a list of texts")
    for value in values:
        if not isinstance(value, str):
            raise UsageError(key, shown(value), "must be text")
    return list(values)


def flat(arguments: Sequence[str | Sequence[str]]) -> list[str]:
    """Return the overrides in positional arguments: each argument is one override or a list of them."""
    return [
        word
        for argument in arguments
        for word in ([argument] if isinstance(argument, str) else texts("overrides", argument))
    ]


def tensor(key: str, value: Any, wanted: str) -> Tensor:
    """Return a tensor, array or list of numbers as a tensor; UsageError about `wanted` for others."""
    if value is None:
        raise UsageError(key, NO_VALUE, "missing", f"give {wanted}")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(key, shown(value), f"must be {wanted}") from error


def mask_regions(mask: Any, sizes: tuple[int, ...], count: int) -> Tensor:
    """Return masks as the regions to paint, bool [1 or B, 1, *sizes].

    Args:
        mask: bool [*sizes] or [B, *sizes], true where to paint; for volumes also [H, W], the same for each slice.
        sizes: H and W, or D, H and W.
        count: number of images B.

    Raises:
        UsageError: for another shape or type, or a mask without true elements.
    """
    wanted = f"bool {list(sizes)}"
    mask = tensor("mask", mask, wanted)
    if mask.dtype != torch.bool:
        raise UsageError("mask", described(mask), f"must be {wanted}", "write mask > 0.5")
    shapes = (sizes, (count, *sizes), sizes[-2:])
    if tuple(mask.shape) not in shapes:
        raise UsageError(
            "mask", described(mask), f"must be {wanted}, the size of the images, or one such mask per image"
        )
    regions = mask.cpu() if tuple(mask.shape) == shapes[1] else mask.cpu().expand(1, *sizes)
    if not regions.flatten(1).any(1).all():
        raise UsageError("mask", NO_VALUE, "has no true element", "set the pixels to paint to true")
    return regions[:, None]


def check_supplied(group: str, name: str, target: Any, values: Sequence[Any]) -> None:
    """Raise UsageError unless values are the positional arguments of the class of an option."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    call = f"option({', '.join([repr(group), repr(name), *needed])})".replace("'", '"')
    if len(values) < len(needed):
        raise UsageError(group, name, f"needs {' and '.join(needed[len(values) :])}", f"write {call}")
    if len(values) > len(parameters):
        problem = f"{len(values)} positional arguments, but the class takes {len(parameters)}"
        raise UsageError(group, name, problem, f"write {call}")
    types = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for key, value in zip(parameters, values, strict=False):
        try:
            value = str(value) if isinstance(value, Path) else value
            TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            kind = types[key].__name__ if inspect.isclass(types[key]) else types[key]
            raise UsageError(key, shown(value), f"must be {kind}", f"write {call}") from error


def described(value: Tensor) -> str:
    """Return type and shape of a tensor, as "uint8 [2, 1, 8, 8]"."""
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")


def shown(value: Any) -> str:
    """Return a value as a message shows it: numbers and texts in full, others by their type."""
    if isinstance(value, Tensor):
        return described(value)
    if isinstance(value, type):
        return value.__name__
    simple = isinstance(value, str | Path | Real | list | tuple | None)
    text = format_value(value) if simple else type(value).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _word(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UsageError(key, shown(value), "must have names of attributes", f"write {key}={{'age': 40}}")
        return config.quoted(encoded({name: _plain(f"{key}.{name}", item) for name, item in value.items()}))
    if isinstance(value, list | tuple | range):
        return f"[{','.join(_word(key, item) for item in value)}]"
    if isinstance(value, str):
        if "${" in value:
            raise UsageError("name", value, "contains ${, which Hydra would replace", "use another name")
        return config.quoted(value)
    if value is not None and not isinstance(value, Real):
        kind = "the name of an option" if key in config.GROUPS else "a number or text"
        raise UsageError(key, shown(value), f"must be {kind}")
    return format_value(value)


def _plain(key: str, value: Any) -> Any:
    """Return a value of an attribute, or a list of them, as JSON has it; UsageError for another value."""
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple | range):
        return [_plain(key, item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UsageError(key, shown(value), "must be a number or text, or a list of them")


def checked_config(command: str, kind: type[ConfigT], words: Sequence[str]) -> ConfigT:
    """Return the configuration of a command; UsageError for a mistake in its arguments."""
    checked = config.load(command, words)
    assert isinstance(checked, kind)
    return checked
