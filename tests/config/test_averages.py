"""The keys of `ema`, and `ema_length` of the commands that load a run."""

from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.commands.train_checks import check_configuration
from diffusion_cli.config.continued import may_change, with_values
from diffusion_cli.config.runs import identity
from diffusion_cli.errors import UsageError
from helpers.recipes import train_config

POWER = "ema.profile=power"
LONGER = "ema.lengths=[0.05,0.2]"


def test_each_profile_has_its_own_keys():
    power, usual = train_config(POWER).ema, train_config().ema
    assert (power.decay, power.snapshot_every, power.lengths) == (None, 2400 // 32, [0.05, 0.1])
    assert usual.decay is not None
    assert usual.snapshot_every is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([POWER, "ema.decay=0.9"], "ema.decay=0.9: applies only with ema.profile=exponential"),
        ([POWER, "ema.warm_up=false"], "ema.warm_up=false: applies only with ema.profile=exponential"),
        (["ema.snapshot_every=9"], "ema.snapshot_every=9: applies only with ema.profile=power"),
        (["ema.lengths=[0.1,0.2]"], "ema.lengths=[0.1, 0.2]: applies only with ema.profile=power"),
        ([POWER, "ema.lengths=[0.1,0.1]"], "ema.lengths=[0.1, 0.1]: has lengths that differ by less than 5%"),
        (
            [POWER, "ema.lengths=[0.1,0.2,0.104]"],
            "ema.lengths=[0.1, 0.2, 0.104]: has lengths that differ by less than",
        ),
        ([POWER, "ema.lengths=[0.1]"], "ema.lengths=[0.1]: must be a list of 2 or more values"),
        ([POWER, "ema.lengths=[0.1,0.288]"], "ema.lengths.1=0.288: must be less than 0.288"),
        ([POWER, "ema.lengths=[0,0.1]"], "ema.lengths.0=0: must be at least 0.001"),
        ([POWER, "ema.snapshot_every=null"], "ema.snapshot_every=null: required by ema.profile=power"),
        (["ema.decay=null"], "ema.decay=null: required by ema.profile=exponential"),
    ],
)
def test_values_without_effect_and_missing_ones_are_refused(words, line, capsys):
    assert run(["train", *words]) == 2
    assert capsys.readouterr().err.startswith(f"diffuse: {line}")


@pytest.mark.parametrize("command", ["sample", "eval", "edit", "export", ["push", "repo=me/digits"]])
def test_raw_weights_have_no_length(command, capsys):
    words = [command] if isinstance(command, str) else command
    assert run([*words, "run=x", "weights=raw", "ema_length=0.1"]) == 2
    assert "ema_length=0.1: applies only with weights=ema; set weights=ema" in capsys.readouterr().err
    assert run([*words, "run=x", "ema_length=0.29"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("diffuse: ema_length=0.29: must be ")
    assert "less than 0.288" in line
    assert run([*words, "run=x", "ema_length=1e-200"]) == 2
    assert "at least 0.001" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], [POWER]])
def test_edm2_has_its_published_averages(words):
    average = train_config("experiment=edm2_cifar10", *words).ema
    assert (average.profile, average.decay, average.lengths) == ("power", None, [0.05, 0.1])
    assert train_config("experiment=edm2_digits", POWER).ema.profile == "power"


def test_a_run_of_an_earlier_version_has_the_exponential_profile():
    """Its folder and its name stay the same."""
    now = train_config().model_dump()
    before = {**now, "ema": {"decay": now["ema"]["decay"], "warm_up": True}}
    assert identity(before) == identity(now)
    assert train_config("name=null").name == "digits-cosine"


def test_the_name_of_a_run_has_its_profile():
    assert train_config("name=null", POWER).name == "digits-cosine-profile_power"
    other = train_config("name=null", POWER, "ema.lengths=[0.1,0.2]", "ema.snapshot_every=9").name
    assert str(other).startswith("digits-cosine-lengths_")
    assert "snapshot_every" not in str(other)


@pytest.mark.parametrize(
    ("stored", "words", "lines"),
    [
        ([POWER], [POWER, LONGER], [f"{LONGER}: the run in x has [0.05,0.1]"]),
        ([POWER, LONGER], [POWER], ["ema.lengths=[0.05,0.1]: the run in x has [0.05,0.2]"]),
        (
            [POWER],
            ["ema.decay=0.9"],
            [
                "ema.decay=0.9: the run in x has no ema.decay",
                "ema.profile=exponential: the run in x has power",
            ],
        ),
    ],
)
def test_the_line_about_another_average_has_the_values_of_the_run(stored, words, lines):
    """Values that runs of earlier versions lack, too."""
    with pytest.raises(UsageError) as error:
        check_configuration(Path("x"), train_config(*words), train_config(*stored).model_dump())
    assert list(error.value.lines[:-1]) == lines


def test_only_the_interval_of_snapshots_may_change():
    assert may_change("ema.snapshot_every")
    assert not any(map(may_change, ("ema.profile", "ema.lengths", "ema.decay", "ema.warm_up")))
    stored = train_config(POWER).model_dump()
    assert with_values(stored, {"max_steps": 4800})["ema"]["snapshot_every"] == 150


def test_a_length_that_is_no_number_is_named(capsys):
    assert run(["ema", "length=abc"]) == 2
    assert capsys.readouterr().err == "diffuse: length=abc: must be a number\n"
