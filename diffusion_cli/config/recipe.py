"""The recipe of a training: the values that `auto` stands for, by network, data and machine.

A learning rate that suits a small network makes a wide one diverge, so no option states one half of a recipe: `auto`
is replaced here, where the network and the data are both known. docs/howto/recipes.md has the measurements.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_cli.config.at_hand import OwnImages, gpu
from diffusion_cli.config.averages import OF_PROFILE
from diffusion_cli.config.catalogue import PACKAGE, content, options
from diffusion_cli.config.runs import flatten, replaced
from diffusion_cli.config.values import Node
from diffusion_cli.runs.migrate import migrated_config
from diffusion_cli.system.untrusted import read_yaml

AUTO = "auto"
NETWORKS = ("unet_small", "unet_patch2", "unet_tiny", "unet3d_tiny")
"""Options of `model` that `auto` chooses from."""
NETWORK_BEFORE_AUTO = "unet_small"
"""The network of own images in versions without `auto`."""
MODEL = "model="
"""Begins the entry of `derived` that has the option for `model=auto`."""
USUAL_SIZE = 64  # pixels, of own images on a GPU; the size of most published small-scale work
USUAL_SIZE_ON_CPU = 32
SMALLEST_SIZE = 8
SHARES_OF_ADAM = {f"{PACKAGE}.training.Lion": 0.1}
"""Learning rates over that of Adam: Lion's is 3 to 10 times smaller (Chen et al. 2023, Sec. 5)."""


def learning_rate(width: int, batch_size: int) -> float:
    """Return the learning rate of Adam: `clamp(2e-4 (256 / width)^2, 1e-4, 3e-3) sqrt(min(1, batch_size / 64))`.

    Args:
        width: features of the widest layer (see `network_width`).
        batch_size: images of an optimizer step.

    2e-4 at 256 is DDPM's rate (Ho et al. 2020, App. B), 1e-4 at 384 and more DiT's (Peebles & Xie 2023, Sec. 4), and
    3e-3 at 64 that of docs/results/time_to_quality.md. Small batches take the square-root rule (Malladi et al. 2022).
    """
    rate = min(3e-3, max(1e-4, 2e-4 * (256 / width) ** 2))
    return float(f"{rate * min(1.0, batch_size / 64) ** 0.5:.2g}")


