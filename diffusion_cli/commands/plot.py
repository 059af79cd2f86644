"""`diffuse plot`: draw noise schedules, a noised image, or the curves and previews of runs."""

import re
from pathlib import Path

from diffusion_cli.config import PlotConfig, Variant, build, fingerprint
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, class_name, format_value
from diffusion_cli.figures import Figure, run_of

LONGEST = 100  # characters of a file name before its fingerprint


def run(variants: list[Variant]) -> None:
    """Draw one figure of all variants, to `output` or to a file named by their configuration."""
    config = _config(variants[0])
    figure: Figure = build(config.figure)
    _refuse(figure, variants)
    configs = {_label(figure, variant): _config(variant) for variant in variants}
    output = Path(config.output) if config.output else _usual_path(figure, configs)
    if output.suffix[1:] not in figure.formats:
        raise UsageError(
            "output",
            output,
            f"unsupported file format for figure={figure.name}",
            f"use the suffix {' or '.join(figure.formats)}",
        )
    if config.output and output.exists() and not (config.force and output.is_file()):
        raise UsageError(
            "output", output, "already exists", "choose another name, or set force=true to overwrite a file"
        )
    figure.draw(configs, output)
    print(f"{figure.name.capitalize()} of {', '.join(configs)}: {output}")


def _config(variant: Variant) -> PlotConfig:
    assert isinstance(variant.config, PlotConfig)
    return variant.config


def _refuse(figure: Figure, variants: list[Variant]) -> None:
    """Raise UsageError for lists that the figure does not support."""
    wrong = [key for key in variants[0].values if key.partition(".")[0] not in figure.of]
    if wrong:
        of = " and ".join(figure.of)
        raise UsageError.several(
            Problem(key, NO_VALUE, f"figure={figure.name} takes lists of {of} only", "give one value")
            for key in wrong
        )


def _label(figure: Figure, variant: Variant) -> str:
    """Return the label of a variant: its list values, or else its run or schedule."""
    if variant.values:
        words = (
            format_value(value)
            if key in ("run", "schedule")
            else f"{key.rpartition('.')[2]}={format_value(value)}"
            for key, value in variant.values.items()
        )
        return ", ".join(words)
    config = _config(variant)
    if figure.of[0] == "run":
        return run_of(config).name
    return class_name(config.schedule).removesuffix("Schedule").lower()


def _usual_path(figure: Figure, configs: dict[str, PlotConfig]) -> Path:
    (first, *_) = configs.values()
    settings = [config.model_dump(exclude={"output", "force", "output_dir"}) for config in configs.values()]
    name = re.sub(r"[^\w.+=-]+", "-", "-".join([figure.name, *configs]))[:LONGEST]
    name += f"-{fingerprint({'settings': settings})}.{figure.formats[0]}"
    return Path(first.output_dir) / "figures" / name
