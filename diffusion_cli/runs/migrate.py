"""Convert files of earlier versions to the names of this version.

Checkpoints have a format number. Configurations (`config.yaml`, option files of a user), manifests and results have
none, so all migrations are applied to them, and each migration leaves newer data unchanged.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

FORMAT = 8
OLDEST = 4

CLASSES_OF_FORMAT_4 = {
    "diffusion.guidance.Auto": "diffusion.guidance.AutoGuidance",
    "diffusion.guidance.ByClassifier": "diffusion.guidance.ClassifierGuidance",
    "diffusion.guidance.Unguided": "diffusion.guidance.NoGuidance",
    "diffusion.objectives.EDM": "diffusion.objectives.EDMObjective",
    "diffusion.parameterizations.EDM": "diffusion.parameterizations.EDMPreconditioning",
    "diffusion.schedules.EDM": "diffusion.schedules.EDMSchedule",
    "samplers.EDM": "samplers.EDMSampler",
    "training.autoencoder_loss.Reconstruction": "training.autoencoder_loss.ReconstructionLoss",
}
"""Classes renamed after format 4, with their present modules: old name to new name."""
MODULES_OF_FORMAT_4 = {
    "guidance": "diffusion.guidance",
    "objective": "diffusion.objectives",
    "parameterizations": "diffusion.parameterizations",
    "reconstruction": "training.autoencoder_loss",
    "schedules": "diffusion.schedules",
    "times": "diffusion.time_sampling",
}
"""Modules moved after format 4: old path to new path."""
KEYS_OF_FORMAT_5 = {
    "accumulate": "accumulate_grad_batches",
    "equal_size_floor": "equal_size_reference",
    "floor": "reference_distance",
    "floor_images": "reference_distance_images",
    "held_out": "val_fraction",
    "held_out_accuracy": "val_accuracy",
    "method": "restoration",
    "on_real_held_out": "on_real_val",
    "ratio_to_floor": "ratio_to_reference",
    "times": "time_sampling",
}
"""Keys of configurations and results renamed after format 5."""
KEYS_OF_FORMAT_6 = {
    "optimizer.clip_norm": "clip_norm",
    "optimizer.decay_steps": "lr_schedule.decay_steps",
    "optimizer.warm_up_steps": "lr_schedule.warm_up_steps",
}
"""Dotted keys of configurations moved after format 6."""
OPTIMIZERS_OF_FORMAT_6 = frozenset(f"diffusion_cli.training.{name}" for name in ("Adam", "AdamW"))
"""Optimizers that had these keys; an optimizer of a plugin may have arguments of the same names."""
ADDED_OPTIONS = {
    "diffusion_cli.networks.UNet": {
        "fir_padding": "edge",
        "progressive_output": "none",
        "middle_attention": True,
        "norm_eps": 1e-6,
        "embedding_channels": None,
        "scale_by_sigma": False,
        "centered": True,
        "cross_attention_resolutions": None,
        "window": None,
        "window_overlap": 8,
    },
    "diffusion_cli.networks.DiT": {"embedding_layout": "cos_sin", "mlp_norm_eps": 1e-6},
    **{
        f"diffusion_cli.diffusion.objectives.{name}": {"single_dropout": 0.1}
        for name in ("Simple", "Target", "Likelihood", "MinSNR", "EDMObjective", "VLB", "Hybrid")
    },
    **{f"diffusion_cli.data.{name}": {"label": None} for name in ("Digits", "TorchDataset")},
    **{f"diffusion_cli.data.{name}": {"group": None} for name in ("Meshes", "Points", "Signals")},
    "diffusion_cli.data.Array": {"label": None, "group": None},
    "diffusion_cli.data.Folder": {
        "label": None,
        "captions": "auto",
        "group": None,
        "spacing": None,
        "fill": None,
    },
    "diffusion_cli.data.Pairs": {"label": None, "captions": "none", "group": None},
    "diffusion_cli.data.HuggingFace": {"caption": None, "group": None},
    "diffusion_cli.diffusion.schedules.Linear": {"rescale_timesteps": False},
    "diffusion_cli.diffusion.schedules.Cosine": {"rescale_timesteps": False},
}
"""Options added after format 7, by class, with the values that its code had.