def warm_up_steps(max_steps: int | None) -> int:
    """Return the steps over which the learning rate rises: a 24th of the budget, at most DDPM's 5,000.

    Without a budget in steps it is the 100 steps of the demo.
    """
    return 100 if max_steps is None else min(5000, max_steps // 24)


def ema_decay(max_steps: int | None) -> float:
    """Return the decay of the averaged weights: an average over 5/24 of the budget, at most 10,000 steps.

    DDPM's 0.9999 is an average over 10,000 steps (Ho et al. 2020, App. B). Without a budget in steps it is 1,000.
    """
    steps = 1000 if max_steps is None else min(10_000, max(10, max_steps * 5 // 24))
    return round(1 - 1 / steps, 6)


def snapshot_every(max_steps: int | None) -> int:
    """Return the steps between snapshots of power averages: a 32nd of the budget; 500 without a budget in steps."""
    return 500 if max_steps is None else max(1, max_steps // 32)


def budget(images: OwnImages | None, batch_size: int, on_gpu: bool) -> int:
    """Return the optimizer steps for a user's own images: 1,000 passes, at most a day on a GPU or an hour on a CPU.

    DDPM trained on CIFAR-10 for 2,000 passes (Ho et al. 2020, App. B). Fewer than 5,000 steps leave a network
    unfinished, however few its images are.
    """
    most = 100_000 if on_gpu else 20_000
    return most if images is None else max(5000, min(most, 1000 * images.number // batch_size))


def network(size: int, dimensions: int, on_gpu: bool) -> str:
    """Return the option of `model` for images of a height or width of `size` pixels."""
    if dimensions == 3:
        return "unet3d_tiny"
    if size <= 16:
        return "unet_tiny"
    return "unet_small" if on_gpu else "unet_patch2"


def resolution(images: OwnImages | None, on_gpu: bool) -> int:
    """Return the height and width to train at: that of the images in steps of 8, up to what is usual."""
    usual = USUAL_SIZE if on_gpu else USUAL_SIZE_ON_CPU
    if images is None or images.size is None:
        return usual
    return max(SMALLEST_SIZE, min(usual, images.size // 8 * 8))


def network_width(model: Mapping[str, Any]) -> int:
    """Return the features of the widest layer of a `model` node; 256 for a class that states none."""
    if "hidden_size" in model:
        return _whole(model["hidden_size"], 256)
    levels = model.get("channel_mult")
    widest = max((_whole(level, 1) for level in levels), default=1) if isinstance(levels, list) else 1
    return _whole(model.get("channels"), 256) * widest


def usual_rate(config: Mapping[str, Any]) -> float:
    """Return the learning rate of the recipe for the optimizer, the network and the batch size of a configuration."""
    rate = learning_rate(network_width(config["model"]), _whole(config["batch_size"], 64))
    share = SHARES_OF_ADAM.get(str(config["optimizer"].get("_target_")), 1.0)
    return float(f"{rate * share:.2g}")


BUDGETED: dict[str, Callable[[int | None], int | float]] = {
    "lr_schedule.warm_up_steps": warm_up_steps,
    "ema.decay": ema_decay,
    "ema.snapshot_every": snapshot_every,
}
"""The values of a recipe that follow from `max_steps` alone."""
DECAY_STEPS = "lr_schedule.decay_steps"
"""The key that equals `max_steps` by default."""


CONDITIONAL = "model.class_conditional"
"""The key of networks that are conditioned on classes and attributes."""
DERIVED = ("dataset.resolution", "max_steps", "optimizer.lr", *BUDGETED)
"""The keys that a recipe sets where they are `auto`."""


def chosen_network(composed: Node, stored: Node, images: Callable[[], OwnImages | None]) -> str:
    """Return the option that `model=auto` stands for: that of an existing run, else one for data and machine.

    Args:
        composed: the configuration; its network does not matter.
        stored: the configuration that the run started with; empty for a new run.
        images: what returns the user's own images.
    """
    if stored:
        recorded = (name for name in NETWORKS if f"{MODEL}{name}" in derived_in(stored))
        return next(recorded, _nearest_network(flatten(stored)))
    on_gpu, size = gpu(composed["trainer"]["accelerator"]), composed["dataset"].get("resolution")
    if size is None:
        own = images()
        size = own.size if own else None
    sizes = (
        size if isinstance(size, list) else [size if isinstance(size, int) else resolution(images(), on_gpu)]
    )
    return network(min(sizes), len(sizes), on_gpu)


def _nearest_network(stored: Mapping[str, Any]) -> str:
    """The network with most of the values of a run that records none, the earlier default before others."""

    def alike(name: str) -> int:
        option = content(options("model")[name])
        return sum(stored.get(f"model.{key}") == value for key, value in option.items())

    return max(NETWORKS, key=alike)


def with_recipe(composed: Node, stored: Node, images: Callable[[], OwnImages | None]) -> Node:
    """Return a training configuration in which each `auto` of a recipe is replaced by its value.

    A run keeps the values that it started with, even if its images or the machine change; only values that were derived
    from its budget follow another budget. `derived` lists the keys with derived values.

    Args:
        composed: the configuration, as composed.
        stored: the configuration that the run started with; empty for a new run.
        images: what returns the user's own images.
    """
    before, derived_before = flatten(stored), derived_in(stored)
    on_gpu = gpu(composed["trainer"]["accelerator"])
    batch_size = _whole(composed["batch_size"], 64)
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in composed.items()}
    derived = list(derived_in(composed))
    average = filled.get("ema")
    if isinstance(average, dict):
        for key in _keys_of_other_profiles(average):
            average[key] = None

    def fill(key: str, derive: Callable[[], int | float]) -> None:
        parent, _, name = key.rpartition(".")
        node = filled[parent] if parent else filled
        if not isinstance(node, dict) or node.get(name) != AUTO:
            return
        if before.get(key, AUTO) == AUTO or (key in BUDGETED and key in derived_before):
            node[name] = derive()
            derived.append(key)
        else:
            node[name] = before[key]
            derived.extend({key} & derived_before)

    fill("dataset.resolution", lambda: resolution(images(), on_gpu))
    fill("max_steps", lambda: budget(images(), batch_size, on_gpu))
    steps = _whole(filled["max_steps"], None)
    fill("optimizer.lr", lambda: usual_rate(filled))
    for key, derive in BUDGETED.items():
        fill(key, partial(derive, steps))
    if flatten(filled).get(DECAY_STEPS) == AUTO:  # it is interpolated from max_steps
        filled["lr_schedule"]["decay_steps"] = filled["max_steps"]
    return filled | {"derived": sorted(derived)}


def _keys_of_other_profiles(average: Mapping[str, Any]) -> list[str]:
    """Return the keys of an average that are `auto`, and have no effect with its profile."""
    profile = average.get("profile")
    others = (keys for other, keys in OF_PROFILE.items() if profile in OF_PROFILE and other != profile)
    return [key for keys in others for key in keys if average.get(key) == AUTO]


def conditioned(composed: Node, stored: Node, stated: Collection[str]) -> Node:
    """Return a training configuration with a network that is conditioned, if `dataset.label` chooses attributes.

    A key that the user states stays, and so does the network of an existing run.

    Args:
        composed: the configuration, as composed.
        stored: the configuration that the run started with; empty for a new run.
        stated: the keys on the command line.
    """
    dataset, model = composed.get("dataset"), composed.get("model")
    if not isinstance(dataset, Mapping) or not isinstance(model, Mapping):
        return composed
    is_ours = str(dataset.get("_target_")).startswith(f"{PACKAGE}.")
    if not is_ours or dataset.get("label") is None or CONDITIONAL.partition(".")[2] not in model:
        return composed
    if CONDITIONAL in stated:
        return composed
    return replaced(composed, {CONDITIONAL: flatten(stored).get(CONDITIONAL, True)})


def derived_in(config: Mapping[str, Any]) -> set[str]:
    """Return the keys with values that a recipe derived; none for a run of a version without recipes."""
    entries = config.get("derived")
    return {entry for entry in entries if isinstance(entry, str)} if isinstance(entries, list) else set()


def started_with(run: Path) -> Node:
    """Return the configuration that the run in a folder started with; empty without a checkpoint."""
    if not any(run.glob("checkpoints/*.ckpt")):
        return {}
    try:
        value = read_yaml(run / "config.yaml")
    except (OSError, ValueError):
        return {}
    return migrated_config(value) if isinstance(value, dict) else {}


def _whole(value: Any, otherwise: Any) -> Any:
    """A value if it is a positive whole number, else `otherwise`; the schema reports invalid values."""
    return value if isinstance(value, int) and value > 0 else otherwise
