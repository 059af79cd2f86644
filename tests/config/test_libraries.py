"""Classes of torch and Lightning in nodes: only the exported ones, with values checked by their types."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml

from diffusion_cli.config import build, check_node, load, target
from diffusion_cli.config.libraries import LIBRARIES, exported
from diffusion_cli.errors import UsageError
from diffusion_cli.system.trusted_paths import remember_run

FUNCTION = "needs a function, which a configuration cannot give; derive a class in a plugin, or use another"


def lines(group: str, node: dict[str, object]) -> list[str]:
    return [str(problem) for problem in check_node(group, node)]


@pytest.mark.parametrize("group", LIBRARIES)
def test_every_exported_class_is_found_and_is_derived_from_the_base(group):
    library = LIBRARIES[group]
    found = exported(library.module)
    assert len(found) > 4
    for name, kind in found.items():
        path = f"{library.module}.{name}"
        assert target({"_target_": path}) is kind
        assert inspect.isclass(kind)
        needed = [item.name for item in [*inspect.signature(kind).parameters.values()][library.supplied :]
                  if item.default is item.empty and item.kind is item.POSITIONAL_OR_KEYWORD]  # fmt: skip
        assert lines(group, {"_target_": path}) == [
            f"{group}.{key}: {FUNCTION} {group}"
            if key in ("batch_size_fn", "lr_lambda")
            else f"{group}.{key}: missing; add {group}.{key}=<value>"
            for key in needed
        ]


@pytest.mark.parametrize(
    ("group", "path"),
    [
        ("optimizer", "torch.optim.os"),
        ("optimizer", "torch.optim.Optimizer"),
        ("optimizer", "torch.optim.lr_scheduler"),
        ("optimizer", "torch.optim.lr_scheduler.StepLR"),
        ("optimizer", "torch.optim.sgd.SGD"),
        ("optimizer", "torch.optim.SGD.step"),
        ("optimizer", "lightning.pytorch.callbacks.Timer"),
        ("optimizer", "torch.load"),
        ("lr_schedule", "torch.optim.lr_scheduler.warnings"),
        ("logger", "lightning.pytorch.loggers.os"),
        ("logger", "lightning.pytorch.callbacks.Timer"),
        ("callback", "lightning.pytorch.callbacks.Callback"),
        ("model", "torch.optim.SGD"),
        ("dataset", "torch.optim.SGD"),
    ],
)
def test_other_names_are_refused(group, path):
    (line,) = lines(group, {"_target_": path})
    assert line.startswith(f"{group}._target_={path}: ")
    assert "not a class of" in line or "is not a class of an allowed plugin" in line


def test_a_misspelt_class_has_a_remedy():
    line = (
        "optimizer._target_=torch.optim.RAdams: not a class of torch.optim for optimizer; did you mean RAdam?"
    )
    assert lines("optimizer", {"_target_": "torch.optim.RAdams"}) == [line]


def test_values_are_checked_by_the_types_of_the_library():
    adam = {"_target_": "torch.optim.Adam", "lr": 0.1, "betas": [0.5, 0.9], "amsgrad": True}
    assert lines("optimizer", adam) == []
    assert lines("optimizer", {**adam, "lr": "fast"}) == ["optimizer.lr=fast: must be a number or auto"]
    assert lines("optimizer", {**adam, "amsgrad": 1}) == ["optimizer.amsgrad=1: must be true or false"]
    (line,) = lines("optimizer", {**adam, "beta": 1})
    assert line == "optimizer.beta=1: unknown key; did you mean betas?"
    (line,) = lines("optimizer", {**adam, "params": []})
    assert line.startswith("optimizer.params=[]: unknown key")
    few, many = ({**adam, "betas": [0.5] * count} for count in (1, 3))
    assert lines("optimizer", few) == ["optimizer.betas=[0.5]: must be a list of 2 or more values"]
    assert lines("optimizer", many) == ["optimizer.betas=[0.5, 0.5, 0.5]: must be a list of at most 2 values"]
    assert lines("optimizer", {**adam, "betas": ["a", 1]}) == ["optimizer.betas.0=a: must be a number"]


def test_a_class_with_open_arguments_takes_any_name():
    assert lines("logger.wandb", {"_target_": "lightning.pytorch.loggers.WandbLogger", "group": "a"}) == []


def test_the_program_passes_the_first_argument():
    weight = torch.nn.Parameter(torch.ones(2))
    made = build({"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.9}, [weight])
    assert isinstance(made, torch.optim.SGD)
    assert made.defaults["momentum"] == 0.9
    fall = build({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}, made)
    assert isinstance(fall, torch.optim.lr_scheduler.StepLR)


def stored(folder: Path, logger: str) -> Path:
    """The folder of a run with a logger of a class, as far as its configuration goes."""
    config = load("train", ["name=demo", "output_dir=elsewhere", "trainer=cpu"]).model_dump()
    config["logger"] = {"it": {"_target_": logger, "save_dir": "/"}}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("target", ["lightning.pytorch.loggers.WandbLogger", "diffusion_cli.training.WandB"])
def test_loggers_of_another_persons_run_are_not_built(tmp_path, monkeypatch, target):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = stored(tmp_path / "demo", target)
    with pytest.raises(UsageError) as error:
        load("train", [f"run={folder}", "max_steps=9000"])
    assert error.value.lines[0] == (
        f"logger.it={target}: class from the config of {folder}, which you did not train "
        "on this machine; add logger=<option> to choose your own"
    )
    assert [*load("train", [f"run={folder}", "logger=csv"]).model_dump()["logger"]] == ["csv"]
    remember_run(folder)
    if target.startswith("lightning."):  # one of the package needs all its keys
        assert [*load("train", [f"run={folder}"]).model_dump()["logger"]] == ["it"]