They are added to data of any format: an option may be newer than the last format.
"""
SPLITS_OF_FORMAT_5 = {"held_out": "val"}
"""Dataset splits renamed after format 5."""
CONSTANT_RATE, COSINE_DECAY = (f"diffusion_cli.training.{name}" for name in ("ConstantRate", "CosineDecay"))
"""Schedules of the optimizers of format 6, without and with `decay_steps`."""
ANCESTRAL = frozenset(
    f"diffusion_cli.samplers.{name}" for name in ("DDIM", "DPM2", "DPMSolver2S", "DPMSolverSDE")
)
"""Samplers that took any `eta` up to version 0.2, and now one of at most 1."""


def migrated(value: Any, written: int = OLDEST) -> Any:
    """Return nested plain data with the names of this version.

    Args:
        value: mappings, lists, text, numbers; not modified.
        written: format number of the version that wrote it, from OLDEST to FORMAT.
    """
    for number, migration in MIGRATIONS.items():
        if number >= written:
            value = migration(value)
    return _with_options(value)


def migrated_config(config: Any, written: int = OLDEST) -> Any:
    """Return the stored configuration of a training with the names and the ranges of values of this version.

    Samplers clipped the share of noise of `eta` above 1 at each step, so that of 1 is the nearest. They added no noise
    with `s_min` above `s_max`. Settings of finished images keep their values, because they describe these images.
    """
    config = migrated(config, written)
    sampler = config.get("sampler") if isinstance(config, dict) else None
    if not isinstance(sampler, dict):
        return config
    target, numbers = (
        sampler.get("_target_"),
        {k: v for k, v in sampler.items() if isinstance(v, int | float)},
    )
    if target in ANCESTRAL and numbers.get("eta", 0) > 1:
        sampler = {**sampler, "eta": 1.0}
    if target == "diffusion_cli.samplers.EDMSampler" and numbers.get("s_min", 0) > numbers.get(
        "s_max", math.inf
    ):
        sampler = {**sampler, "s_churn": 0.0}
    return {**config, "sampler": sampler}


def as_of_format_4(value: Any) -> Any:
    """Return plain data with the names of format 4, for fingerprints that must not change.

    Options of datasets that were added later are left out where they have the values of then.
    """
    former_classes = {new: old for old, new in CLASSES_OF_FORMAT_4.items()}
    former_modules = {new: old for old, new in MODULES_OF_FORMAT_4.items()}

    def former(target: Any) -> Any:
        package, _, path = str(target).partition(".")
        if package != "diffusion_cli":
            return target
        module, _, name = former_classes.get(path, path).rpartition(".")
        return f"{package}.{former_modules.get(module, module)}.{name}"

    words = _without_options(value, "diffusion_cli.data.")
    words = _with_keys(words, {new: old for old, new in KEYS_OF_FORMAT_5.items()})
    words = _with_splits(words, {new: old for old, new in SPLITS_OF_FORMAT_5.items()})
    return _with_targets(words, former)


def key_of_format_4(key: str) -> str:
    """Return a dotted key with the names of format 4, for names of runs that must not change."""
    moved = {new: old for old, new in KEYS_OF_FORMAT_6.items()}
    former = {new: old for old, new in KEYS_OF_FORMAT_5.items()}
    return ".".join(former.get(part, part) for part in moved.get(key, key).split("."))


def had_moved_keys(optimizer: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether the node of an optimizer has a class that had `KEYS_OF_FORMAT_6`."""
    return isinstance(optimizer, Mapping) and optimizer.get("_target_") in OPTIMIZERS_OF_FORMAT_6


def migrated_column(name: str) -> str:
    """Return the present name of a column of a `metrics.csv` of any version."""
    return f"val_{name.removeprefix('held_out_')}" if name.startswith("held_out_") else name


def result_name(split: str, row: int) -> str:
    """Return the file name of the edit of a dataset image; it must not change, so that stopped edits can resume."""
    former = {new: old for old, new in SPLITS_OF_FORMAT_5.items()}
    return f"{former.get(split, split)}_{row:05d}"


def _rename_classes(value: Any) -> Any:
    """Convert format 4 to 5: modules moved into packages, and classes were renamed."""
    return _with_targets(value, _renamed)


def _rename_words(value: Any) -> Any:
    """Convert format 5 to 6: keys and splits were renamed, but not arguments of other packages."""
    return _with_keys(_with_splits(value, SPLITS_OF_FORMAT_5), KEYS_OF_FORMAT_5)


