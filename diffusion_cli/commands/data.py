"""`diffuse data`: pack a dataset into one file, or list and fetch published files."""

import re
import shlex
from pathlib import Path

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.config import DataConfig, as_text, build, double_quoted, target
from diffusion_cli.config.values import Node
from diffusion_cli.data import Dataset, Fetch, FilesAction, FrozenText, Pack
from diffusion_cli.data.packed_conditions import CAPTIONS
from diffusion_cli.errors import NO_VALUE, UsageError, counted
from diffusion_cli.metrics import Metric
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.temporary_files import remove_abandoned
from diffusion_cli.system.trusted_paths import WEIGHTS, remember
from diffusion_cli.system.untrusted import Archive

SUFFIX = ".npz"
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[a-z_]\w*", re.ASCII | re.IGNORECASE)
"""Names that need no quotes in a list."""

INCOMPLETE = 1
"""Exit code of `diffuse data list` if a file is missing or damaged."""


def run(config: DataConfig) -> int:
    """Pack a dataset into a new file, atomically; or list or fetch published files. Return the exit code."""
    action: Pack | FilesAction = build(config.action)
    if isinstance(action, FilesAction):
        return 0 if _process_files(action, config) else INCOMPLETE
    _pack(action, config)
    return 0


def _process_files(action: FilesAction, config: DataConfig) -> bool:
    """Process the published files of a configuration's dataset, networks and metrics; return whether all are here."""
    if config.output is not None:
        raise UsageError("output", config.output, "applies only to action=pack", "leave it out")
    if config.dataset is config.features is config.text is None and not config.metric:
        remedy = "name options, for example dataset=cifar10 features=inception metric=lpips"
        raise UsageError("dataset", None, "no files are named", remedy)
    dataset: Dataset | None = None
    if config.dataset is not None and (isinstance(action, Fetch) or _has_published_files(config.dataset)):
        dataset = build(config.dataset, config.data_dir)  # may copy data of a URL
    files = [] if dataset is None else [*dataset.downloads()]
    if config.features is not None:
        network = target(config.features)
        if not isinstance(network, type):
            raise UsageError(
                "features", "auto", "depends on the images", "name a network, for example features=inception"
            )
        files += network.downloads(config.features)  # pyright: ignore[reportAttributeAccessIssue]
    if config.text is not None:
        text = build(config.text)
        if isinstance(action, Fetch):
            remember(config.text, WEIGHTS)
        files += text.downloads() if isinstance(text, FrozenText) else []
    for metric in map(build, config.metric.values()):
        files += metric.downloads() if isinstance(metric, Metric) else []
    as_json = config.format == "json"
    complete = action([*dict.fromkeys(files)], as_json)
    if dataset is not None and isinstance(action, Fetch):
        read = dataset.load if dataset.downloads() else dataset.stream  # the former unpacks files
        counts = [len(read(split)) for split in ("train", "val")]
        if not as_json:
            print(_counts(dataset, *counts))
    elif not files and not as_json:
        print("These options need no published files; metrics of features take those of features=")
    return complete


def _counts(dataset: Dataset, train: int, val: int) -> str:
    """Return the line with the numbers of images and of their groups in each split."""
    groups = dataset.num_groups
    of = {split: f" of {counted(number, 'group')}" for split, number in groups.items()} if groups else {}
    return f"{dataset.name}: {train} images{of.get('train', '')} for training, {val}{of.get('val', '')} for validation"


def _has_published_files(node: Node) -> bool:
    """Return whether the class of a dataset lists published files."""
    return target(node).downloads is not Dataset.downloads


def _pack(pack: Pack, config: DataConfig) -> None:
    """Pack a dataset into a new file, atomically."""
    for key, node in {"features": config.features, "text": config.text, "metric": config.metric}.items():
        if node:
            raise UsageError(key, NO_VALUE, "does not apply to action=pack", "leave it out")
    if config.format != "table":
        raise UsageError("format", config.format, "does not apply to action=pack", "leave it out")
    if config.dataset is None:
        raise UsageError(
            "dataset", None, "required", "choose one, for example dataset=folder dataset.path=..."
        )
    dataset: Dataset = build(config.dataset, config.data_dir)
    output = _path(config, dataset)
    if output.exists():
        raise UsageError("output", output, "already exists", "choose another name, or remove it")
    show_remarks(dataset.remarks())
    remove_abandoned(output.parent)
    with atomic_write(output) as temporary:
        count = pack(dataset, temporary)
    with Archive(output) as archive:
        captioned = CAPTIONS in archive.entries
    flip = " dataset.flip=true" if dataset.flip and (dataset.flips_captioned or not captioned) else ""
    print(f"{counted(count, 'image')}: {output}")
    print(f"diffuse train dataset=array {as_text('dataset.path', str(output))}{_label(dataset)}{flip}")


def _label(dataset: Dataset) -> str:
    """Return the word that chooses the attributes of a dataset, after a blank; nothing without."""
    names = [_word(attribute.name) for attribute in dataset.attributes]
    if not names:
        return ""
    value = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    return f" {shlex.quote(f'dataset.label={value}')}"


def _word(name: str) -> str:
    """Return a name as an element of a list of Hydra."""
    return name if PLAIN.fullmatch(name) else double_quoted(name)


def _path(config: DataConfig, dataset: Dataset) -> Path:
    if config.output is None:
        size = "x".join(map(str, dataset.shape[1:]))
        return Path(config.output_dir, "packed", f"{dataset.name}-{size}{SUFFIX}")
    output = Path(config.output).expanduser()
    if output.suffix not in ("", SUFFIX):
        raise UsageError("output", output, "unsupported file format", f"use the suffix {SUFFIX}")
    return output if output.suffix else Path(f"{output}{SUFFIX}")
