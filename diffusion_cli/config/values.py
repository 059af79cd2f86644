"""Types of values that several commands take."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, regex_engine="python-re")
Node = dict[str, Any]
DURATION = r"^(?=.*[1-9])(\d+d)?(\d+h)?(\d+m)?(\d+s)?$"
NAME = r"^\w[\w.+-]*$"
Duration = Annotated[str, Field(pattern=DURATION)]
Name = Annotated[str, Field(pattern=NAME)]
# What a text should look like, by the pattern that it did not match.
FORMS = {
    DURATION: "a duration such as 90s, 45m, 2h30m or 1d",
    NAME: "a folder name of letters, digits and _ . + -",
}
Weights = Literal["ema", "raw"]
Step = int | Literal["best"] | None
"""Checkpoint of a run: the one of a step, the best, or None for the newest."""
Class = int | str
Label = Class | list[Class] | None
CLASS_KEYS = ("label", "edit.source")  # keys whose values are names of classes, read as they are typed
# Lightning's names of the number formats, and those of `precision`.
NUMBER_FORMATS = {32: "fp32", "32": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    BeforeValidator(lambda name: NUMBER_FORMATS.get(name, name) if isinstance(name, int | str) else name),
]
Device = Literal["auto", "cpu", "cuda"]
