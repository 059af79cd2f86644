"""`lora.*`: what the options need, and the identity of a run."""

import pytest

from diffusion_cli.config.runs import identity
from diffusion_cli.errors import UsageError
from helpers.recipes import train_config


def test_a_run_of_a_version_without_adapters_stays_the_same_run():
    config = train_config().model_dump()
    earlier = {key: value for key, value in config.items() if key != "lora"}
    now = identity(config)
    assert {key: value for key, value in now.items() if value is not None} == {
        key: value for key, value in identity(earlier).items() if value is not None
    }
    assert identity({**config, "lora": {**config["lora"], "targets": ["*.qkv"]}}) != now


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lora.rank=2"], "lora.rank=2: adapters change trained weights; set init.run or init.pretrained"),
        (["lora.rank=0"], "lora.rank=0: must be greater than 0 or null"),
        (["lora.alpha=3"], "lora.alpha=3.0: applies only with lora.rank=; set lora.rank"),
        (["lora.targets=[*.qkv,up]"], "lora.targets=[*.qkv,up]: applies only with lora.rank=; set lora.rank"),
    ],
)
def test_options_that_change_nothing_are_refused(words, line):
    with pytest.raises(UsageError) as caught:
        train_config(*words)
    assert str(caught.value) == line
