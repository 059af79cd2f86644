"""Types of values that several commands share."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, regex_engine="python-re")
Node = dict[str, Any]
LONGEST_PROMPT = 100_000
"""Characters of a prompt."""
DURATION = r"^(?=.*[1-9])(\d+d)?(\d+h)?(\d+m)?(\d+s)?$"
NAME = r"^\w[\w.+-]*$"
LICENSE = r"^[a-zA-Z0-9][a-zA-Z0-9.+-]{0,59}$"
Duration = Annotated[
    str,
    Field(pattern=DURATION),
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),  # a number has no unit
]
Name = Annotated[str, Field(pattern=NAME)]
License = Annotated[str, Field(pattern=LICENSE)]
# Description of each pattern, for error messages.
FORMS = {
    DURATION: "a duration (90s, 45m, 2h30m, 1d)",
    LICENSE: "an identifier of a licence (apache-2.0, cc-by-4.0, other)",
    NAME: "a folder name of letters, digits and _ . + -",
}
Weights = Literal["ema", "raw"]
Step = int | Literal["best"] | None
"""Checkpoint of a run: the one of a step, the best, or None for the newest."""
SHORTEST_AVERAGE = 0.001
"""Smallest relative length of a power average; the power is about the inverse of the length."""
LONGEST_AVERAGE = 0.288
"""Bound of the relative length of a power average: just below 12^-1/2, the length of equal weights."""
Length = Annotated[float, Field(ge=SHORTEST_AVERAGE, lt=LONGEST_AVERAGE)]
"""Relative length of a power average."""
Class = int | str
Attributes = dict[str, Class | float | bool | list[Class | float | bool | None] | None]
"""Values of attributes by name, as a user gives them; of a list, each in turn."""
Label = Class | Attributes | list[Class | Attributes] | None
CLASS_KEYS = ("label", "edit.source")  # keys that take names of classes, read as they are typed
TEXT_KEYS = ("prompt", "negative_prompt")  # keys that take sentences, with their commas
Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT)]
PATH_KEYS = (
    *("input", "output", "samples", "path", "masks", "mask", "weights", "lpips_weights", "stats"),
    *("originals", "pretrained", "prompts", "output_dir", "data_dir", "cache_dir"),
)
"""Last names of keys with a value that may be a path."""
# Lightning's names of the number formats, and those of `precision`.
NUMBER_FORMATS = {32: "fp32", "32": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    BeforeValidator(lambda name: NUMBER_FORMATS.get(name, name) if isinstance(name, int | str) else name),
]
Clip = bool | Literal["keep_eps"]
"""Values of `clip_x0`."""
Device = Literal["auto", "cpu", "cuda"]
