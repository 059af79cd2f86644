"""The network of a training: errors about its options."""

import pytest

from diffusion_cli.commands.train_setup import set_up
from diffusion_cli.errors import UsageError
from helpers.recipes import train_config


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("model.head_channels=5", "does not divide the 16 channels of an attention layer"),
        ("model.norm_groups=3", "does not divide channels=8"),
    ],
)
def test_an_error_about_an_option_has_its_key(tmp_path, word, problem):
    words = ["name=a", f"output_dir={tmp_path}", "model.channels=8", "model.norm_groups=4", word]
    with pytest.raises(UsageError) as error:
        set_up(train_config(*words), tmp_path / "a", None)
    assert str(error.value) == f"{word}: {problem}; use a divisor"
