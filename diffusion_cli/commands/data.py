"""`diffuse data`: pack a dataset into one file."""

from pathlib import Path

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.config import DataConfig, as_text, build
from diffusion_cli.data import Dataset, Pack
from diffusion_cli.errors import UsageError
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.temporary_files import remove_abandoned

SUFFIX = ".npz"


def run(config: DataConfig) -> None:
    """Pack a dataset into a new file, atomically."""
    if config.dataset is None:
        raise UsageError(
            "dataset", None, "required", "choose one, for example dataset=folder dataset.path=..."
        )
    dataset: Dataset = build(config.dataset, config.data_dir)
    output = _path(config, dataset)
    if output.exists():
        raise UsageError("output", output, "already exists", "choose another name, or remove it")
    show_remarks(dataset.remarks())
    pack: Pack = build(config.action)
    remove_abandoned(output.parent)
    with atomic_write(output) as temporary:
        count = pack(dataset, temporary)
    flip = " dataset.flip=true" if dataset.flip else ""
    print(f"{count} images: {output}")
    print(f"diffuse train dataset=array {as_text('dataset.path', str(output))}{flip}")


def _path(config: DataConfig, dataset: Dataset) -> Path:
    if config.output is None:
        _, height, width = dataset.shape
        return Path(config.output_dir, "packed", f"{dataset.name}-{height}x{width}{SUFFIX}")
    output = Path(config.output).expanduser()
    if output.suffix not in ("", SUFFIX):
        raise UsageError("output", output, "unsupported file format", f"use the suffix {SUFFIX}")
    return output if output.suffix else Path(f"{output}{SUFFIX}")