def _split_optimizer(value: Any) -> Any:
    """Convert format 6 to 7: the learning-rate schedule and the gradient clipping left the optimizer."""
    if isinstance(value, list | tuple):
        return [_split_optimizer(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    config = {key: _split_optimizer(item) for key, item in value.items()}
    node, schedule = config.get("optimizer"), config.get("lr_schedule")
    former = {key.partition(".")[2]: key for key in KEYS_OF_FORMAT_6}
    if not had_moved_keys(node) or not former.keys() & node.keys():
        return config
    derived = config.get("derived") if isinstance(config.get("derived"), list) else None
    schedule = (
        dict(schedule) if isinstance(schedule, Mapping) else {"_target_": CONSTANT_RATE, "warm_up_steps": 0}
    )
    if "decay_steps" in node:
        follows = "optimizer.decay_steps" in (derived or ())
        falls = node["decay_steps"] is not None or follows
        schedule = {
            "_target_": COSINE_DECAY if falls else CONSTANT_RATE,
            "warm_up_steps": schedule.get("warm_up_steps", 0),
        }
        schedule |= {"decay_steps": node["decay_steps"]} if falls else {}
        derived = None if derived is None else [key for key in derived if key != "lr_schedule.decay_steps"]
    if "warm_up_steps" in node:
        schedule["warm_up_steps"] = node["warm_up_steps"]
    config["optimizer"] = {key: item for key, item in node.items() if key not in former}
    config["lr_schedule"] = schedule
    config["clip_norm"] = node.get("clip_norm", config.get("clip_norm"))
    if derived is not None:
        config["derived"] = sorted({KEYS_OF_FORMAT_6.get(str(key), str(key)) for key in derived})
    return config


def _with_options(value: Any) -> Any:
    """Return plain data with the options that its classes gained."""

    def entry(key: Any, item: Any) -> tuple[Any, Any]:
        target = item.get("_target_") if isinstance(item, Mapping) else None
        added = ADDED_OPTIONS.get(target, {}) if isinstance(target, str) else {}
        return key, {**added, **item} if added else item

    return _mapped(value, entry)


def _without_options(value: Any, prefix: str) -> Any:
    """Return plain data without the options that classes of a module gained, where they have the values of then."""

    def entry(key: Any, item: Any) -> tuple[Any, Any]:
        target = item.get("_target_") if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or not isinstance(target, str) or not target.startswith(prefix):
            return key, item
        added = ADDED_OPTIONS.get(target, {})
        return key, {name: of for name, of in item.items() if name not in added or of != added[name]}

    return _mapped(value, entry)


def _with_targets(value: Any, rename: Callable[[Any], Any]) -> Any:
    """Return plain data with class names renamed."""
    return _mapped(value, lambda key, item: (key, rename(item) if key == "_target_" else item))


def _with_keys(value: Any, names: Mapping[str, str]) -> Any:
    """Return plain data with keys renamed, except keys of mappings without `_target_`, which may be file names."""

    def entry(key: Any, item: Any) -> tuple[Any, Any]:
        return names.get(key, key) if not isinstance(item, Mapping) or "_target_" in item else key, item

    return _mapped(value, entry)


def _with_splits(value: Any, names: Mapping[str, str]) -> Any:
    """Return plain data with splits renamed: values of `split`, parts of `name` (data/split), and keys of `cache`."""

    def entry(key: Any, item: Any) -> tuple[Any, Any]:
        if key == "split" and isinstance(item, str):
            return key, names.get(item, item)
        if key == "name" and isinstance(item, str) and "/" in item:
            data, _, split = item.rpartition("/")
            return key, f"{data}/{names.get(split, split)}"
        if key == "cache" and isinstance(item, Mapping):
            return key, {names.get(split, split): path for split, path in item.items()}
        return key, item

    return _mapped(value, entry)


def is_ours(node: Mapping[Any, Any], around: bool = True) -> bool:
    """Return whether the keys of a mapping are those of this package, not arguments of a class of another one.

    Args:
        node: a mapping; without `_target_` it is like the mapping around it.
        around: the answer for the mapping around it.
    """
    return str(node["_target_"]).startswith("diffusion_cli.") if "_target_" in node else around


def _mapped(value: Any, entry: Callable[[Any, Any], tuple[Any, Any]], around: bool = True) -> Any:
    """Return plain data with each key and value replaced by `entry`, except in mappings that are not `is_ours`."""
    if isinstance(value, list | tuple):
        return [_mapped(item, entry, around) for item in value]
    if not isinstance(value, Mapping):
        return value
    ours = is_ours(value, around)
    items = {key: _mapped(item, entry, ours) for key, item in value.items()}
    return dict(entry(key, item) for key, item in items.items()) if ours else items


def _renamed(target: Any) -> Any:
    package, _, path = str(target).partition(".")
    if package != "diffusion_cli":
        return target
    module, _, name = path.partition(".")
    path = f"{MODULES_OF_FORMAT_4.get(module, module)}.{name}"
    return f"{package}.{CLASSES_OF_FORMAT_4.get(path, path)}"


MIGRATIONS: dict[int, Callable[[Any], Any]] = {
    4: _rename_classes,
    5: _rename_words,
    6: _split_optimizer,
}
"""The migration from each format to the next, in order; formats 7 and 8 differ by options only."""
