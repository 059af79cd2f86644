"""The keys about averages of the weights: `ema.*` of a training, and those of `diffuse ema`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, model_validator

from diffusion_cli.config.values import STRICT, Device, Length, Step, Weights
from diffusion_cli.errors import UsageError, format_value

OF_PROFILE: dict[str, dict[str, Any]] = {
    "exponential": {"decay": None, "warm_up": True},
    "power": {"snapshot_every": None, "lengths": [0.05, 0.1]},
}
"""The keys of each profile of an average, with their values under the other profile."""
LEAST_RATIO = 1.05
"""Least ratio of two lengths that are tracked: the difference of near ones is lost in half precision."""


class EMAConfig(BaseModel):
    """`ema.*`: the average of the weights that is validated, sampled and evaluated."""

    model_config = STRICT
    profile: Literal["exponential", "power"] = "exponential"  # runs of earlier versions have no other
    decay: Annotated[float, Field(ge=0, lt=1)] | None
    warm_up: bool
    lengths: Annotated[list[Length], Field(min_length=2)] = OF_PROFILE["power"]["lengths"]
    snapshot_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _of_one_profile(self) -> Self:
        """Refuse missing values of the profile, and values that have no effect with it."""
        for profile, unused in OF_PROFILE.items():
            for key, value in unused.items():
                given = getattr(self, key)
                if profile == self.profile and given is None:
                    raise UsageError(f"ema.{key}", None, f"required by ema.profile={profile}", "set a number")
                if profile != self.profile and given != value:
                    remedy = f"set ema.profile={profile}, or ema.{key}={format_value(value)}"
                    raise UsageError(f"ema.{key}", given, f"applies only with ema.profile={profile}", remedy)
        if not differ(self.lengths):
            problem = f"has lengths that differ by less than {LEAST_RATIO - 1:.0%}"
            raise UsageError("ema.lengths", self.lengths, problem, "use lengths like [0.05,0.1]")
        return self


def differ(lengths: Sequence[float]) -> bool:
    """Return whether tracked lengths differ enough for the reconstruction of others."""
    return all(longer >= LEAST_RATIO * shorter for shorter, longer in pairwise(sorted(lengths)))


def check_ema_length(ema_length: float | None, weights: Weights) -> None:
    """Raise UsageError for the length of an average of weights that are not averaged."""
    if ema_length is not None and weights != "ema":
        raise UsageError("ema_length", ema_length, "applies only with weights=ema", "set weights=ema")


class EMACommandConfig(BaseModel):
    """The keys of `conf/ema.yaml`."""

    model_config = STRICT
    run: str | None
    step: Step
    length: (
        Annotated[
            list[Length],
            Field(min_length=1),
            BeforeValidator(lambda value: value if value is None or isinstance(value, list) else [value]),
        ]
        | None
    )
    device: Device
    data_dir: str | None
    output_dir: str
