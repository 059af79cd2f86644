"""Experiment files of a user: each mistake is one line with the file and the remedy."""

import pytest

from diffusion_cli.config import load, plan_sweep
from diffusion_cli.errors import UsageError

HEADER = "# @package _global_\n"


def refused(tmp_path, text: str, *words: str) -> tuple[str, ...]:
    """The lines about an experiment with a text, without the path of its file."""
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load("train", ["experiment=mine", *words], [tmp_path])
    return tuple(line.removeprefix(f"{file}: ") for line in error.value.lines)


@pytest.mark.parametrize(
    "text", ["seed: 3\n", "# @package global\nseed: 3\n", "seed: 3\n# @package _global_\n"]
)
def test_a_file_without_its_first_line_is_named(tmp_path, text):
    assert refused(tmp_path, text) == ("has no line # @package _global_; write it as the first line",)


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [
        (
            "/model: dit_tiny",
            "/model: dit_tiny: does not override the option; write - override /model: dit_tiny",
        ),
        (
            "model: dit_tiny",
            "model: dit_tiny: does not override the option; write - override /model: dit_tiny",
        ),
        (
            "override metric: [fid, is]",
            "override metric: [fid, is]: does not override the option; write - override /metric: [fid, is]",
        ),
    ],
)
def test_an_option_in_the_defaults_that_is_no_override_is_named(tmp_path, defaults, problem):
    text = f"{HEADER}defaults:\n  - {defaults}\n"
    assert refused(tmp_path, text) == (f"defaults: {problem} below defaults:",)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("override /model: dit_tin", "model=dit_tin: unknown option; did you mean dit_tiny?"),
        (
            "override /logger: [csv, tensorbord]",
            "logger=tensorbord: unknown option; did you mean tensorboard?",
        ),
        ("override /modle: dit_tiny", "modle: unknown group; did you mean model?"),
    ],
)
def test_an_unknown_word_in_the_defaults_is_named(tmp_path, entry, problem):
    assert refused(tmp_path, f"{HEADER}defaults: [{entry}]\n") == (f"defaults: {problem}",)


def test_an_option_outside_of_the_defaults_is_named(tmp_path):
    problem = (
        "model: dit_tiny: an option outside of defaults; write - override /model: dit_tiny below defaults:"
    )
    assert refused(tmp_path, f"{HEADER}model: dit_tiny\n") == (problem,)


def test_wrong_keys_and_values_are_those_of_the_file(tmp_path):
    text = (
        f"{HEADER}batch_sise: 3\nmax_steps: x\noptimizer: {{lr: -3}}\nema: {{decay: 2}}\nlora: {{rnak: 4}}\n"
    )
    text += "latent: {dim: 4}\n"
    assert set(refused(tmp_path, text, "ema.decay=3", "seed=-1")) == {
        "batch_sise=3: unknown key; did you mean batch_size?",
        "max_steps=x: must be an integer, auto or null",
        "optimizer.lr=-3: must be greater than 0 or auto",
        "lora.rnak=4: unknown key; did you mean lora.rank?",
        "latent.dim=4: unknown key; choose from latent.run, latent.pretrained",
        "ema.decay=3: must be less than 1, auto or null",
        "seed=-1: must be at least 0",
    }


def test_values_of_the_command_line_are_not_those_of_the_file(tmp_path):
    refused(tmp_path, f"{HEADER}batch_size: x\n")
    with pytest.raises(UsageError, match=r"^batch_size=y: must be an integer$"):
        load("train", ["experiment=mine", "batch_size=y"], [tmp_path])
    assert load("train", ["experiment=mine", "batch_size=4"], [tmp_path]).model_dump()["batch_size"] == 4


def test_a_file_that_another_includes_is_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    base = tmp_path / "experiment" / "base.yaml"
    base.write_text(f"{HEADER}batch_size: x\n")
    assert refused(tmp_path, f"{HEADER}defaults: [base]\nseed: 1\n") == (
        f"{base}: batch_size=x: must be an integer",
    )


def test_the_file_is_named_before_a_sweep(tmp_path):
    text = f"{HEADER}defaults: [/model: dit_tiny]\n"
    (line,) = refused(tmp_path, text)
    with pytest.raises(UsageError) as error:
        plan_sweep("train", ["experiment=mine", "seed=0,1"], [tmp_path])
    assert str(error.value).endswith(line)
