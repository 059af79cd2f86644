"""Reading of untrusted configurations of other programs."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from diffusion_cli.convert.base import parse
from diffusion_cli.errors import FormatError


class Fields(BaseModel):
    model_config = ConfigDict(strict=True)
    name: Literal["Net"] = Field(alias="_class_name")
    sizes: list[Annotated[int, Field(gt=0, le=64)]] = [8]
    bias: bool = True


def test_a_valid_configuration_is_read_with_its_defaults():
    assert parse(Fields, {"_class_name": "Net", "sizes": [1, 2], "other": 3}).sizes == [1, 2]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, "_class_name is missing"),
        ({"_class_name": "Other"}, "_class_name=Other: must be 'Net'"),
        ({"_class_name": "Net", "sizes": [1, 65]}, "sizes.1=65: must be less than or equal to 64"),
        ({"_class_name": "Net", "sizes": None}, "sizes=null: must be a valid list"),
        ({"_class_name": "Net", "bias": "x" * 999}, f"bias={'x' * 80}: must be a valid boolean"),
    ],
)
def test_an_invalid_field_is_named_in_one_line(config: dict[str, Any], line: str):
    with pytest.raises(FormatError) as error:
        parse(Fields, config)
    assert str(error.value) == line
