"""The functions of the Python API: those of the commands, and parts of a configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_cli import config as configuration
from diffusion_cli.commands import import_run as import_command
from diffusion_cli.commands import train as train_command
from diffusion_cli.config import COMMANDS, EvalConfig, ImportConfig, TrainConfig, build, check_node, recipe
from diffusion_cli.config.values import Step, Weights
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.metrics.protocol import Result
from diffusion_cli.model.arguments import (
    as_overrides,
    check_supplied,
    checked_config,
    flat,
    given,
    tensor,
    texts,
)
from diffusion_cli.model.loaded import Model, evaluated
from diffusion_cli.runs.find import find_run

IN_MEMORY = "tensor"
"""Name of samples given as a tensor."""


def allow_plugins(*modules: str) -> None:
    """Allow modules whose classes configurations and checkpoints may name, as `plugins=` does.

    Args:
        modules: names of modules, as "bars". Nothing of them is imported before it is needed.

    Raises:
        UsageError: a name is not that of a module.

    Example:
        >>> allow_plugins()
    """
    configuration.allow(modules)


def load(
    run: str | Path,
    *,
    weights: Weights = "ema",
    step: Step = None,
    device: str = "auto",
    ema_length: float | None = None,
) -> Model:
    """Load the denoiser of a run.

    Args:
        run: folder of a run, or its name in `outputs`; for another output_dir give the folder.
        weights: "ema" (averaged) or "raw".
        step: a step with a checkpoint, "best", or None for the newest.
        device: "auto", "cpu" or "cuda".
        ema_length: relative length of the average of the weights, at least 0.001 and below 0.288, for a run of
            ema.profile=power; None is the stored average.

    Raises:
        UsageError: without such a run, checkpoint or device, for a run that trained no denoiser, or a length that its
            snapshots do not give.

    Example:
        >>> model = load("outputs/demo")
        >>> model.shape
        (1, 8, 8)
    """
    return Model(find_run(str(run), "outputs"), weights, step, device, ema_length)


def train(*overrides: str | Sequence[str]) -> Model:
    """Train as `diffuse train` does, and load the result.

    Args:
        overrides: arguments of the command, as "dataset=digits" and "max_steps=100", or a list of them. A script that
            trains in several processes (trainer.devices=2) needs `if __name__ == "__main__":`, because they import it.

    Raises:
        UsageError: for a mistake in the overrides.
        KeyboardInterrupt: if a signal stopped the training; the same call continues it.

    Example:
        >>> model = train("dataset=digits", "max_steps=2", "name=two_steps")
        <BLANKLINE>
        Trained 2 steps in ...
        >>> model.step
        2
    """
    checked = checked_config("train", TrainConfig, configuration.without_plugins(flat(overrides)))
    task = getattr(configuration.target(checked.model), "task", Denoiser.task)
    if task != Denoiser.task:
        raise UsageError("task", task, "trains no denoiser", "use the command: diffuse train")
    if train_command.run(checked):
        raise KeyboardInterrupt
    folder = Path(checked.output_dir, str(checked.name))
    return load(folder)


def import_weights(source: str | Path, *overrides: str | Sequence[str], name: str | None = None) -> Model:
    """Make a run of a pretrained model as `diffuse import` does, and load it.

    Args:
        source: a folder that diffusers wrote, a file of weights with a preset, or "hub:OWNER/NAME".
        overrides: further arguments of `diffuse import`, as "dataset=digits", or a list of them.
        name: name of the run; None is the last part of the source.

    Raises:
        UsageError: for a source that cannot be read, a run that exists, or an autoencoder, whose run is not loaded.

    Example:
        >>> folder = load("outputs/demo").export("demo_diffusers")
        >>> import_weights(folder, name="copy").shape
        outputs/copy: ...
        (1, 8, 8)
    """
    named = as_overrides(source=str(source), **given(name=name))
    checked = checked_config("import", ImportConfig, [*named, *flat(overrides)])
    folder = import_command.run_folder(checked)
    import_command.run(checked)
    return load(folder)


def evaluate(
    samples: str | Path | Tensor, metrics: Sequence[str], *overrides: str | Sequence[str]
) -> dict[str, Result]:
    """Measure images made by any program, as `diffuse eval samples=` does.

    Args:
        samples: folder, ZIP, .npz or .npy file; or images, uint8 [N, C, H, W] with C 1 or 3.
        metrics: names of metrics, as "fid" and "kid".
        overrides: further arguments of `diffuse eval`, as "dataset=cifar10", or a list of them.

    Returns:
        Results by name, each with details and protocol. They are not added to metrics.json.

    Raises:
        UsageError: for a mistake in the overrides, or images that do not fit the metrics.

    Example:
        >>> results = evaluate("pictures", ["fid"], "dataset=digits", "features=classifier", "force=true")
        >>> results["frechet_classifier"].protocol["samples"]
        20
    """
    path, images = IN_MEMORY, None
    if isinstance(samples, str | Path):
        path = str(samples)
    else:
        images = tensor("samples", samples, "a path, or uint8 [N, C, H, W]")
    named = as_overrides(samples=path, metric=texts("metrics", metrics))
    return evaluated(checked_config("eval", EvalConfig, [*named, *flat(overrides)]), None, images)


def option(group: str, name: str, *supplied: Any, **arguments: Any) -> Any:
    """Build an option of a group of the configuration.

    Args:
        group: "schedule", "parameterization", "model", "sampler", "guidance", "objective", ...
        name: name of its option, as "dpmpp_2m".
        supplied: positional arguments of its class: a schedule for a sampler, shape and number of classes for a model.
        arguments: values in place of those in the option's file; needed where only a command has one, as for the `lr`
            of "adamw".

    Raises:
        UsageError: for an unknown group, option or argument, a missing value, or one of the wrong type.

    Example:
        >>> schedule = option("schedule", "cosine")
        >>> sampler = option("sampler", "dpmpp_2m", schedule, spacing="karras")
        >>> len(sampler.grid(10))
        11
    """
    group, name = str(group), str(name)
    command = next((each for each in COMMANDS if group in configuration.defaults(each)), None)
    if command is None:
        known = sorted({known for each in COMMANDS for known in configuration.defaults(each)})
        raise UsageError("group", group, "unknown group", configuration.did_you_mean(group, known))
    options = configuration.options(group)
    if name not in options:
        raise UsageError(group, name, "unknown option", configuration.did_you_mean(name, list(options)))
    node = configuration.compose(command, [f"{group}={name}"])[0].get(group)
    if isinstance(node, dict) and "_target_" not in node:
        node = node.get(name)  # a group with several options at once
    if not isinstance(node, dict) or "_target_" not in node:
        raise UsageError("group", group, f"option {name} has no class to build", "use it in a command")
    written = {key: text for key, text, _ in configuration.documented(options[name], group)}
    node |= arguments
    mistakes = {str(mistake.key): mistake for mistake in check_node(group, node)}
    for argument, value in node.items():
        key = f"{group}.{argument}"
        interpolated = argument not in arguments and written.get(key, "").startswith("${")
        if interpolated or value == "???" or (value == recipe.AUTO and key in mistakes):
            mistakes[key] = Problem(argument, NO_VALUE, "required", f"give {argument}=")
    if mistakes:
        raise UsageError.several(mistakes.values())
    check_supplied(group, name, configuration.target(node), supplied)
    return build(node, *supplied)
